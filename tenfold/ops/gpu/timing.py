"""How long operations take on a GPU: captured as graphs over rotated weights, arms in turn, medians.

One replay runs an arm once on each of several copies of the weights, more than the L2 cache holds, so that a call finds
its weight as cold as in a real step.
"""

import re
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from tenfold.base.log import logger
from tenfold.ops.gpu import green
from tenfold.ops.gpu.green import Part

LEAST_ROTATION = 150 << 20  # bytes: three times the L2 cache of an H100
COPY = 1 << 30  # bytes of the buffer that `memory_microseconds` copies
WAKING = 500  # copies before `memory_microseconds` times any, a fraction of a second
ROUNDS = 7
SAMPLE = 400.0  # microseconds of one sample, at least
COMPILERS = 8  # threads that compile at the same time
FARTHEST = 0.015  # of an arm's result from the reference, relative to its norm: many roundings of bfloat16

Arm = Callable[[int], Tensor]


class GpuTimer:
    """Times on one device, or on a part of its multiprocessors. Others with the same methods stand in for it where
    there is none.
    """

    def __init__(self, device: torch.device, part: Part | None = None) -> None:
        self.device = device
        self.part = part
        has = torch.cuda.get_device_properties(device)
        self.sms = part.sms if part else has.multi_processor_count
        self.rotated = max(LEAST_ROTATION, 3 * getattr(has, "L2_cache_size", 0))
        # of every capture, so that libraries keep one workspace
        self.stream = part.stream if part else torch.cuda.Stream(device)

    def copies(self, nbytes: int) -> int:
        """How many weights of so many bytes it takes to get past the L2 cache."""
        return max(2, -(-self.rotated // nbytes))

    def measure(
        self, arms: Mapping[str, Arm], copies: int, reference: Arm | None = None, farthest: float = FARTHEST
    ) -> dict[str, float]:
        """Microseconds of one call of each arm, the median of ROUNDS samples taken in turn. `arm(i)` runs on the i-th
        of `copies` weights. An arm that fails, or whose result is farther from the reference's, has no time.
        """
        compile_all(arms, self.device)
        expected = None if reference is None else reference(0)
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()  # what calls read was made on another stream
        with torch.cuda.stream(self.stream), self._on_part():
            graphs = {name: capture(name, arm, copies, pool, expected, farthest) for name, arm in arms.items()}
        kept = {name: graph for name, graph in graphs.items() if graph is not None}
        samples: dict[str, list[float]] = {name: [] for name in kept}
        with self._on_part():
            repeats = {name: max(1, round(SAMPLE / max(1.0, sample(graph.replay, 1)))) for name, graph in kept.items()}
            for _ in range(ROUNDS):
                for name, graph in kept.items():
                    samples[name].append(sample(graph.replay, repeats[name]) / repeats[name] / copies)
        return {name: round(statistics.median(taken), 3) for name, taken in samples.items()}

    def _on_part(self) -> AbstractContextManager[None]:
        return green.on(self.part) if self.part else nullcontext()

    def memory_microseconds(self) -> dict[str, float]:
        """Of a copy of COPY bytes inside the device's memory ("copy"), and of adding them up ("read"). The copy changes
        every bit on its way: a plain one is no kernel in a graph, and its engine takes half as long again (2,706 GB/s
        where a kernel copies 4,226; H200, 2026-11-30).
        """
        source = torch.zeros(COPY // 8, dtype=torch.int64, device=self.device)
        target, numbers = torch.empty_like(source), source.view(torch.float32).view(-1, 8192)

        def copy(i: int = 0) -> Tensor:
            return torch.bitwise_not(source, out=target)

        for _ in range(WAKING):  # an idle device wakes slowly: the first copies take half as long again
            copy()
        return self.measure({"copy": copy, "read": lambda i: numbers.sum(1)}, 1)


def compile_all(arms: Mapping[str, Arm], device: torch.device) -> None:
    """Run every arm once, several at a time, so that what is not compiled yet is compiled in parallel."""

    def run(arm: Arm) -> None:
        with torch.cuda.device(device), suppress(Exception):  # `capture` runs it again and says what is wrong
            arm(0)

    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(run, {kernel(name): arm for name, arm in arms.items()}.values()))
    torch.cuda.synchronize()


def kernel(name: str) -> str:
    """Plans whose names end in a number of splits share a kernel, but for one split."""
    return re.sub(r":s([2-9]|\d\d+)$", ":split", name)


def capture(
    name: str, arm: Arm, copies: int, pool: Any, expected: Tensor | None, farthest: float
) -> torch.cuda.CUDAGraph | None:
    """A graph of one call on each copy; None, with a line in the log, where the arm cannot run or is wrong."""
    try:
        result = arm(0)
        wrong = "" if expected is None else difference(result, expected, farthest)
        torch.cuda.synchronize()
        graph = record(arm, copies, pool)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # a compiler's complaint may be of any class
        wrong = (str(error) or repr(error)).splitlines()[0]
    if wrong:
        logger.warning("tune: %s is left out: %s", name, wrong[:300])
    return None if wrong else graph


def record(arm: Arm, copies: int, pool: Any) -> torch.cuda.CUDAGraph:
    """Without the garbage collection of `torch.cuda.graph`, which takes longer than all else here."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        for i in range(copies):
            arm(i)
    finally:
        graph.capture_end()
    return graph


def difference(result: Tensor, expected: Tensor, farthest: float = FARTHEST) -> str:
    """What is wrong with a result, empty where it is as near to the expected one as roundings allow."""
    distance = (result.double() - expected.double()).norm().item()
    allowed = farthest * expected.double().norm().item()
    return "" if distance <= allowed else f"its result is {distance:.3g} from the reference; allowed: {allowed:.3g}"


def sample(run: Callable[[], object], repeats: int) -> float:
    """Microseconds of so many runs."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
