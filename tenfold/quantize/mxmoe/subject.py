"""A model whose experts are rounded and made exact again, what rounding them costs, and what a plan of schemes is."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, starmap
from typing import Any

import torch
from torch import Tensor

from tenfold.models.table import build_model
from tenfold.ops.matrix import Bank
from tenfold.quantize.awq import STRENGTHS, of_strength, scales
from tenfold.quantize.capture import Seen, Watching, spread, step_of, store_for, watched
from tenfold.quantize.gptq import gptq
from tenfold.quantize.mxmoe.allocate import Allocator, Block, Plan, budgets, joined
from tenfold.quantize.mxmoe.sensitivity import PARTS, losses
from tenfold.quantize.schemes import Scheme, parse, round_to_nearest
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.load import Weights

METHODS = ("gptq", "awq", "rtn")
LONGEST = 4096  # tokens of a window at most
AS_MANY = 64  # tokens of the layer's average that an expert's own are mixed with
LOGITS = 1 << 25  # numbers at a time, 128 MiB
ENDED = 16  # windows that what layers cost in the end is measured on
COARSE = 4.25  # bits at most of what layers are rounded to for that, so that it stands out
EVERY = 4  # tokens of which one's distribution is compared in the end
HELD = 1 << 28  # numbers of exact distributions, 1 GiB
Key = tuple[int, int, str]  # layer, expert, part
TIES = {"block": 3, "expert": 2, "layer": 1}  # parts of a block's name that blocks of one scheme share
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Rounded:
    """What was measured of a model: weights of each block by scheme, their losses, how many numbers they have, how many
    picks each expert of each layer had, the strength of the scales that its gates and ups have in common, and the
    columns of each part.
    """

    weights: dict[tuple[Key, str], Tensor] = field(default_factory=dict)
    losses: dict[tuple[Key, str], float] = field(default_factory=dict)
    sizes: dict[Key, int] = field(default_factory=dict)
    picks: dict[int, list[int]] = field(default_factory=dict)
    strengths: dict[int, float] = field(default_factory=dict)
    cols: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Steps:
    """Progress of a pass in which windows go through layers, as `watched` tells it, and other work is done between,
    such as rounding. told(done, all) is given the sum of both.
    """

    told: Progress
    all: int
    windows: int = 0
    others: int = 0

    def __call__(self, done: int, total: int) -> None:
        self.windows = done
        self.told(self.windows + self.others, self.all)

    def add(self, count: int = 1) -> None:
        """So many steps more of other work."""
        self.others += count
        self.told(self.windows + self.others, self.all)


def name_of(key: Key) -> str:
    return f"{key[0]}.{key[1]}.{key[2]}"


class Subject:
    """A model in float32 or another dense type, whose experts are rounded and made exact again. Raises ValueError for
    one without experts.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.kernels = Watching(device, dtype)
        self.checkpoint = checkpoint
        self.weights = Weights(checkpoint, self.kernels, device, dtype, "dense")
        self.model: Any = build_model(checkpoint.config, self.weights, LONGEST)
        experts = self.model.config.experts
        if experts is None or not any(experts.layers):
            raise ValueError(f"{checkpoint.path} has no experts; name a mixture-of-experts model.")
        self.layers = [i for i, has in enumerate(experts.layers) if has]
        self.blocks = {key: bank.each[key[1]] for key, bank in self._blocks()}
        self.cols = {key[2]: matrix.cols for key, matrix in self.blocks.items()}  # by part
        self.sizes = {key: matrix.rows * matrix.cols for key, matrix in self.blocks.items()}
        self._exact: dict[Key, Tensor] = {}  # of the blocks that are rounded

    def exact(self, key: Key) -> Tensor:
        """A block as the checkpoint has it [rows, cols]."""
        return self._exact[key] if key in self._exact else self.blocks[key].data[0]

    def names(self, key: Key) -> list[str]:
        """Names of the matrices whose rows one after the other make a block."""
        layer, expert, part = key
        _, names = self.weights.banks[2 * self.layers.index(layer) + PARTS.index(part)]
        return list(names[expert])

    def _blocks(self) -> list[tuple[Key, Bank]]:
        found = []
        for layer, own in zip(self.layers, self.model.experts):
            for part, bank in zip(PARTS, (own.gate_up, own.down)):
                found += [((layer, expert, part), bank) for expert in range(len(own))]
        return found

    def bits(self, scheme: Scheme) -> float:
        """Of a weight of experts that all have one scheme, scales and zeros included."""
        total = sum(size * scheme.stored_bits(self.cols[key[2]]) for key, size in self.sizes.items())
        return total / sum(self.sizes.values())

    def put(self, weights: Mapping[Key, Tensor]) -> None:
        """These blocks rounded, all others exact."""
        for key in [key for key in self._exact if key not in weights]:
            self.blocks[key].data[0].copy_(self._exact.pop(key))
        for key, rounded in weights.items():
            self._exact.setdefault(key, self.blocks[key].data[0].clone())
            self.blocks[key].data[0].copy_(rounded)

    def tokens(self, text: str, length: int, windows: int) -> list[list[int]]:
        ids = self.checkpoint.tokenizer().encode(text, add_special_tokens=False).ids
        found = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return spread(found, windows)

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        total = sum(surprise(window, logs) for window, logs in zip(windows, self.logs(windows)))
        return math.exp(total / sum(len(window) - 1 for window in windows))

    def logs(self, windows: Sequence[Sequence[int]], every: int = 1) -> Iterator[Tensor]:
        """Log-probabilities of what follows, of each window [tokens, vocab] float32; of one of so many tokens."""
        longest = max(map(len, windows))
        most = max(1, LOGITS // (longest * self.model.config.vocab_size))
        store = store_for(self.model, self.kernels, longest, min(most, len(windows)))
        with torch.inference_mode():
            for own in alike(windows, most):
                places = range(0, len(own[0]), every)
                logits = self.model.forward(step_of(own, store, self.kernels.device, places))
                yield from logits.log_softmax(-1).split(len(places))

    def measure(
        self,
        found: Rounded,
        windows: Sequence[Sequence[int]],
        schemes: Mapping[str, Sequence[Scheme]],
        method: str,
        keep: Collection[str] | None = None,
        steps: Steps | None = None,
        budget: float = COARSE,
    ) -> Iterator[int]:
        """What each scheme costs each block, into `found`, layer by layer; layers that it has are passed over. schemes:
        that each part may get; method: one of METHODS; keep: schemes whose rounded weights are kept too, None for all.
        steps: windows of all layers, and `roundings`. budget: bits of a weight, near which a layer's scales are sought.
        """
        steps = steps or Steps(lambda done, total: None, 0)
        found.cols.update(self.cols)
        about = scaled_for(schemes["gate_up"], self.model.config.hidden_size, budget)
        for layer, seen in watched(self.model, self.kernels, windows, steps):
            if layer in found.picks:
                steps.add(len(seen) * roundings(schemes))
                continue
            by = None
            if method == "awq":
                found.strengths[layer] = self.strength(layer, seen, about)
                by = of_strength(average(seen, "gate_up"), found.strengths[layer])
            for expert, (own, moments) in enumerate(zip(seen, moments_of(seen))):
                self._measure_expert(found, (layer, expert), own, moments, schemes, method, keep, by, steps)
            found.picks[layer] = [own.picks for own in seen]
            yield layer

    def strength(self, layer: int, seen: Sequence[Seen], scheme: Scheme) -> float:
        """Of the scales that all that reads a layer's norm has in common, so the gates and ups of all its experts: the
        one of STRENGTHS that changes the layer's output least, over all tokens, with these rounded by a scheme.
        """
        act, schemes = self.model.config.activation, {"gate_up": [scheme], "down": []}
        tried = {strength: of_strength(average(seen, "gate_up"), strength) for strength in STRENGTHS}
        total = dict.fromkeys(STRENGTHS, 0.0)
        for expert, own in enumerate(seen):
            gate_up, down = (self.exact((layer, expert, part)).float() for part in PARTS)
            for strength, by in tried.items() if own.picks else ():
                found = losses(
                    divided(own, by), gate_up * by, down, act, schemes, lambda w, s, _: round_to_nearest(w, s)
                )
                total[strength] += found["gate_up", str(scheme)]
        return min(total, key=total.__getitem__)

    def _measure_expert(
        self,
        found: Rounded,
        at: tuple[int, int],
        seen: Seen,
        moments: Mapping[str, Tensor],
        schemes: Mapping[str, Sequence[Scheme]],
        method: str,
        keep: Collection[str] | None,
        by: Tensor | None,
        steps: Steps,
    ) -> None:
        """by [cols]: what columns of gate and up are multiplied by, and their inputs divided."""
        exact = {part: self.exact((*at, part)).float() for part in PARTS}
        if by is not None:
            exact["gate_up"], seen = exact["gate_up"] * by, divided(seen, by)
        pairs, made = [(part, scheme) for part in PARTS for scheme in schemes[part]], {}
        for part, scheme in pairs:
            made[part, str(scheme)] = rounded(exact[part], moments[part], scheme, method, part)
            steps.add()
        act = self.model.config.activation
        lost = losses(seen, exact["gate_up"], exact["down"], act, schemes, lambda w, s, part: made[part, str(s)])
        for (part, name), loss in lost.items():
            key = (*at, part)
            found.losses[key, name] = loss
            found.sizes[key] = exact[part].numel()
            if keep is None or name in keep:
                rounding = made[part, name]
                found.weights[key, name] = rounding / by if by is not None and part == "gate_up" else rounding


def roundings(schemes: Mapping[str, Sequence[Scheme]]) -> int:
    """Of one expert, to measure these schemes of its parts."""
    return sum(len(schemes[part]) for part in PARTS)


def alike(windows: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Runs of windows of one length, at most so many together."""
    for _, run in groupby(windows, key=len):
        own = list(run)
        yield from (own[i : i + most] for i in range(0, len(own), most))


def moments_of(seen: Sequence[Seen]) -> list[dict[str, Tensor]]:
    """Second moments of the inputs of each expert's parts; few inputs lean on those of the layer's other experts."""
    averages = {part: average(seen, part) for part in PARTS}
    return [
        {
            "gate_up": own.inputs.shrunk(averages["gate_up"], AS_MANY),
            "down": own.inner.shrunk(averages["down"], AS_MANY),
        }
        for own in seen
    ]


def average(seen: Sequence[Seen], part: str) -> Tensor:
    """Second moments over all experts of a layer."""
    every = [own.inputs if part == "gate_up" else own.inner for own in seen]
    return torch.stack([m.sums for m in every]).sum(0) / max(1, sum(m.count for m in every))


def divided(seen: Seen, by: Tensor) -> Seen:
    """An expert's tokens as they come from a norm that is divided; its moments stay as they were."""
    return seen if seen.sample is None else replace(seen, sample=seen.sample / by)


def scaled_for(schemes: Sequence[Scheme], cols: int, budget: float) -> Scheme:
    """The one near a budget of bits."""
    by_name = {str(scheme): scheme for scheme in schemes}
    return by_name[middle({name: scheme.stored_bits(cols) for name, scheme in by_name.items()}, budget)]


def rounded(w: Tensor, moments: Tensor, scheme: Scheme, method: str, part: str) -> Tensor:
    """What a part's matrix becomes by one of METHODS, float32. Scales of awq are those of down, and what they do to up
    is not seen in its rounding; those of gate and up are in w.
    """
    if method == "gptq":
        return gptq(w, moments, scheme)
    if method == "awq" and part == "down":
        by = scales(w, moments, scheme)
        return round_to_nearest(w * by, scheme) / by
    return round_to_nearest(w, scheme)


def surprise(window: Sequence[int], logs: Tensor) -> float:
    """Negative log-likelihood of a window after its first token, nats; logs [tokens, vocab]."""
    following = torch.tensor(window[1:], device=logs.device)
    return -float(logs[:-1].gather(1, following[:, None]).sum())


def apart(exact: Tensor, logs: Tensor) -> float:
    """Sum of the Kullback-Leibler divergences from exact log-probabilities [tokens, vocab]; never below zero."""
    return max(0.0, float((exact.exp() * (exact - logs)).sum()))


class End:
    """What rounding costs at the model's end: how far the distributions of tokens to follow are from the exact
    model's, of one token in EVERY of the windows, fewer where distributions would not fit into HELD numbers. Made while
    all of the subject is exact.
    """

    def __init__(self, subject: Subject, windows: Sequence[Sequence[int]]) -> None:
        self.subject, self.windows = subject, windows
        numbers = sum(map(len, windows)) * subject.model.config.vocab_size
        self.every = max(EVERY, -(-numbers // HELD))
        self.exact = list(subject.logs(windows, self.every))

    def divergence(self) -> float:
        """Kullback-Leibler, nats a token, of the subject as it is now."""
        pairs = zip(self.exact, self.subject.logs(self.windows, self.every))
        return sum(starmap(apart, pairs)) / sum(map(len, self.exact))

    def judge(self) -> tuple[float, float]:
        """Perplexity of the windows, and the divergence, of the subject as it is now."""
        lost = far = 0.0
        for window, exact, logs in zip(self.windows, self.exact, self.subject.logs(self.windows)):
            lost += surprise(window, logs)
            far += apart(exact, logs[:: self.every])
        tokens = sum(len(window) - 1 for window in self.windows)
        return math.exp(lost / tokens), far / sum(map(len, self.exact))

    def slope(self, found: Rounded, layer: int, schemes: Mapping[str, str]) -> float:
        """The divergence where all experts of a layer have these schemes, by part, for each unit of their losses;
        everything is exact after it. Both are squares of what the layer's output changes by, so their ratio tells
        layers apart by what comes behind them, whatever the scheme.
        """
        own = {key: schemes[key[2]] for key in found.sizes if key[0] == layer}
        loss = sum(found.losses[key, scheme] for key, scheme in own.items())
        self.subject.put({key: found.weights[key, scheme] for key, scheme in own.items()})
        divergence = self.divergence()
        self.subject.put({})
        return divergence / loss if loss else 0.0


def middle(bits: Mapping[str, float], budget: float) -> str:
    """The scheme of about so many bits, and no more than COARSE, that tells what a layer costs in the end."""
    return min(bits, key=lambda name: abs(bits[name] - min(budget, COARSE)))


def blocks_of(
    found: Rounded,
    schemes: Collection[str],
    scope: str,
    norm: bool,
    slope: Mapping[int, float] | None = None,
    times: Mapping[tuple[Key, str], float] | None = None,
) -> list[Block]:
    """Blocks of the allocator. schemes: that they may get; scope: "layer" or "model"; norm: losses as the paper adds
    them up, not squared; slope of each layer, of `End`; times of blocks, with the schemes that they may get, else the
    bits that are read, in experts that are picked as often as here.
    """
    made = []
    for key, size in sorted(found.sizes.items()):  # in one order, whether an earlier run measured some or none
        layer, expert, part = key
        own = {
            name: found.losses[key, name] * (slope[layer] if slope else 1.0)
            for name in schemes
            if (key, name) in found.losses and (times is None or (key, name) in times)
        }
        bits = {name: size * parse(name).stored_bits(found.cols[part]) for name in own}
        often = found.picks[layer][expert] / max(1, sum(found.picks[layer]))
        made.append(
            Block(
                name_of(key),
                size,
                {name: each / 8 for name, each in bits.items()},
                {name: math.sqrt(loss) if norm else loss for name, loss in own.items()},
                {name: often * bits[name] if times is None else times[key, name] for name in own},
                f"layer {layer}" if scope == "layer" else "",
            )
        )
    return made


def mixed(
    found: Rounded,
    schemes: Collection[str],
    budget: float,
    scope: str,
    tie: str,
    norm: bool,
    r: float,
    slope: Mapping[int, float] | None = None,
) -> Plan:
    """The best plan at so many bits; the rest as of `blocks_of` and `mixed_front`."""
    return solved(blocks_of(found, schemes, scope, norm, slope), budget, tie, r)


def solved(blocks: Sequence[Block], budget: float, tie: str, r: float) -> Plan:
    """The best plan at so many bits. tie: what has one scheme, each "block", "expert" or "layer"."""
    solver, names = _tied(blocks, tie)
    return _untied(solver.solve(budgets(solver.blocks, budget), r), names)


def mixed_front(blocks: Sequence[Block], budget: float, tie: str, r: float) -> list[Plan]:
    """The best plan at so many bits, and behind it the front, of which it is one point; tie as of `solved`."""
    solver, names = _tied(blocks, tie)
    own = budgets(solver.blocks, budget)
    plan = solver.solve(own, r)
    return [_untied(each, names) for each in (plan, *solver.front(own, plan))]


def _tied(blocks: Sequence[Block], tie: str) -> tuple[Allocator, dict[str, str]]:
    """An allocator of what has one scheme each, and in which of them each block is."""
    names = {block.name: ".".join(block.name.split(".")[: TIES[tie]]) for block in blocks}
    return Allocator(joined(blocks, names)), names


def _untied(plan: Plan, names: Mapping[str, str]) -> Plan:
    return Plan({name: plan.schemes[whole] for name, whole in names.items()}, plan.loss, plan.time, plan.bytes)


def chosen(found: Rounded, schemes: Mapping[str, str]) -> dict[Key, Tensor]:
    return {key: found.weights[key, schemes[name_of(key)]] for key in found.sizes}
