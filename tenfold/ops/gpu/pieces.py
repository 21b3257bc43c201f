"""CUDA graphs of what lies between the attentions of a short step with chunks: prompts of a few hundred tokens, alone
or beside decodes. The host needs longer to launch the kernels of such a step one by one than the GPU to run them.

How many tokens a step has, and at which positions, is all that its linear layers depend on (latent attention rotates
before it asks for attention), and steps are padded to few numbers of them.
Attention depends on much more, so it is launched as ever, between two graphs. A number of tokens runs plainly the first
time and is recorded the second time: `Recording.attend` ends one graph where the model asks for attention, and begins
the next. All graphs share one memory pool, for they never run at the same time.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold.base.log import logger
from tenfold.ops.gpu.graphs import MADE, borrowed, roomy

MOST_TOKENS = 1024  # of a recorded step; above, kernels run longer than their launches take (H100, 2026-11-28)

Attend = Callable[[Tensor, Any, Tensor], object]  # qkv of a step's tokens, the step, where its result goes


def bucket(tokens: int) -> int:
    """Tokens that a step is padded to: 16, multiples of 32 to 256, of 64 to 512, of 128 to MOST_TOKENS."""
    if tokens <= 16:
        return 16
    each = 32 if tokens <= 256 else 64 if tokens <= 512 else 128
    return -(-tokens // each) * each


class Recorder(Protocol):
    """Kernels whose calls of attention go to `recording` while there is one."""

    recording: "Recording | None"


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """A call between two graphs, what it reads and where it writes."""

    call: Attend
    qkv: Tensor
    out: Tensor

    def run(self, step: Any, tokens: int) -> None:
        self.call(self.qkv[:tokens], step, self.out[:tokens])


class Recording:
    """A forward of so many tokens as graphs and attentions in turn; ids, positions [tokens]: its input, states: its
    result. results: of attention, by width, which all recordings share.
    """

    def __init__(
        self, ids: Tensor, positions: Tensor, pool: Any, stream: torch.cuda.Stream, results: dict[int, Tensor]
    ) -> None:
        self.ids = ids
        self.positions = positions
        self.states: Tensor | None = None
        self._pool = pool
        self._stream = stream
        self._results = results
        self._parts: list[torch.cuda.CUDAGraph | Attention] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def attend(self, qkv: Tensor, width: int, call: Attend) -> Tensor:
        """A result [tokens, width] of attention, which nobody computes now. One memory serves all layers: the next
        kernels read it before the next attention. Rows past a step's tokens are zeros or an earlier step's.
        """
        if width not in self._results:
            self._results[width] = qkv.new_zeros(MOST_TOKENS, width)
        attended = self._results[width][: len(qkv)]
        if self._graph is not None:
            self._end()
            self._parts.append(Attention(call, borrowed(qkv), attended))
            self._begin()
        return attended

    def record(self, forward: Callable[[], Tensor]) -> None:
        """Run a forward for its kernels to be compiled, then once more to write them down. Raises RuntimeError."""
        forward()
        self._stream.wait_stream(torch.cuda.current_stream())
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self._stream))
            stack.callback(self._end)
            self._begin()
            self.states = borrowed(forward().contiguous())

    def replay(self, step: Any) -> Tensor:
        """The states of a step's tokens, until the next replay."""
        assert self.states is not None
        tokens = len(step.token_ids)
        self.ids[:tokens].copy_(step.token_ids)
        self.positions[:tokens].copy_(step.positions)
        for part in self._parts:
            if isinstance(part, Attention):
                part.run(step, tokens)
            else:
                part.replay()
        return self.states[:tokens]

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.capture_end()
            MADE.graphs += 1
            self._parts.append(graph)


class Pieces:
    """`pieces(forward, step)` is `forward(step)`, [T, D]. One object serves one model on one device."""

    def __init__(self, kernels: Recorder) -> None:
        self.recordings = 0
        self.replays = 0
        self.failure = ""  # why nothing is recorded any more
        self._kernels = kernels
        self._known: dict[tuple[int, int], Recording | None] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._results: dict[int, Tensor] = {}

    def __call__(self, forward: Callable[[Any], Tensor], step: Any) -> Tensor:
        tokens = len(step.token_ids)
        if self.failure or step.max_query == 1 or tokens > MOST_TOKENS or torch.cuda.is_current_stream_capturing():
            return forward(step)
        key = bucket(tokens), id(step.kv)
        if key not in self._known:
            self._known[key] = None
            return forward(step)
        recording = self._known[key]
        if recording is None:
            recording = self._record(forward, step, key[0])
            if recording is None:
                return forward(step)
            self._known[key] = recording
        self.replays += 1
        return recording.replay(step)

    def _record(self, forward: Callable[[Any], Tensor], step: Any, tokens: int) -> Recording | None:
        """None where that fails: then steps run plainly from now on."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = self._place()

        def recorded() -> Recording:
            ids, positions = (given.new_zeros(tokens) for given in (step.token_ids, step.positions))
            recording = self._kernels.recording = Recording(ids, positions, self._pool, stream, self._results)
            padded = replace(step, token_ids=ids, positions=positions)
            recording.record(lambda: forward(padded))
            return recording

        try:
            recording = roomy(recorded)
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            logger.warning("CUDA graphs of short prompts are off, a step could not be recorded: %s", self.failure)
            self._known.clear()
            return None
        finally:
            self._kernels.recording = None
        self.recordings += 1
        return recording

    def _place(self) -> torch.cuda.Stream:
        """The stream to record on: a graph's kernels keep to the SMs of that stream, so the current one. The default
        one cannot be captured: another serves all recordings in its place, for libraries keep memory for every stream.
        """
        current = torch.cuda.current_stream()
        if current != torch.cuda.default_stream():
            return current
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream
