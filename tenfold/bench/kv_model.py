"""A model in float32 whose attention sees keys and values as a format would have stored them for each query.

One forward over a text gives what decoding it token by token would. What many sequences begin with is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tenfold.bench.kv_formats import STRIDE, Exact, Format, rotated
from tenfold.cache.skvq.attend import Seen, attend
from tenfold.cache.skvq.calibrate import Sample
from tenfold.cache.store import KVSpec, KVStore
from tenfold.engine.calibrate import Watching, step_of
from tenfold.models.table import Model, build_model, model_config
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Kernels
from tenfold.ops.oracle import Oracle
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint

QUERIES = 128  # that are computed together: they see no keys behind the last of them, and fit into a CPU's caches


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What sequences begin with: its tokens, a multiple of STRIDE, and of every layer four tensors [kv_heads, tokens,
    head_dim] float32: keys, rotated, and values, as computed, then both as stored.
    """

    tokens: int = 0
    layers: Sequence[tuple[Tensor, ...]] = ()


NOTHING = Prefix()


class Formatted(Watching):
    """Kernels whose attention sees the cache as `format` stores it, and shows its inputs to `watch`. A step is made of
    sequences, the tokens at `parts`, each of which follows `prefix`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(Oracle(device))
        self.format: Format = Exact()
        self.prefix = NOTHING
        self.parts: Sequence[slice] = ()
        self.watch: Callable[[int, Sample], None] = lambda layer, sample: None

    def attention(self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        layer = self.layers[keys.data_ptr()]
        return torch.cat([self._sequence(layer, qkv[part], heads, step.positions[part]) for part in self.parts])

    def _sequence(self, layer: int, qkv: Tensor, heads: Heads, positions: Tensor) -> Tensor:
        sample = Sample.of(qkv, heads, positions)
        self.watch(layer, sample)
        cache: tuple[Tensor, ...] = (*rotated(sample), *self.format.store(layer, sample))
        if self.prefix.tokens:
            cache = tuple(torch.cat(both, 1) for both in zip(self.prefix.layers[layer], cache))
        q = sample.q.unflatten(1, (heads.spec.kv_heads, -1)).permute(1, 2, 0, 3)
        parts = [slice(at, at + QUERIES) for at in range(0, len(qkv), QUERIES)]
        out = torch.cat([self._attend(layer, q[:, :, p], positions[p], p.stop, cache, heads.spec) for p in parts], 2)
        return out.permute(2, 0, 1, 3).reshape(len(qkv), -1)

    def _attend(
        self, layer: int, q: Tensor, positions: Tensor, stop: int, cache: tuple[Tensor, ...], spec: AttentionSpec
    ) -> Tensor:
        """Of queries that stand before token `stop` after the prefix."""
        keys, values, stored_keys, stored_values = (x[:, : self.prefix.tokens + stop] for x in cache)
        seen = Seen(stored_keys, stored_values, *self.format.old(layer, positions, keys.shape[1]))
        return attend(q, positions, keys, values, seen, spec)


class Bench:
    """A model whose cache is of any format, for sequences of up to `length` tokens."""

    def __init__(self, path: Path, length: int, device: torch.device | str = "cpu") -> None:
        self.checkpoint = open_checkpoint(path)
        self.config = model_config(self.checkpoint.config)
        self.tokenizer = self.checkpoint.tokenizer()
        self.device = torch.device(device)
        self.kernels = Formatted(self.device)
        weights = Weights(self.checkpoint, cast(Kernels, self.kernels), self.device, mode="dense")
        self.model: Model = build_model(self.checkpoint.config, weights, length)
        c = self.config
        # Nothing is read from the store; its one page only tells the layers apart.
        self.store = KVStore(KVSpec(c.layers, c.kv_heads, c.head_dim, torch.float32, 1), 1, self.device)
        self.kernels.know(self.store)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def logits(self, ids: Sequence[int], format: Format, rows: Sequence[int]) -> Tensor:
        """[len(rows), vocabulary] float32, of the tokens at rows."""
        return self.follow(NOTHING, [ids], format, rows)

    def follow(self, prefix: Prefix, pieces: Sequence[Sequence[int]], format: Format, rows: Sequence[int]) -> Tensor:
        """The same of sequences that each go on after the prefix; rows count through all pieces."""
        places: list[int] = []
        parts: list[slice] = []
        flat: list[int] = []
        for piece in pieces:
            places += range(prefix.tokens, prefix.tokens + len(piece))
            parts.append(slice(len(flat), len(flat) + len(piece)))
            flat += piece
        kernels = self.kernels
        kernels.format, kernels.prefix, kernels.parts = format, prefix, parts
        positions = torch.tensor(places, dtype=torch.int32, device=self.device)
        wanted = torch.tensor(list(rows), device=self.device)
        step = replace(step_of(flat, self.store, 1), positions=positions, logits_rows=wanted)
        with torch.inference_mode():
            return self.model.forward(step).float()

    def run(self, ids: Sequence[int], watch: Callable[[int, Sample], None], format: Format | None = None) -> None:
        """Show every layer's attention to `watch`, the cache being exact where no format is given."""
        self.kernels.watch = watch
        try:
            self.logits(ids, format or Exact(), [len(ids) - 1])
        finally:
            self.kernels.watch = lambda layer, sample: None

    def begin(self, ids: Sequence[int], format: Format) -> Prefix:
        """What `follow` goes on from. Raises ValueError."""
        if not ids or len(ids) % STRIDE:
            raise ValueError(f"A prefix of {len(ids)} tokens was asked for; allowed: multiples of {STRIDE}.")
        layers: list[tuple[Tensor, ...]] = []
        self.run(ids, lambda layer, s: layers.append((*rotated(s), *format.store(layer, s))), format)
        return Prefix(len(ids), layers)
