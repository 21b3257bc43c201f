"""Made-up steps: they run every size and leave no trace in the store."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.rehearsal import chunks, decodes, made_up, rehearse
from tenfold.engine.request import Request, SamplingParams
from tenfold.nn.step import Step
from tests.engine import fake


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
