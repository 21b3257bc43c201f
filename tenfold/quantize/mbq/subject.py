"""A model tried out on samples: its batches, the matrices of its layers, its loss, and how often it is right."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.cache.store import KVStore
from tenfold.models.picture import Picture
from tenfold.models.table import build_model
from tenfold.nn.attention import Attention
from tenfold.nn.linear import Linear
from tenfold.nn.mlp import MLP
from tenfold.nn.step import Seen, Step
from tenfold.quantize.capture import step_of, store_for
from tenfold.quantize.mbq.data import Sample, ordered
from tenfold.quantize.mbq.trial import Swap, Trial
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.load import Weights

TOKENS = 1 << 13  # of a batch, padding included
KINDS = ("vision", "answer", "said", "rest")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples one after the other, each padded at its end to the same length. real, vision, answer [T] bool: tokens
    that are no padding, that show pictures, and that are answers. said [T] bool: tokens after which an answer's token
    is said, so the prompt's last one and not the answer's; rest [T] bool: what is neither said nor vision.

    targets [L] int64: tokens to be said at the step's rows of logits; whose [L] int64: samples of these.
    """

    step: Step
    samples: int
    real: Tensor
    vision: Tensor
    answer: Tensor
    said: Tensor
    targets: Tensor
    whose: Tensor

    @property
    def rest(self) -> Tensor:
        return self.real & ~self.vision & ~self.said

    def mean(self, values: Tensor, kind: str) -> Tensor:
        """[samples]: of values [T] over the tokens of a kind; NaN where a sample has none."""
        mask = getattr(self, kind).view(self.samples, -1)
        sums = (values.view(self.samples, -1).double() * mask).sum(-1)
        return sums / mask.sum(-1)


@dataclass(frozen=True, slots=True)
class Score:
    """Of answers: mean negative log-likelihood a token, mean over samples, and the share of samples whose greedy answer
    is the wanted one to the last token.
    """

    loss: float
    accuracy: float


class Subject:
    """A dense model whose matrices can be rounded in their place. Raises ValueError for one with experts, or whose
    layers are not a norm, attention, a norm and an MLP.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        longest: int = 8192,
    ) -> None:
        self.checkpoint = checkpoint
        self.kernels = Trial(device, dtype)
        self.weights = Weights(checkpoint, self.kernels, device, dtype, "dense")
        self.model = model = cast(Any, build_model(checkpoint.config, self.weights, longest))
        self.longest = longest
        self._features: dict[bytes, Tensor] = {}
        if not all(
            isinstance(getattr(block, "attention", None), Attention)
            and isinstance(getattr(block, "mlp", None), MLP)
            and hasattr(block, "mlp_norm")
            for block in model.blocks
        ):
            raise ValueError(
                f"{checkpoint.path} has experts or layers of a kind of its own, which mbq, awq, smoothquant and rtn do "
                "not scale; mxmoe quantises models with experts, and awq or rtn do without --compare."
            )

    @property
    def layers(self) -> int:
        return len(self.model.blocks)

    def linear(self, layer: int, part: str) -> Linear:
        """part: qkv, out, gate_up or down."""
        block = self.model.blocks[layer]
        owner = block.attention if part in ("qkv", "out") else block.mlp
        found: Linear = getattr(owner, part)
        return found

    def weight(self, layer: int, part: str) -> Tensor:
        return self.kernels.dense(self.linear(layer, part).weight)

    @cached_property
    def store(self) -> KVStore:
        """Of a page, which nothing is written to."""
        return store_for(self.model, self.kernels, 1)

    def features(self, picture: Picture) -> Tensor:
        if picture.key not in self._features:
            with torch.no_grad():
                self._features[picture.key] = self.model.tower.encode(picture)
        return self._features[picture.key]

    def batches(self, samples: Sequence[Sample], tokens: int = TOKENS) -> list[Batch]:
        """Of samples in an order of their own, those of like length together."""
        for sample in samples:
            if len(sample.tokens) > self.longest:
                raise ValueError(
                    f"A pair has {len(sample.tokens)} tokens; allowed: up to {self.longest}. Leave it out."
                )
        made: list[Batch] = []
        group: list[Sample] = []
        for sample in sorted(ordered(samples), key=lambda s: len(s.tokens)):
            if group and (len(group) + 1) * len(sample.tokens) > tokens:
                made.append(self.batch(group))
                group = []
            group.append(sample)
        return [*made, self.batch(group)] if group else made

    def batch(self, samples: Sequence[Sample]) -> Batch:
        device, length = self.kernels.device, max(len(sample.tokens) for sample in samples)
        count = len(samples) * length
        ids, positions = (
            torch.zeros(count, dtype=torch.int64),
            torch.arange(length, dtype=torch.int32).repeat(len(samples)),
        )
        real, vision, answer, said = (torch.zeros(count, dtype=torch.bool) for _ in range(4))
        rows: list[int] = []
        owners: list[int] = []
        features: list[Tensor] = []
        turns: list[Tensor] = []
        for i, sample in enumerate(samples):
            at, size = i * length, len(sample.tokens)
            ids[at : at + size] = torch.tensor(sample.tokens)
            positions[at : at + size] = torch.as_tensor(sample.positions, dtype=torch.int32)
            real[at : at + size] = True
            vision[at + torch.as_tensor(sample.places)] = True
            answer[at + sample.answer : at + size] = True
            rows += range(at + sample.answer - 1, at + size - 1)
            owners += [i] * (size - sample.answer)
            features += [self.features(picture) for picture in sample.pictures]
            if sample.turns is not None and len(sample.places):
                turns.append(torch.as_tensor(sample.turns, dtype=torch.int64))
        where = torch.tensor(rows, dtype=torch.int64)
        said[where] = True
        step = replace(
            step_of(ids.view(len(samples), length).tolist(), self.store, device),
            positions=positions.to(device),
            logits_rows=where.to(device),
            max_query=length,
            seen=self._seen(vision, features, turns) if features else None,
        )
        whose, targets = torch.tensor(owners, dtype=torch.int64), ids[where + 1]
        parts = (part.to(device) for part in (real, vision, answer, said, targets, whose))
        return Batch(step, len(samples), *parts)

    def _seen(self, vision: Tensor, features: Sequence[Tensor], turns: Sequence[Tensor]) -> Seen:
        device = self.kernels.device
        places = torch.cat(list(turns)).to(device) if turns else None
        return Seen(vision.nonzero()[:, 0].to(device), torch.cat(list(features)), places)

    def losses(self, batch: Batch, logits: Tensor) -> Tensor:
        """[samples]: the mean over a sample's answer tokens."""
        each = F.cross_entropy(logits, batch.targets, reduction="none")
        sums = each.new_zeros(batch.samples).index_add(0, batch.whose, each)
        return sums / each.new_zeros(batch.samples).index_add(0, batch.whose, torch.ones_like(each))

    def score(self, batches: Sequence[Batch], swaps: Mapping[int, Swap] | None = None) -> Score:
        """With these matrices rounded."""
        total, right, count = 0.0, 0, 0
        with torch.inference_mode(), self.swapped(swaps or {}):
            for batch in batches:
                logits = self.model.forward(batch.step)
                total += float(self.losses(batch, logits).double().sum())
                wrong = (logits.argmax(-1) != batch.targets).long()
                missed = torch.zeros(batch.samples, dtype=torch.int64, device=wrong.device)
                right += int((missed.index_add(0, batch.whose, wrong) == 0).sum())
                count += batch.samples
        return Score(total / count, right / count)

    @contextmanager
    def swapped(self, swaps: Mapping[int, Swap]) -> Iterator[None]:
        """With these matrices rounded, and no others."""
        self.kernels.swaps = swaps
        try:
            yield
        finally:
            self.kernels.swaps = {}

    def walk(
        self, batches: Sequence[Batch], visit: Callable[[int, Sequence[Tensor]], Mapping[int, Swap] | None]
    ) -> None:
        """visit(layer, states): with what goes into each layer, [T, hidden] of each batch. What it gives back is in
        place of the layer's matrices for all that comes after it.
        """
        with torch.inference_mode():
            states = [self.model._embedded(batch.step) for batch in batches]
            for layer in range(self.layers):
                swaps = visit(layer, states)
                if layer + 1 < self.layers:
                    only = range(layer, layer + 1)
                    with self.swapped(swaps or {}):
                        states = [self.model.part(b.step, state, only) for b, state in zip(batches, states)]
