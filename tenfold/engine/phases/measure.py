"""Measure a GPU's stairs: how long prefill and decode of a model take on each part of the multiprocessors.

Steps are made up. Prefill runs a few layers, which stand for all; decode runs whole steps from graphs, as the engine
does.
"""

import statistics
from collections.abc import Callable

import torch

from tenfold.engine.phases.lanes import GreenLanes
from tenfold.engine.phases.latency import Stairs
from tenfold.engine.phases.stored import sizes_of
from tenfold.engine.rehearsal import made_up
from tenfold.engine.runner import Runner
from tenfold.ops.gpu import green
from tenfold.ops.gpu.green import Part

CONTEXT = 1024  # tokens of each that decodes
LAYERS = 2
ROUNDS = 3


def measure(lanes: GreenLanes, max_len: int, max_batch: int) -> Stairs:
    """max_len: of a sequence; max_batch: requests that decode together at most."""
    tokens, batches = sizes_of(max_len, max_batch)
    context = min(CONTEXT, max_len)
    prefill: dict[int, tuple[tuple[int, float], ...]] = {}
    decode: dict[int, tuple[tuple[int, float], ...]] = {}
    with torch.inference_mode():
        for part, runner in lanes.every_prefill():
            prefill[part.sms] = tuple((n, _prefill_seconds(runner, part, n)) for n in tokens)
        for part, runner in lanes.every_decode():
            decode[part.sms] = tuple((n, _decode_seconds(runner, part, n, context)) for n in batches)
    return Stairs(prefill, decode)


def _prefill_seconds(runner: Runner, part: Part, tokens: int) -> float:
    step = made_up(runner, 1, tokens, tokens)
    depth = runner.model.config.layers
    layers = range(min(LAYERS, depth - 1))

    def call() -> object:
        return runner.model.part(step, None, layers)

    return timed(captured(call, part), part) * depth / max(1, len(layers))


def captured(call: Callable[[], object], part: Part) -> Callable[[], object]:
    """A graph of the call: short chunks would take as long as the host needs to launch them. The call itself where no
    graph can be made of it, as of chunks over packed pages.
    """
    with green.on(part):
        for _ in range(2):  # kernels are compiled, libraries ask for memory
            call()
        graph = torch.cuda.CUDAGraph()
        part.stream.synchronize()
        try:
            with torch.cuda.graph(graph, stream=part.stream):
                call()
        except RuntimeError:
            return call
    return graph.replay


def _decode_seconds(runner: Runner, part: Part, requests: int, context: int) -> float:
    step = made_up(runner, requests, 1, context)
    return timed(lambda: runner.model.forward(step), part)


def timed(call: Callable[[], object], part: Part) -> float:
    """Median seconds of a call on a part, after calls that are not counted: one to load kernels, one to capture."""
    found = []
    with green.on(part):
        for i in range(3 + ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= 3:
                found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)
