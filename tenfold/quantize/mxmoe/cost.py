"""What blocks of each scheme cost in time: measured on the GPU that the model is quantised on, by the same table of
choices that engines go by, else the bytes that reading them takes.

One launch multiplies a part of all experts of a layer in tiles of so many picks by so many rows of weights, one shape
for all, whatever each expert is stored in. A block costs the tiles that its picks fill, times what a tile of its scheme
takes, over the tiles that the GPU multiplies at a time. What a tile takes comes from launches that were measured with
all experts in one scheme: their time, shared out among the tiles that they had. How long a launch of several schemes
takes is told by dealing its tiles out, longest first, which is how kernels order experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from math import inf
from typing import TYPE_CHECKING

import torch

from tenfold.models.config import ModelConfig
from tenfold.ops import tiles
from tenfold.quantize.mxmoe.front import READ
from tenfold.quantize.mxmoe.sensitivity import PARTS
from tenfold.quantize.mxmoe.subject import Key, name_of
from tenfold.quantize.schemes import Scheme, format_of_scheme

if TYPE_CHECKING:  # Triton is there on GPU machines only
    from tenfold.ops.gpu.expert_arms import ExpertArms
    from tenfold.ops.gpu.experts_packed import PackedExpertsPlan
    from tenfold.ops.gpu.tune import Timer


@dataclass(frozen=True, slots=True)
class Shape:
    """Tiles of one launch. width: picks; height: rows of weights; at_once: tiles that the GPU multiplies at a time;
    steps: microseconds of 128 columns of a tile by scheme, of those that such tiles can have.
    """

    width: int
    height: int
    at_once: int
    steps: Mapping[str, float]

    def __str__(self) -> str:
        return f"tiles of {self.width} picks by {self.height} rows"

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Of a matrix: tiles down, and steps of 128 columns across."""
        return -(-rows // self.height), -(-cols // tiles.COLS)


@dataclass(frozen=True, slots=True)
class Launches:
    """What layers of experts are given in one step. sizes: rows and columns of a part; chances: of each expert of a
    layer, that a token picks it.
    """

    sizes: Mapping[str, tuple[int, int]]
    tokens: int
    chances: Mapping[int, Sequence[float]]

    def times(self, shape: Shape) -> dict[tuple[Key, str], float]:
        """Microseconds that each block adds with each scheme, where tiles are dealt out evenly."""
        found: dict[tuple[Key, str], float] = {}
        for layer, chances in self.chances.items():
            for expert, count in enumerate(filled(self.tokens, chances, shape.width)):
                for part, size in self.sizes.items():
                    down, across = shape.grid(*size)
                    steps = count * down * across / shape.at_once
                    found |= {((layer, expert, part), name): steps * each for name, each in shape.steps.items()}
        return found

    def time(self, shape: Shape, schemes: Mapping[str, str]) -> float:
        """Microseconds of all launches with the scheme of each block, by its name."""
        total = 0.0
        for layer, chances in self.chances.items():
            counts = whole(filled(self.tokens, chances, shape.width))
            for part, size in self.sizes.items():
                down, across = shape.grid(*size)
                steps = [shape.steps[schemes[name_of((layer, e, part))]] for e in range(len(counts))]
                total += makespan([(across * each, n * down) for each, n in zip(steps, counts)], shape.at_once)
        return total

    def uniform(self, shape: Shape, scheme: str) -> float:
        """`time` with one scheme for all."""
        blocks = ((layer, e, part) for layer, own in self.chances.items() for e in range(len(own)) for part in PARTS)
        return self.time(shape, dict.fromkeys(map(name_of, blocks), scheme))


def launches(config: ModelConfig, tokens: int, picks: Mapping[int, Sequence[int]]) -> Launches:
    """Of steps of so many tokens, whose experts are picked as often as these were, by layer."""
    own = config.experts
    assert own is not None
    sizes = dict(zip(PARTS, ((2 * own.size, config.hidden_size), (config.hidden_size, own.size))))
    top = own.routing.top
    chances = {layer: [min(1.0, top * n / max(1, sum(each))) for n in each] for layer, each in picks.items()}
    return Launches(sizes, tokens, chances)


def filled(tokens: int, chances: Sequence[float], width: int) -> list[float]:
    """Tiles of `width` picks that each expert fills on average, where each token picks it with its chance."""
    import numpy as np
    from scipy.stats import binom

    begun = np.arange(0, tokens, width)[:, None]  # a tile is begun with the pick behind those before it
    found: list[float] = binom.sf(begun, tokens, np.asarray(chances)).sum(0).tolist()
    return found


def whole(counts: Iterable[float]) -> list[int]:
    """Whole numbers that add up to as much, what is left of one going into the next."""
    found, total, dealt = [], 0.0, 0
    for count in counts:
        total += count
        found.append(round(total) - dealt)
        dealt = round(total)
    return found


def makespan(items: Iterable[tuple[float, int]], at_once: int) -> float:
    """When the last of items is done, each with its time and how many there are: the longest come first, each to
    whoever is free first (Graham's rule, at most a third longer than the best order).
    """
    order = sorted((item for item in items if item[1]), reverse=True)
    if len({time for time, _ in order}) == 1:
        return order[0][0] * -(-sum(n for _, n in order) // at_once)
    ends = [0.0] * at_once
    for time, n in order:
        for _ in range(n):
            heapreplace(ends, ends[0] + time)
    return max(ends)


def fastest(shapes: Sequence[Shape], own: Launches) -> list[Shape]:
    """Shapes that some scheme is the fastest with, each once."""
    names = dict.fromkeys(name for shape in shapes for name in shape.steps)
    best = (min((s for s in shapes if name in s.steps), key=lambda s: own.uniform(s, name)) for name in names)
    return [shapes[i] for i in dict.fromkeys(shapes.index(shape) for shape in best)]


def obstacle(config: ModelConfig, scheme: Scheme) -> str:
    """Why experts of a scheme cannot be timed, empty where they can."""
    assert config.experts is not None
    format = format_of_scheme(scheme)
    sizes = config.hidden_size, config.experts.size
    return tiles.obstacle(format) or next((why for cols in sizes if (why := format.obstacle(cols))), "")


def shapes(config: ModelConfig, schemes: Sequence[Scheme], tokens: int, device: str) -> tuple[list[Shape], str]:
    """For steps of so many tokens, and in words where their times are from. Empty where nothing can be measured here,
    and the words say why.
    """
    if not device.startswith("cuda"):
        return [], f"{READ}, since there is no GPU here to measure on"
    for scheme in schemes:
        if why := obstacle(config, scheme):
            return [], f"{READ}, since experts of {scheme} cannot be timed: {why}"
    from tenfold.ops.gpu import arms, expert_arms, timing

    place = torch.device(device)
    name, sms = torch.cuda.get_device_name(place), torch.cuda.get_device_properties(place).multi_processor_count
    running = expert_arms.ExpertArms(arms.table(name), sms)
    times = timed(config, schemes, tokens, running, timing.GpuTimer(place), place)
    return shapes_of(config, tokens, sms, times), f"measured on {name}, {tokens} tokens a step"


def timed(
    config: ModelConfig,
    schemes: Sequence[Scheme],
    tokens: int,
    running: "ExpertArms",
    timer: "Timer",
    device: torch.device,
) -> dict[Scheme, Mapping[str, float]]:
    """Microseconds of a layer's experts in each scheme, picked evenly, by plan; what the table holds is not measured
    again.
    """
    from tenfold.ops.gpu import expert_arms, tune_experts

    own = config.experts
    assert own is not None
    found = {}
    for scheme in schemes:
        name, count = format_of_scheme(scheme).name, own.routing.experts
        formats = ((name, name, count),)
        work = expert_arms.ExpertsWork(
            count, own.routing.top, config.hidden_size, own.size, formats, config.activation, tokens
        )
        tune_experts.tune([work], running, timer, device, (tokens,))
        found[scheme] = running.table.times(expert_arms.key(work, running.sms))
    return found


def shapes_of(config: ModelConfig, tokens: int, sms: int, times: Mapping[Scheme, Mapping[str, float]]) -> list[Shape]:
    """Of the plans that were timed. Beside schemes that activations are rounded for, others run as they do alone."""
    from tenfold.ops.gpu import experts_packed

    assert config.experts is not None
    count = config.experts.routing.experts
    even = launches(config, tokens, {0: [1] * count})
    eights = any(scheme.eights for scheme in times)
    alike: dict[PackedExpertsPlan, dict[str, float]] = {}
    for scheme, arms in times.items():
        for name, took in arms.items():
            plan = replace(experts_packed.parse(name), stages=2)
            beside = eights and not (scheme.eights or plan.digits)
            for each in (plan, replace(plan, acts8=True)) if beside else (plan,):
                own = alike.setdefault(each, {})
                own[str(scheme)] = min(took, own.get(str(scheme), inf))
    found = []
    for plan, took_by in alike.items():
        bare = Shape(plan.width, plan.height, sms * plan.blocks, dict.fromkeys(took_by, 1.0))
        found.append(replace(bare, steps={name: took / even.uniform(bare, name) for name, took in took_by.items()}))
    return found
