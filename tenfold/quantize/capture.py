"""What experts see of a text, layer by layer: their inputs, how often they are picked, with what weight.

Every window of the text goes through one layer before any goes through the next, so what is kept of experts at a time
is that of one layer. The model runs as it is; nothing of it is rounded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from tenfold.cache.store import KVSpec, KVStore
from tenfold.models.decoder import Decoder
from tenfold.nn.step import Step
from tenfold.ops.matrix import Experts
from tenfold.ops.oracle import Oracle
from tenfold.quantize.gptq import Moments

SAMPLE = 512  # tokens of an expert that are kept as they are
LEAST_TOKENS = 256  # of a text that is worth capturing
PAGE = 64
T = TypeVar("T")


class TextTooShort(ValueError):
    """A calibration text that says too little: says how much there is and how much is wanted."""


@dataclass(slots=True)
class Seen:
    """Of one expert. picks: tokens that went to it, share: their weights together; inputs, inner: second moments of
    what gate and up, and down, multiply; sample [n, cols] and its weights [n]: tokens drawn from all alike, each with
    the number that was drawn for it.
    """

    inputs: Moments
    inner: Moments
    picks: int = 0
    share: float = 0.0
    sample: Tensor | None = None
    weights: Tensor | None = None
    drawn: Tensor | None = None
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, x: Tensor, inner: Tensor, weights: Tensor, worth: Tensor | None = None) -> None:
        """worth [n]: what each token counts in the moments, None for all alike."""
        self.inputs.add(x, worth)
        self.inner.add(inner, worth)
        self.picks += len(x)
        self.share += float(weights.sum())
        self._keep(x, weights.float(), torch.rand(len(x), generator=self.draw).to(x.device))

    def _keep(self, x: Tensor, weights: Tensor, drawn: Tensor) -> None:
        """Those of the sample and of these with the smallest numbers."""
        if self.sample is not None and self.weights is not None and self.drawn is not None:
            x, weights, drawn = (
                torch.cat(pair) for pair in ((self.sample, x), (self.weights, weights), (self.drawn, drawn))
            )
        if len(x) > SAMPLE:
            kept = drawn.topk(SAMPLE, largest=False).indices.sort().values
            x, weights, drawn = x[kept], weights[kept], drawn[kept]
        self.sample, self.weights, self.drawn = x, weights, drawn

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The sample and its weights; empty where the expert was never picked."""
        if self.sample is None or self.weights is None:
            return self.inputs.sums.new_zeros(0, len(self.inputs.sums)), self.inputs.sums.new_zeros(0)
        return self.sample, self.weights


class Watching(Oracle):
    """The oracle, which writes down what experts see while `seen` is a list. worth [T]: what each token of the step
    counts, None for all alike.
    """

    seen: list[Seen] | None = None
    worth: Tensor | None = None

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, own: Experts, residual: Tensor | None = None) -> Tensor:
        if self.seen is not None:
            for expert, watched in enumerate(self.seen):
                rows, slots = (ids == expert).nonzero(as_tuple=True)
                if len(rows):
                    inner = self.linear(x[rows], own.gate_up.each[expert], act=own.act)
                    worth = None if self.worth is None else self.worth[rows]
                    watched.add(x[rows], inner, weights[rows, slots], worth)
        return super().experts(x, ids, weights, own, residual)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly from all. Raises ValueError."""
    if most < 1:
        raise ValueError(f"{most} samples were asked for; allowed: from 1.")
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def watched(
    model: Decoder,
    kernels: Watching,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
    worth: Sequence[Tensor] | None = None,
) -> Iterator[tuple[int, list[Seen]]]:
    """Each layer with experts and what these saw of windows of token ids. progress(done, all): after each window of
    each layer. worth: what each token of a window counts [tokens], as pixels and words may differ. Raises TextTooShort.
    """
    config = model.config
    count = sum(map(len, windows))
    if config.experts is None:
        raise ValueError("The model has no experts; this quantises mixture-of-experts models.")
    if count < LEAST_TOKENS:
        raise TextTooShort(f"The calibration text has {count} tokens; give one of at least {LEAST_TOKENS}.")
    store = store_for(model, kernels, max(map(len, windows)))
    steps = [step_of([window], store, kernels.device) for window in windows]
    states: list[Tensor | None] = [None] * len(steps)
    device = kernels.device
    with torch.inference_mode():
        for layer in range(config.layers):
            sparse = config.experts.layers[layer]
            if sparse:
                hidden, inner, number = config.hidden_size, config.experts.size, config.experts.routing.experts
                kernels.seen = [Seen(Moments(hidden, device), Moments(inner, device)) for _ in range(number)]
            for i, step in enumerate(steps):
                kernels.worth = None if worth is None else worth[i]
                states[i] = model.part(step, states[i], range(layer, layer + 1))
                if progress is not None:
                    progress(layer * len(steps) + i + 1, config.layers * len(steps))
            seen, kernels.seen, kernels.worth = kernels.seen, None, None
            if sparse and seen is not None:
                yield layer, seen


def store_for(model: Decoder, kernels: Oracle, tokens: int, count: int = 1) -> KVStore:
    """Pages for so many sequences of so many tokens."""
    config = model.config
    spec = KVSpec(config.layers, config.kv_heads, config.head_dim, kernels.dtype, PAGE, one=config.latent is not None)
    return KVStore(spec, count * -(-tokens // PAGE), kernels.device)


def step_of(
    windows: Sequence[Sequence[int]], store: KVStore, device: torch.device, logits: Sequence[int] | None = None
) -> Step:
    """Whole sequences of one length, in the first pages of a store; the logits at these places of each, or of its
    last token.
    """
    count, size, length = len(windows), store.spec.page_size, len(windows[0])
    pages = -(-length // size)
    starts = torch.arange(count, device=device)
    places = torch.arange(length, dtype=torch.int32, device=device)
    wanted = torch.tensor([length - 1] if logits is None else list(logits), device=device)
    return Step(
        token_ids=torch.tensor([token for window in windows for token in window], dtype=torch.int64, device=device),
        positions=places.repeat(count),
        slots=(places + starts[:, None] * pages * size).flatten().to(torch.int32),
        page_table=torch.arange(count * pages, dtype=torch.int32, device=device).view(count, pages),
        query_start=torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device),
        kv_lengths=torch.full((count,), length, dtype=torch.int32, device=device),
        logits_rows=(wanted + starts[:, None] * length).flatten(),
        max_query=length,
        max_kv=length,
        kv=store,
    )
