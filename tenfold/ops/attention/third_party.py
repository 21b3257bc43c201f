"""Attention of other projects, FlashInfer and flash-attn, as further arms where they are installed; never required.

Each takes rotated queries and pages that hold the new tokens. They compete in `tenfold tune` and run where they were
the fastest; one that fails there, or whose result is wrong, is left out like any other arm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec, Contexts

WORKSPACE = 128 << 20  # bytes that FlashInfer wants, zeroed before its first use
PAGE_OF_2 = 256  # tokens: pages of flash-attn 2 are multiples of it


@dataclass(frozen=True, slots=True)
class Library:
    """module: what is imported; chunks: whether it takes more than one token a request; pages: of how many tokens a
    page must be a multiple; softcap: whether it caps scores.
    """

    module: str
    chunks: bool
    pages: int
    softcap: bool
    run: Callable[..., Tensor]

    def legal(self, spec: AttentionSpec, dtype: torch.dtype, page_size: int, chunks: bool) -> bool:
        """Whether it is installed and takes these layers."""
        if not installed(self.module) or dtype not in (torch.bfloat16, torch.float16):
            return False
        return (self.chunks or not chunks) and page_size % self.pages == 0 and (self.softcap or not spec.softcap)


@cache
def installed(module: str) -> bool:
    return find_spec(module) is not None


def flashinfer(q: Tensor, keys: Tensor, values: Tensor, step: Contexts, spec: AttentionSpec, max_kv: int) -> Tensor:
    """Decodes only: lengths stay on the device, so a captured step can be replayed."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    out: Tensor = trtllm_batch_decode_with_kv_cache(
        heads_of(q, spec),
        (keys, values),
        workspace(q.device),
        step.page_table,
        step.kv_lengths,
        max_kv,
        bmm1_scale=spec.scale,
        bmm2_scale=1.0,
        window_left=spec.window - 1 if spec.window else -1,
        kv_layout="HND",
    )
    return out.view(q.shape)


def flash_attn_3(q: Tensor, keys: Tensor, values: Tensor, step: Contexts, spec: AttentionSpec, max_kv: int) -> Tensor:
    from flash_attn_interface import flash_attn_with_kvcache

    own: dict[str, Any] = {
        "page_table": step.page_table,
        "cu_seqlens_q": step.query_start,
        "max_seqlen_q": step.max_query,
    }
    out: Tensor = flash_attn_with_kvcache(
        heads_of(q, spec),
        *(keys.transpose(1, 2), values.transpose(1, 2)),
        cache_seqlens=step.kv_lengths,
        **own | rules(spec),
    )
    return out.reshape(q.shape)


def flash_attn_2(q: Tensor, keys: Tensor, values: Tensor, step: Contexts, spec: AttentionSpec, max_kv: int) -> Tensor:
    """Decodes only: its chunks want lengths added up, which is another launch."""
    from flash_attn import flash_attn_with_kvcache

    out: Tensor = flash_attn_with_kvcache(
        heads_of(q, spec).unsqueeze(1),
        *(keys.transpose(1, 2), values.transpose(1, 2)),
        cache_seqlens=step.kv_lengths,
        block_table=step.page_table,
        **rules(spec),
    )
    return out.reshape(q.shape)


def heads_of(q: Tensor, spec: AttentionSpec) -> Tensor:
    return q.view(-1, spec.heads, spec.head_dim)


def rules(spec: AttentionSpec) -> dict[str, Any]:
    """What flash-attn calls a layer's rules."""
    window = (spec.window - 1, 0) if spec.window else (-1, -1)
    return {"softmax_scale": spec.scale, "causal": True, "window_size": window, "softcap": spec.softcap}


@cache
def workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


LIBRARIES = {
    "flashinfer": Library("flashinfer", False, 16, False, flashinfer),
    "flash-attn-3": Library("flash_attn_interface", True, 1, True, flash_attn_3),
    "flash-attn-2": Library("flash_attn", False, PAGE_OF_2, True, flash_attn_2),
}


def legal(spec: AttentionSpec, dtype: torch.dtype, page_size: int, chunks: bool = False) -> list[str]:
    """The libraries that can run these layers here."""
    return [name for name, library in LIBRARIES.items() if library.legal(spec, dtype, page_size, chunks)]
