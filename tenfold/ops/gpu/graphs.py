"""CUDA graphs of decode steps: launched as one, so that the host's time for hundreds of kernels does not count.

Steps whose inputs have the same shapes and lie at the same place replay one graph. A shape runs plainly the first time,
which compiles what is missing, and is captured the second time. All graphs share one memory pool, for they never run at
the same time. Results too lie where another graph may have its own: a later step overwrites them.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tenfold.base.log import logger

T = TypeVar("T")
Forward = Callable[[Any], Tensor]
MOST_GRAPHS = 512  # more than sizes of steps that an engine of 262,144 tokens captures at its start
LARGEST = 256  # requests of a captured step; above, kernels run longer than their launches take


def bucket(requests: int, pages: int) -> tuple[int, int]:
    """Requests: 1, 2, 4, then multiples of 8 to 64, of 16 to 256; pages: powers of two from 8."""
    columns = max(8, 1 << (pages - 1).bit_length())
    if requests > LARGEST:
        return requests, columns
    step = 8 if requests <= 64 else 16
    padded = 1 << (requests - 1).bit_length() if requests <= 4 else -(-requests // step) * step
    return padded, columns


@dataclass(slots=True, eq=False)
class Captured:
    """A graph, where it leaves its results, and what it must not outlive: the step whose tensors it reads."""

    graph: torch.cuda.CUDAGraph
    results: Tensor
    step: Any


class Capturer:
    """Captures what is run into graphs that share one memory pool, until one cannot be captured."""

    def __init__(self) -> None:
        self.captures = 0
        self.failure = ""  # why nothing is captured any more
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """A graph, and where it leaves its results; the device does not run it yet. None where that fails: then all
        runs plainly from now on. Others wait meanwhile, so this is without the garbage collection and the emptying of
        caches of `torch.cuda.graph`, which take longer than all else.
        """
        if self.failure:
            return None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        try:
            graph, results = roomy(lambda: self._captured(run))
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            logger.warning("CUDA graphs are off, a step could not be captured: %s", self.failure)
            return None
        self.captures += 1
        return graph, results

    def _captured(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), self._place()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), ExitStack() as stack:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            stack.callback(graph.capture_end)
            results = run()
        MADE.graphs += 1
        return graph, results

    def _place(self) -> Any:
        """The stream to capture on: a graph's kernels keep to the SMs of that stream, so the current one; the default
        one cannot be captured.
        """
        current = torch.cuda.current_stream()
        return self._stream if current == torch.cuda.default_stream() else current


@dataclass(slots=True)
class Tally:
    """CUDA graphs that this process has captured. Each takes memory of the host and of the device."""

    graphs: int = 0


MADE = Tally()


def roomy(capture: Callable[[], T]) -> T:
    """What a capture gives. Memory that the allocator keeps for later is out of a capture's reach, so where there is
    too little it is given back, and the capture is tried once more.
    """
    try:
        return capture()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return capture()


class Graphs(Capturer):
    """`graphs(forward, step)` is `forward(step)`, [L, V] float32. One object serves one model on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._known: OrderedDict[tuple[Any, ...], Captured | None] = OrderedDict()

    def __call__(self, forward: Forward, step: Any) -> Tensor:
        requests = len(step.kv_lengths)
        if self.failure or step.max_query != 1 or {len(step.token_ids), len(step.logits_rows)} != {requests}:
            return forward(step)
        if requests > LARGEST or requests != bucket(requests, 1)[0]:  # of steps that nobody padded there are too many
            return forward(step)
        places = (step.token_ids.data_ptr(), step.positions.data_ptr(), id(step.kv))
        key = (requests, step.page_table.shape[1], step.shared, *places)
        captured = self._known.get(key, self)
        if captured is self:
            self._remember(key, None)
            return forward(step)
        if captured is None:
            captured = self._capture(forward, step)
            if captured is None:
                return forward(step)
            self._remember(key, captured)
        assert isinstance(captured, Captured)
        self._known.move_to_end(key)
        captured.graph.replay()
        self.replays += 1
        return captured.results

    def _remember(self, key: tuple[Any, ...], captured: Captured | None) -> None:
        self._known[key] = captured
        self._known.move_to_end(key)
        if len(self._known) > MOST_GRAPHS:
            self._known.popitem(last=False)

    def _capture(self, forward: Forward, step: Any) -> Captured | None:
        """A step as `capture` makes it. Where that fails, what was worked out of the step meanwhile was never computed,
        and is forgotten.
        """
        made = self.capture(lambda: forward(step).contiguous())
        if made is None:
            self._known.clear()
            step.memo.clear()
            return None
        graph, results = made
        return Captured(graph, borrowed(results), step)


class _Memory:
    """Memory of a device for `torch.as_tensor`."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.itemsize}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def refuse(what: str) -> None:
    """Nothing, but where a step is being captured: a device that is read from then fails in all that comes after.
    Raises RuntimeError, which says that `what` is not captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} is not captured, for the host reads lengths of contexts in between")


def borrowed(tensor: Tensor) -> Tensor:
    """The numbers of a contiguous tensor, whose memory the allocator may give to what comes after it: of a captured
    graph, whose memory is not given back, to the graphs that are captured later.
    """
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
