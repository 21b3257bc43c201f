"""A request's greedy answer is its own: the same alone, in any batch, with any chunk size, after a prefix hit, after
preemption, one step ahead, on real (tiny, random) models in float32.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.engine.core import Engine
from tenfold.engine.request import Request, SamplingParams
from tenfold.models.table import Model, build_model
from tenfold.ops.table import make_kernels
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.engine import fake

ANSWER = 10
CLEAR = 1e-3  # a best token this far ahead of the second, rounding cannot dethrone


def prompts() -> list[tuple[int, ...]]:
    """Some begin alike, lengths from 1 over whole pages to several chunks."""
    rng = random.Random(11)
    base = rng.choices(range(3, 320), k=48)
    return [(*base[:shared], *rng.choices(range(3, 320), k=own)) for shared in (0, 16, 33) for own in (1, 7, 15)]


@dataclass(frozen=True)
class Case:
    """A model and what it answers to each prompt alone, in one chunk."""

    model: Model
    kernels: Any
    answers: list[list[int]]

    def engine(self, pages: int = 64, **sizes: Any) -> Engine:
        sizes = {"page_size": 8, "max_model_len": 128, "max_step_tokens": 128} | sizes
        engine = Engine(self.model, self.kernels, fake.settings(**sizes), pages=pages, eos_ids=())
        for tensor in (*engine.kv.keys, *engine.kv.values):
            tensor.fill_(float("nan"))  # reading what was never written shows
        return engine


PARAMS = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=2)


@pytest.fixture(scope="module", params=["llama", "gemma3", "llama-native"])
def case(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Case:
    name, _, native = request.param.partition("-")
    try:
        kernels = make_kernels("native" if native else "torch", torch.device("cpu"), torch.float32, 1)
    except ValueError as error:
        pytest.skip(str(error))
    checkpoint = open_checkpoint(tiny(name))
    model = build_model(checkpoint.config, Weights(checkpoint, kernels), 128)
    case = Case(model, kernels, [])
    for prompt in prompts():
        engine = case.engine()
        engine.add(Request("alone", prompt, PARAMS))
        outputs = fake.drain(engine)
        assert all(o.logprobs[0].top[0][1] - o.logprobs[0].top[1][1] > CLEAR for o in outputs)
        case.answers.append([t for o in outputs for t in o.tokens])
    return case


def answer(case: Case, engine: Engine, order: list[int], pauses: list[int] | None = None, **values: Any) -> None:
    """Ask for the prompts in this order, with steps in between, and compare."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, **values)
    outputs = []
    for i, number in enumerate(order):
        engine.add(Request(str(i), prompts()[number], params))
        for _ in range(pauses[i] if pauses else 0):
            outputs += engine.step()
    outputs += fake.drain(engine)
    got = fake.answers(outputs)
    assert got == {(str(i), k): case.answers[n] for i, n in enumerate(order) for k in range(params.n)}


def test_answers_are_not_all_alike(case: Case) -> None:
    assert len({tuple(a) for a in case.answers}) == len(case.answers)


@pytest.mark.parametrize("chunk", [1, 3, 8, 19])
def test_any_chunk_size(case: Case, chunk: int) -> None:
    for number in range(len(case.answers)):
        answer(case, case.engine(max_step_tokens=chunk, prefix_cache=False), [number])


@pytest.mark.parametrize("lookahead", [0, 1])
def test_any_batch(case: Case, lookahead: int) -> None:
    answer(case, case.engine(max_batch=9, lookahead=lookahead, prefix_cache=False), list(range(9)))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_after_a_prefix_hit(case: Case, lookahead: int) -> None:
    engine = case.engine(max_batch=3, lookahead=lookahead)
    answer(case, engine, [8, 5, 2])
    answer(case, engine, [8, 5, 8, 6, 7])
    assert engine.stats().prefix_hit_tokens > 60


@pytest.mark.parametrize("lookahead", [0, 1])
def test_after_preemption(case: Case, lookahead: int) -> None:
    engine = case.engine(pages=9, max_batch=5, lookahead=lookahead, prefix_cache=False)
    answer(case, engine, [0, 1, 2, 3, 4, 5])
    assert engine.stats().preemptions > 0


def test_several_answers_to_one_request(case: Case) -> None:
    answer(case, case.engine(max_batch=6), [4, 5], n=3)


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, 8), min_size=1, max_size=7),
    pauses=st.lists(st.integers(0, 5), min_size=7, max_size=7),
    pages=st.integers(9, 30),
    page_size=st.sampled_from([1, 3, 8, 16]),
    max_batch=st.integers(1, 5),
    max_step_tokens=st.integers(1, 40),
    lookahead=st.integers(0, 1),
    prefix_cache=st.booleans(),
    n=st.sampled_from([1, 1, 2]),
)
def test_any_schedule(case: Case, order: list[int], pauses: list[int], pages: int, n: int, **sizes: Any) -> None:
    pages = max(pages, -(-(48 + ANSWER) // sizes["page_size"]))
    answer(case, case.engine(pages, **sizes), order, pauses, n=n)
