"""Steps over a KV store for tests: sequences of token ids become the flow objects a model runs on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenfold.cache.store import KVSpec, KVStore
from tenfold.models.config import ModelConfig
from tenfold.nn.step import Step


def make_store(
    config: ModelConfig | None = None,
    *,
    layers: int = 1,
    kv_heads: int = 1,
    head_dim: int = 16,
    pages: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> KVStore:
    """A store for a model, or of the sizes given, full of NaN, so that reading what was never written shows."""
    if config is not None:
        layers, kv_heads, head_dim = config.layers, config.kv_heads, config.head_dim
    spec = KVSpec(layers, kv_heads, head_dim, dtype, page_size)
    store = KVStore(spec, pages, torch.device(device))
    for tensor in (*store.keys, *store.values):
        tensor.fill_(float("nan"))
    return store


@dataclass
class Sequences:
    """Sequences growing in one store. Pages come in a shuffled order: neighbours in a sequence are none in memory."""

    store: KVStore
    pages: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        order = torch.randperm(self.store.pages, generator=torch.Generator().manual_seed(7))
        self.free = order.tolist()

    def step(self, chunks: dict[int, Sequence[int]], logits: str = "last") -> Step:
        """The next tokens of each sequence, in one Step. logits: "last" token of each, or "all"."""
        size, device = self.store.spec.page_size, self.store.keys[0].device
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths, wanted = [0], [], []
        for sequence, tokens in chunks.items():
            owned, begin = self.pages.setdefault(sequence, []), self.lengths.get(sequence, 0)
            end = begin + len(tokens)
            while len(owned) * size < end:
                owned.append(self.free.pop())
            ids += tokens
            positions += range(begin, end)
            slots += [owned[p // size] * size + p % size for p in range(begin, end)]
            starts.append(len(ids))
            lengths.append(end)
            wanted += range(starts[-2], starts[-1]) if logits == "all" else [starts[-1] - 1]
            self.lengths[sequence] = end
        width = max(len(self.pages[s]) for s in chunks)
        table = [self.pages[s] + [0] * (width - len(self.pages[s])) for s in chunks]

        def tensor(values: Sequence[int] | Sequence[list[int]], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return Step(
            token_ids=tensor(ids, torch.int64),
            positions=tensor(positions),
            slots=tensor(slots),
            page_table=tensor(table),
            query_start=tensor(starts),
            kv_lengths=tensor(lengths),
            logits_rows=tensor(wanted, torch.int64),
            max_query=max(len(tokens) for tokens in chunks.values()),
            max_kv=max(lengths),
            kv=self.store,
        )
