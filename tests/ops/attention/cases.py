"""Random attention inputs over a shuffled paged cache, and what the oracle makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.oracle import Oracle


@dataclass(frozen=True)
class Case:
    """counts, lengths: new tokens and whole context of each request. Slots that nobody owns hold NaN."""

    spec: AttentionSpec
    q: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def phi(self) -> Tensor:
        return torch.zeros(self.spec.heads, device=self.q.device)

    def blank(self) -> tuple[Tensor, Tensor]:
        """Poisoned output and log-sum-exp."""
        shape = (self.q.shape[0], self.spec.heads)
        return torch.full_like(self.q, float("nan")), torch.full(shape, float("nan"), device=self.q.device)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The oracle's output and log-sum-exp in float32; of idle requests zeros and -inf."""
        _, lse = self.blank()
        out = torch.zeros_like(self.q, dtype=torch.float32)
        lse = torch.full_like(lse, float("-inf"))
        busy = [r for r, length in enumerate(self.lengths) if length]
        rows = [t for r in busy for t in range(int(self.query_start[r]), int(self.query_start[r + 1]))]
        counts = [self.counts[r] for r in busy]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=self.q.device)
        part = torch.empty(len(rows), self.spec.heads, device=self.q.device)
        out[rows] = Oracle(self.q.device).attend(
            self.q[rows].float(),
            self.keys.float(),
            self.values.float(),
            self.page_table[busy],
            starts,
            self.kv_lengths[busy],
            self.spec,
            max(counts),
            max(self.lengths),
            part,
        )
        lse[rows] = part
        return out, lse


def make(
    lengths: Sequence[int],
    counts: Sequence[int] | None = None,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 8,
    window: int = 0,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    spread: float = 1.0,
) -> Case:
    """spread: standard deviation of the scores, about."""
    generator = torch.Generator().manual_seed(seed)
    counts = tuple(counts or (1,) * len(lengths))
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window, softcap)
    needed = [-(-length // page_size) for length in lengths]
    pages = sum(needed) + 2
    keys = torch.full((pages, kv_heads, page_size, head_dim), float("nan"))
    values = torch.full_like(keys, float("nan"))
    free = torch.randperm(pages, generator=generator).tolist()
    table = torch.zeros(len(lengths), max([1, *needed]) + 1, dtype=torch.int32)
    for r, length in enumerate(lengths):
        owned = [free.pop() for _ in range(needed[r])]
        table[r, : len(owned)] = torch.tensor(owned, dtype=torch.int32)
        for place in range(length):
            at = owned[place // page_size], slice(None), place % page_size
            keys[at] = torch.randn(kv_heads, head_dim, generator=generator)
            values[at] = torch.randn(kv_heads, head_dim, generator=generator)
    q = torch.randn(sum(counts), heads * head_dim, generator=generator) * spread
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    tensors = [q.to(dtype), keys.to(dtype), values.to(dtype), table, starts, torch.tensor(lengths, dtype=torch.int32)]
    return Case(spec, *(t.to(device) for t in tensors), counts, tuple(lengths))
