"""Made-up steps: they run every size and leave no trace in the store."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.rehearsal import capture, chunks, decodes, made_up, rehearse, shapes
from tenfold.engine.request import Request, SamplingParams
from tenfold.engine.rows import Buffer, Place
from tenfold.nn.step import Step
from tenfold.ops.gpu import graphs
from tests.engine import fake


@pytest.fixture
def unrehearsed() -> None:
    """Engines of these tests rehearse where they are told to, unlike those of others (`conftest`)."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["auto", "int4"])
def test_a_rehearsal_changes_no_answer(tiny: Callable[[str], Path], cache: str) -> None:
    own = EngineConfig(
        *(str(tiny("llama")), "cuda"),
        dtype="bfloat16",
        kv_cache=cache,
        kv_memory=4 << 20,
        max_batch=4,
        max_step_tokens=64,
        max_model_len=128,
        rehearse=False,
    )
    answers = []
    for rehearsed in (False, True):
        engine = Engine.load(own, tokens_only=True)
        engine.kv.fill(0.5)
        before = [tensor.clone() for tensor in engine.kv._stored]
        if rehearsed:
            rehearse(engine.runner, [*decodes(4, 128, 10_000), *chunks(64)])
            assert all(torch.equal(*pair) for pair in zip(engine.kv._stored, before))
        engine.add(Request("a", tuple(range(3, 40)), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))
        answers.append(fake.answers(fake.drain(engine)))
    assert answers[0] == answers[1]


def test_contexts_lie_in_pages_of_their_own_while_there_are_some(tiny: Callable[[str], Path]) -> None:
    own = EngineConfig(str(tiny("llama")), "cpu", kernels="torch", kv_memory=1 << 20, max_batch=4, max_model_len=128)
    runner = Engine.load(own, tokens_only=True).runner
    step = made_up(runner, 2, 1, 100)
    assert step.page_table.unique().numel() == min(step.page_table.numel(), runner.kv.pages)
    assert int(step.page_table.max()) < runner.kv.pages
    assert (step.slots == -1).all()


def test_what_cannot_run_is_said_and_left_alone(
    tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = EngineConfig(str(tiny("llama")), "cpu", kernels="torch", kv_memory=1 << 20, max_batch=4, max_model_len=128)
    runner = Engine.load(own, tokens_only=True).runner
    tried = []

    def part(step: Step, x: None, layers: range) -> None:
        tried.append(len(step.token_ids))
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(runner.model, "part", part)
    with caplog.at_level(logging.WARNING, "tenfold"):
        rehearse(runner, [(2, 1, 100), (1, 16, 16)])
    assert tried == [2]
    assert "2 requests with 1 of 100 tokens failed: no kernel" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["auto", "int4", "k2v2g64"])
def test_an_engine_that_rehearsed_captures_nothing_later(cache: str) -> None:
    """And answers as one that captures when a size first comes."""
    own = EngineConfig(
        *("shape:llama-3.2-1b@layers=2", "cuda"),
        dtype="bfloat16",
        kv_cache=cache,
        kv_memory=64 << 20,
        max_batch=12,
        max_step_tokens=64,
        max_model_len=512,
    )
    found = []
    for early in (False, True):
        engine = Engine.load(replace(own, rehearse=early), tokens_only=True)
        made = graphs.MADE.graphs
        found.append(answered(engine))
        if early:  # prompts that are known but for a token come beside decodes
            answered(engine)
        assert (graphs.MADE.graphs == made) == early
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_that_cannot_be_captured_run_plainly(
    tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """No kernel reads packed heads of 16 channels."""
    own = EngineConfig(str(tiny("llama")), "cuda", dtype="bfloat16", kv_cache="int4", kv_memory=4 << 20, max_batch=12)
    found = []
    for early in (False, True):
        engine = Engine.load(replace(own, rehearse=early, max_step_tokens=64, prefix_cache=False), tokens_only=True)
        found.append(answered(engine, 7))
    assert "no kernel reads is not captured" in caplog.text
    plain = Engine.load(replace(own, graphs=False, max_step_tokens=64, prefix_cache=False), tokens_only=True)
    assert found == [answered(plain, 7)] * 2


def answered(engine: Engine, longer: int = 9, count: int = 30) -> dict[tuple[str, int], list[int]]:
    """Greedy answers to prompts of many lengths, each so many tokens longer than the one before."""
    for i in range(count):
        prompt = tuple((7 * i + j) % 90 + 4 for j in range(3 + longer * i))
        engine.add(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
    return fake.answers(fake.drain(engine))


def test_steps_that_are_nobodys_lie_where_those_of_requests_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sizes, after memory for the largest was reserved."""
    engine = fake.make_engine(max_batch=6, max_step_tokens=64, max_model_len=96, lookahead=1)
    rows, seen, forward = engine.runner.rows, list[Step](), engine.runner.model.forward
    place = Place(torch.device("cpu"))
    rows._buffers = [Buffer(place) for _ in rows._buffers]
    monkeypatch.setattr(engine.runner.model, "forward", seen.append)
    sizes = [(requests, pages) for requests in range(1, 7) for pages in range(1, rows.max_pages + 1)]
    capture(engine.runner, 64, sizes)
    idle = {(len(step.kv_lengths), step.page_table.shape[1]): step for step in seen}
    assert all(not step.kv_lengths.any() and (step.slots == -1).all() and not step.shared for step in seen[-2:])
    places = {shape: (step.token_ids.data_ptr(), step.positions.data_ptr()) for shape, step in idle.items()}
    seen.clear()
    monkeypatch.setattr(engine.runner.model, "forward", lambda step: seen.append(step) or forward(step))
    for i in range(6):
        prompt = tuple((7 * i + j) % 90 + 4 for j in range(3 + 9 * i))
        engine.add(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
    fake.drain(engine)
    decodes = [step for step in seen if step.max_query == 1 and step.decodes == len(step.kv_lengths)]
    assert len({len(step.kv_lengths) for step in decodes}) > 2
    for step in decodes:
        shape = len(step.kv_lengths), step.page_table.shape[1]
        assert (step.token_ids.data_ptr(), step.positions.data_ptr()) == places[shape]
        assert step.decodes == idle[shape].decodes


@pytest.mark.parametrize("padded", [False, True])
def test_requests_of_a_padded_step_stay_together(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step of decodes is padded with idle requests, which answers do not depend on."""
    engine, together = fake.make_engine(max_batch=6, max_step_tokens=64, max_model_len=96), list[bool]()
    forward = engine.runner.model.forward

    def run(step: Step) -> torch.Tensor:
        if not step.kv_lengths.all():
            together.append(step.parted() is None)
        return forward(step)

    monkeypatch.setattr(engine.runner.model, "forward", run)
    if padded:
        monkeypatch.setattr(engine.runner.rows, "bucket", graphs.bucket)
    found = answered(engine, 2, 6)
    assert all(together)
    assert bool(together) == padded
    assert found == answered(fake.make_engine(max_batch=6, max_step_tokens=64, max_model_len=96), 2, 6)


def test_the_last_token_of_a_known_prompt_is_padded_as_decodes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside decodes, as often as prompts come again: a step of such tokens alone has a shape that was captured. What
    is pooled is not padded.
    """
    engine, seen = fake.make_engine(max_batch=6, max_step_tokens=64, max_model_len=96), list[int]()
    forward = engine.runner.model.forward

    def run(step: Step) -> torch.Tensor:
        if step.max_query == 1:
            seen.append(len(step.kv_lengths))
        return forward(step)

    monkeypatch.setattr(engine.runner.model, "forward", run)
    monkeypatch.setattr(engine.runner.rows, "bucket", graphs.bucket)
    found, size = [], engine.runner.rows.page_size
    for _ in range(2):
        seen.clear()
        for i in range(5):
            prompt = tuple((7 * i + j) % 90 + 4 for j in range(size * (1 + i)))
            engine.add(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)))
        found.append(fake.answers(fake.drain(engine)))
    assert found[0] == found[1]
    assert len(seen) == 9  # all tokens but the last of each prompt were known
    assert set(seen) <= {graphs.bucket(n, 1)[0] for n in seen}
    for i in range(3):
        engine.add(Request(f"pooled {i}", (5 + i,), SamplingParams(max_tokens=1), pool="last"))
    assert all(output.error is None for output in fake.drain(engine))


def test_a_capture_that_fails_is_said_and_the_last(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake.make_engine(max_batch=6, max_step_tokens=64, max_model_len=96)
    tried = []

    def run(requests: int, pages: int) -> None:
        tried.append((requests, pages))
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(engine.runner, "capture", run)
    with caplog.at_level(logging.WARNING, "tenfold"):
        assert not capture(engine.runner, 64, [(4, 2), (2, 2)])
    assert tried == [(4, 2)]
    assert "capturing a step of 4 requests and 2 pages failed: no memory" in caplog.text


def test_every_shape_of_a_step_of_decodes_is_captured() -> None:
    engine = fake.make_engine(max_batch=6, max_step_tokens=64, max_model_len=96)
    found = shapes(engine.runner, 6)
    assert len(found) == len(set(found))
    sizes = {graphs.bucket(requests, pages) for requests, pages in found}
    most = engine.runner.rows.max_pages
    assert sizes == {graphs.bucket(n, pages) for n in range(1, 7) for pages in range(1, most + 1)}
    few = {graphs.bucket(*size) for size in shapes(engine.runner, 6, (1, 96))}
    assert few == {graphs.bucket(n, pages) for n in range(1, 7) for pages in (1, most)}
