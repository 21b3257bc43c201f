"""Recordings of short steps with chunks, with graphs that run nothing: which parts there are, what they are given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tenfold.ops.gpu import pieces

LAYERS = 3


class Graph:
    """Writes down when it is told what."""

    told: ClassVar[list[str]] = []

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.told.append("begin")

    def capture_end(self) -> None:
        self.told.append("end")

    def replay(self) -> None:
        self.told.append("graph")


@dataclass
class Step:
    token_ids: Tensor
    max_query: int = 9
    kv: object = None
    name: str = ""
    positions: Tensor | None = None


@dataclass
class Kernels:
    """A model of three layers: attention of x is x + the number of the layer."""

    recording: pieces.Recording | None = None
    seen: list[tuple[str, int, list[float]]] = field(default_factory=list)

    def attention(self, x: Tensor, layer: int, step: Any) -> Tensor:
        def later(x: Tensor, step: Any, out: Tensor) -> None:
            self.seen.append((step.name, layer, x[:, 0].tolist()))
            out.copy_(x + layer)

        if self.recording is not None:
            return self.recording.attend(x, x.shape[1], later)
        out = torch.empty_like(x)
        later(x, step, out)
        return out

    def forward(self, step: Any) -> Tensor:
        x = step.token_ids.to(torch.float16)[:, None].repeat(1, 2)
        for layer in range(LAYERS):
            x = self.attention(x, layer, step)
        return x


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Graph.told = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, made in (
        ("CUDAGraph", Graph),
        ("graph_pool_handle", lambda: 1),
        ("Stream", lambda: stream),
        ("current_stream", lambda: 0),
        ("default_stream", lambda: 0),
        ("is_current_stream_capturing", lambda: False),
    ):
        monkeypatch.setattr(torch.cuda, name, made)
    monkeypatch.setattr(torch.cuda, "stream", lambda of: SimpleNamespace(__enter__=None, __exit__=None))
    monkeypatch.setattr(pieces, "ExitStack", Stack)
    monkeypatch.setattr(pieces, "borrowed", lambda x: x)
    return Graph.told


class Stack:
    def __enter__(self) -> "Stack":
        self.calls: list[Callable[[], None]] = []
        return self

    def enter_context(self, context: Any) -> None:
        pass

    def callback(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def __exit__(self, *error: Any) -> None:
        for call in self.calls:
            call()


def test_a_number_of_tokens_is_recorded_the_second_time(told: list[str]) -> None:
    kernels = Kernels()
    run = pieces.Pieces(kernels)
    store = object()

    def step(tokens: int, name: str) -> Step:
        return Step(torch.arange(tokens), kv=store, name=name, positions=torch.arange(tokens) + len(name))

    assert run(kernels.forward, step(20, "first"))[:, 0].tolist() == [n + 3.0 for n in range(20)]
    assert told == []
    kernels.seen.clear()
    states = run(kernels.forward, step(17, "second"))
    assert states.shape == (17, 2)
    assert told == ["begin", "end"] * (LAYERS + 1) + ["graph"] * (LAYERS + 1)
    assert [(name, layer, len(x)) for name, layer, x in kernels.seen] == [("second", i, 17) for i in range(LAYERS)]
    assert (run.recordings, run.replays, kernels.recording) == (1, 1, None)
    kernels.seen.clear()
    run(kernels.forward, step(32, "third"))
    assert [(name, len(x)) for name, _, x in kernels.seen] == [("third", 32)] * LAYERS
    (recording,) = filter(None, run._known.values())
    last = step(32, "third")
    for kept, wanted in ((recording.ids, last.token_ids), (recording.positions, last.positions)):
        assert torch.equal(kept, wanted)
    assert run(kernels.forward, step(33, "other")).shape == (33, 2)  # of another bucket: plainly
    assert (run.recordings, run.replays) == (1, 2)
    for plain in (Step(torch.arange(9), 1, store), step(pieces.MOST_TOKENS + 1, "long")):
        assert len(run(kernels.forward, plain)) == len(plain.token_ids)
    assert (run.recordings, run.replays) == (1, 2)


def test_a_capture_that_lacks_memory_is_tried_again_once_some_was_given_back(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: Graph, **asked: Any) -> None:
        if "empty" not in told:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50.00 MiB.")

    monkeypatch.setattr(Graph, "capture_begin", short)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty"))
    kernels = Kernels()
    run = pieces.Pieces(kernels)
    for name in ("a", "b", "c"):
        run(kernels.forward, Step(torch.arange(5), name=name, positions=torch.arange(5)))
    assert (run.recordings, run.replays, run.failure, kernels.recording) == (1, 2, "", None)
    assert [what for what in told if what in ("wait", "empty")] == ["wait", "empty"]


def test_a_step_that_cannot_be_recorded_runs_plainly_from_then_on(
    told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Graph, **asked: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen capturing")

    kernels = Kernels()
    run = pieces.Pieces(kernels)
    step = Step(torch.arange(5), name="a", positions=torch.arange(5))
    run(kernels.forward, step)
    monkeypatch.setattr(Graph, "capture_begin", refuse)
    for _ in range(2):
        assert run(kernels.forward, step)[:, 0].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]
    assert (run.failure, run.recordings, kernels.recording) == ("operation not permitted", 0, None)


@given(st.integers(1, pieces.MOST_TOKENS))
def test_buckets_are_few_and_near(tokens: int) -> None:
    padded = pieces.bucket(tokens)
    assert tokens <= padded <= max(16, tokens + 127)
    assert pieces.bucket(padded) == padded
    assert len({pieces.bucket(n) for n in range(1, pieces.MOST_TOKENS + 1)}) < 20


def test_all_recordings_share_a_stream(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SimpleNamespace] = []

    def stream() -> SimpleNamespace:
        made.append(SimpleNamespace(wait_stream=lambda other: None))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    kernels, run = Kernels(), pieces.Pieces(Kernels())
    for tokens in (5, 5, 40, 40, 200, 200):
        run(kernels.forward, Step(torch.arange(tokens), positions=torch.arange(tokens)))
    assert run.recordings == 3
    assert len(made) == 1
