"""Attention of chunks of new tokens on Hopper's tensor cores, straight from the pages: csrc/prefill.cu."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, gcd

import torch
from torch import Tensor

from tenfold.ops.attention.unified_max import guard
from tenfold.ops.gpu import hopper, nvrtc
from tenfold.ops.kernels import SOFTMAX, AttentionSpec

ARMS = SOFTMAX[:3]  # the paper's guard on every score is not in this kernel
ORDERS = ("apart", "overlap", "turns")
HEAD_DIMS = (64, 128)
TILES = (64, 96, 128, 160)
LEAST_PAGE = 16  # tokens: two groups of the 8 rows that the swizzle permutes
LONG_CHUNK = 1536  # new tokens
OTHER_BYTES = 1024 + 512  # alignment; barriers and the item at work


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """groups: warpgroups of 64 queries each, 2 or 3, that share a tile; tile: tokens of context at a time, stages of
    them in flight. order: "apart", scores, weights and values one after the other; "overlap", a warpgroup's products
    run while it computes weights; "turns", and the warpgroups take turns. softmax: one of ARMS.
    """

    groups: int = 2
    tile: int = 128
    stages: int = 2
    order: str = "turns"
    softmax: str = "lazy"

    def __str__(self) -> str:
        return f"wgmma:{self.softmax}:{self.groups}x{self.tile}x{self.stages}:{self.order}"

    @property
    def rows(self) -> int:
        """Queries of a tile."""
        return 64 * self.groups


def parse(name: str) -> ChunkPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(rf"wgmma:({'|'.join(ARMS)}):([23])x(\d+)x(\d+):({'|'.join(ORDERS)})", name)
    if not found:
        raise ValueError(
            f"{name!r} is no plan of chunks; allowed: wgmma:SOFTMAX:GxTxS:ORDER, SOFTMAX of {', '.join(ARMS)}, "
            f"ORDER of {', '.join(ORDERS)}."
        )
    softmax, groups, tile, stages, order = found.groups()
    return ChunkPlan(int(groups), int(tile), int(stages), order, softmax)


def shared_bytes(plan: ChunkPlan, head_dim: int) -> int:
    """Dynamic shared memory of a block: queries, keys and values, barriers."""
    return OTHER_BYTES + (plan.rows + 2 * plan.stages * plan.tile) * head_dim * 2


def fits(plan: ChunkPlan, head_dim: int) -> bool:
    """Whether a block of the plan fits into a multiprocessor, its sums, scores and weights in registers."""
    apart = plan.order == "apart"
    taken = head_dim // 2 + plan.tile // 2 + (0 if apart else plan.tile // 4)  # weights stand beside the scores
    most = 184 if plan.groups == 2 else 128 if apart else 112  # of 232 and 160
    return plan.tile in TILES and plan.stages >= 2 and shared_bytes(plan, head_dim) <= hopper.SHARED and taken <= most


def legal(spec: AttentionSpec, dtype: torch.dtype, page_size: int) -> bool:
    """Whether the kernel can run these layers. Windows and capped scores are fine."""
    return dtype in nvrtc.HALF and spec.head_dim in HEAD_DIMS and page_size % LEAST_PAGE == 0 and spec.scale > 0


def runs_on(device: torch.device) -> bool:
    """Whether the device has the instructions: those of compute capability 9.0 alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == nvrtc.CAPABILITY


def rule(softmax: str = "lazy", max_query: int = LONG_CHUNK) -> ChunkPlan:
    """The plan where nothing was measured (H100, 2026-11-28). max_query: new tokens of the longest chunk; tall tiles
    read keys less often, and short chunks leave them half empty.
    """
    if max_query < LONG_CHUNK:
        return ChunkPlan(2, 128, 2, "overlap", softmax)
    return ChunkPlan(3, 128, 2, "apart", softmax)


# warpgroups, tokens of a tile, stages
WIDE = ((2, 128, 2), (2, 128, 3), (2, 96, 2), (2, 96, 3), (2, 160, 2), (2, 64, 4))
SHAPES = (*WIDE, (3, 64, 3), (3, 96, 2), (3, 128, 2))


def candidates(spec: AttentionSpec, softmax: Sequence[str] = ("lazy",)) -> Iterator[ChunkPlan]:
    """Plans worth timing: the rule's with every softmax, then other shapes with the first."""
    for arm in softmax:
        yield rule(arm)
    for groups, tile, stages in SHAPES:
        for order in reversed(ORDERS):
            plan = ChunkPlan(groups, tile, stages, order, softmax[0])
            slow = order == "apart" and tile != 128
            if plan != rule(softmax[0]) and not slow and fits(plan, spec.head_dim):
                yield plan


@cache
def defines(plan: ChunkPlan, spec: AttentionSpec, dtype: torch.dtype, page_size: int) -> tuple[tuple[str, int], ...]:
    """The macros that the kernel is compiled with."""
    return (
        ("HALF", nvrtc.HALF[dtype]),
        ("D", spec.head_dim),
        ("PAGE", page_size),
        ("BOX", gcd(page_size, plan.tile)),
        ("TILE", plan.tile),
        ("WGS", plan.groups),
        ("STAGES", plan.stages),
        ("SOFTMAX", ARMS.index(plan.softmax)),  # the kernel knows them by this order
        ("OVERLAP", int(plan.order != "apart")),
        ("PING", int(plan.order == "turns")),
        ("WINDOW", int(spec.window > 0)),
        ("CAP", int(spec.softcap > 0)),
    )


def run(
    plan: ChunkPlan,
    queue: Tensor,
    sms: int,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lengths: Tensor,
    spec: AttentionSpec,
    max_query: int,
    *,
    recomputed: Tensor,
    phi: Tensor | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `attention.prefill.run` for what is `legal`, with q in the type of the keys. queue [2] int32: zeros before and
    after a launch; launches that share it follow each other on one stream. A tile of which phi did not serve a row is
    computed again as a whole; recomputed counts the rows that were not served.
    """
    out = torch.empty_like(q) if out is None else out
    requests = len(kv_lengths)
    if requests == 0 or max_query == 0:
        return out
    if phi is None and plan.softmax == "unified":
        plan = replace(plan, softmax="lazy")
    macros = defines(plan, spec, keys.dtype, keys.shape[2])
    kernel = nvrtc.load("prefill.cu", "prefill", macros)
    box = gcd(keys.shape[2], plan.tile)
    safe = guard(keys.dtype)
    items = requests * spec.heads * ceil(max_query / plan.rows)
    maps = (nvrtc.tensor_map(q.view(len(q), -1), 64), nvrtc.tensor_map(keys, box), nvrtc.tensor_map(values, box))
    kernel(
        (min(items, sms), 1, 1),
        128 * (plan.groups + 1),
        shared_bytes(plan, spec.head_dim),
        [
            *(*maps, page_table, query_start, kv_lengths, phi, out, lse, recomputed, queue),
            *(float(spec.scale), float(spec.softcap), 2.0**safe.least, 2.0**safe.most),
            *(requests, page_table.stride(0), spec.heads, spec.heads // spec.kv_heads, len(keys), spec.window),
        ],
    )
    return out
