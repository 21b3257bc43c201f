"""Chunks of new tokens over random pages, and attention of them by csrc/prefill.cu against the oracle."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.attention.decode import Workspace
from tenfold.ops.gpu import prefill
from tenfold.ops.gpu.prefill import ChunkPlan
from tests.ops.attention.cases import Case, make

ROUNDING = {torch.bfloat16: 1.6e-2, torch.float16: 3e-3}  # weights and results have 8 and 11 bits
SMS = 132


def chunks(
    device: str,
    lengths: Sequence[int],
    counts: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 128,
    **rest: Any,
) -> Case:
    shape: dict[str, Any] = {
        "heads": heads[0],
        "kv_heads": heads[1],
        "head_dim": head_dim,
        "page_size": 16,
        "device": device,
    }
    return make(lengths, counts, **(shape | {"dtype": torch.bfloat16} | rest))


def check(case: Case, plan: ChunkPlan, phi: Tensor | None = None, sms: int = SMS) -> int:
    """Result, log-sum-exp and repeated bits; rows computed again in one launch."""
    workspace = Workspace(case.q.device)
    expected, sums = case.expected()
    results = []
    for _ in range(2):
        out, lse = case.blank()
        prefill.run(
            *(plan, workspace.queue, sms, case.q, case.keys, case.values, case.page_table, case.query_start),
            *(case.kv_lengths, case.spec, max(case.counts)),
            recomputed=workspace.recomputed,
            phi=phi,
            lse=lse,
            out=out,
        )
        results.append(out)
        assert not workspace.queue.any()
        loose = ROUNDING[case.q.dtype]
        torch.testing.assert_close(out.float(), expected, atol=loose, rtol=loose)
        assert (lse - sums).abs().max() < 2e-2
    assert torch.equal(*results)
    return int(workspace.recomputed) // 2
