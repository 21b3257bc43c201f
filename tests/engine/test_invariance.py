"""A request's answer is its own: the same alone, in any batch, with any chunk size, after a prefix hit, after
preemption, one step ahead, guessed ahead, on real (tiny, random) models in float32.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """A model, what it answers to each prompt alone, in one chunk, and itself again, to guess ahead with."""

    model: Model
    kernels: Any
    answers: list[list[int]]
    draft: Model
    kv_cache: str = "auto"

    def engine(self, pages: int = 64, **sizes: Any) -> Engine:
        sizes = {"page_size": 8, "max_model_len": 128, "max_step_tokens": 128, "kv_cache": self.kv_cache} | sizes
        draft = self.draft if sizes.get("speculate") == "draft" else None
        engine = Engine(self.model, self.kernels, fake.settings(**sizes), pages=pages, eos_ids=(), draft=draft)
        stores = [engine.kv]
        if engine.speculator is not None:
            fake.speculating(engine)
            stores += [engine.speculator.drafter.kv] if draft else []  # type: ignore[attr-defined]
        for store in stores:
            store.fill(float("nan"))  # reading what was never written shows
        return engine


PARAMS = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=2)


MODELS = ("llama", "gemma3", "llama-native", "llama k2v2g16w9s1", "llama-native k3v1.5g16w4s1-post", "gemma3 int4")
MODELS += ("llama-native fp8", "qwen2_moe", "qwen3_moe-native", "deepseek_v3-native")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Case:
    model, _, kv_cache = request.param.partition(" ")
    name, _, native = model.partition("-")
    try:
        kernels = make_kernels("native" if native else "torch", torch.device("cpu"), torch.float32, 1)
    except ValueError as error:
        pytest.skip(str(error))
    checkpoint = open_checkpoint(tiny(name.replace("_", "-")))
    model, draft = (build_model(checkpoint.config, Weights(checkpoint, kernels), 128) for _ in range(2))
    case = Case(model, kernels, [], draft, kv_cache or "auto")
    for prompt in prompts():
        engine = case.engine()
        engine.add(Request("alone", prompt, PARAMS))
        outputs = fake.drain(engine)
        assert all(o.logprobs[0].top[0][1] - o.logprobs[0].top[1][1] > CLEAR for o in outputs)
        case.answers.append([t for o in outputs for t in o.tokens])
    return case


def answer(case: Case, engine: Engine, order: list[int], *lives: Any, **values: Any) -> None:
    """Ask for the prompts in this order, and compare. lives: as in `fake.check_lives`."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, **values)
    requests = [Request(str(i), prompts()[number], params) for i, number in enumerate(order)]
    fake.check_lives(engine, requests, [case.answers[number] for number in order], *lives)


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
    engine = case.engine(max_batch=3, lookahead=lookahead, overtake=0.0)  # in this order texts begin alike
    answer(case, engine, [8, 5, 2])
    answer(case, engine, [8, 5, 8, 6, 7])
    answer(case, engine, [7, 8, 6, 5])  # where a cache has rooms, the third time finds where texts part
    assert engine.stats().prefix_hit_tokens > 60


@pytest.mark.parametrize("lookahead", [0, 1])
def test_after_preemption(case: Case, lookahead: int) -> None:
    engine = case.engine(pages=9, max_batch=5, lookahead=lookahead, prefix_cache=False)
    answer(case, engine, [0, 1, 2, 3, 4, 5])
    assert engine.stats().preemptions > 0


def test_several_answers_to_one_request(case: Case) -> None:
    answer(case, case.engine(max_batch=6), [4, 5], n=3)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_guessed_ahead(case: Case, speculate: str, lookahead: int) -> None:
    engine = case.engine(pages=9, max_batch=5, lookahead=lookahead, speculate=speculate, prefix_cache=False)
    answer(case, engine, [0, 1, 2, 3, 4, 5, 8], logprobs=1)
    stats = engine.stats()
    if speculate == "draft":
        assert stats.preemptions > 0
        assert stats.drafted_tokens > 20
        if case.kv_cache == "auto":  # the draft model's own cache is never packed
            assert stats.accepted_tokens == stats.drafted_tokens


FEW = dict.fromkeys((9, 10, 11, 12), 15.0)  # tokens that occur again and again, so that lookups find something
SAMPLED = [
    SamplingParams(temperature=0.7, seed=5, max_tokens=24, logit_bias=FEW),
    SamplingParams(temperature=0.9, seed=6, max_tokens=24, top_k=5, top_p=0.9, logit_bias=FEW),
    SamplingParams(temperature=0.8, seed=7, max_tokens=20, frequency_penalty=0.2, logprobs=1, logit_bias=FEW),
    SamplingParams(temperature=0.6, seed=8, max_tokens=20, repetition_penalty=1.2, min_p=0.05, logit_bias=FEW),
    SamplingParams(temperature=0.0, max_tokens=30, logit_bias=FEW, min_tokens=8, stop_token_ids=(9, 10)),
]


@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_sampled_answers_are_those_without_guesses(case: Case, speculate: str) -> None:
    if case.kernels.name != "native":
        pytest.skip("only the compiled kernels give the same bits in any batch")
    if "w" in case.kv_cache:
        pytest.skip("a window's sums depend on where in a step its query stands")
    for seed in range(6):
        same_when_sampled(case, speculate, seed)


def same_when_sampled(case: Case, speculate: str, seed: int) -> None:
    """Bit for bit, under random arrivals, preemptions and aborts."""
    rng = random.Random(seed)
    asked = [(prompts()[rng.randrange(9)] * rng.choice([1, 2]), rng.choice(SAMPLED)) for _ in range(8)]
    if speculate == "draft":  # which says the model's own best token
        asked = [(prompt, replace(p, logit_bias={9: 1.0}, temperature=p.temperature / 3)) for prompt, p in asked]
    alone = []
    for prompt, params in asked:
        engine = case.engine()
        engine.add(Request("r", prompt, params))
        alone.append(told(fake.drain(engine))["r"])
    sizes = {"page_size": rng.choice([3, 8]), "max_batch": 4, "max_step_tokens": rng.randint(8, 40)}
    engine = case.engine(160 // sizes["page_size"], lookahead=seed % 2, speculate=speculate, **sizes)
    outputs, aborted = [], set()
    for i, (prompt, params) in enumerate(asked):
        engine.add(Request(str(i), prompt, params))
        for _ in range(rng.randint(0, 5)):
            outputs += engine.step()
        victim = str(rng.randint(0, i))
        if rng.random() < 0.2 and engine.abort(victim):
            aborted.add(victim)
    outputs += fake.drain(engine)
    for name, (tokens, records) in told(outputs).items():
        expected, logs = alone[int(name)]
        if name in aborted:
            expected, logs = expected[: len(tokens)], logs[: len(records)]
        assert (tokens, records) == (expected, logs)
    assert engine.stats().drafted_tokens > engine.stats().accepted_tokens > 0


def told(outputs: list[Any]) -> dict[str, tuple[list[int], list[Any]]]:
    """Tokens and their log-probabilities by request."""
    found: dict[str, tuple[list[int], list[Any]]] = {}
    for output in outputs:
        tokens, records = found.setdefault(output.request_id, ([], []))
        tokens += output.tokens
        records += output.logprobs
    return found


def test_where_texts_part_rows_that_are_free_keep_a_room(case: Case) -> None:
    """Two answers that stand where their text parts hold two rooms each, and a third one comes."""
    engine = case.engine(60, page_size=1, max_batch=3, max_step_tokens=12, lookahead=1)
    answer(case, engine, [1, 1, 0], [0, 1, 0], n=2)


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, 8), min_size=1, max_size=7),
    pauses=st.lists(st.integers(0, 5), min_size=7, max_size=7),
    aborts=st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=7, max_size=7),
    pages=st.integers(9, 30),
    page_size=st.sampled_from([1, 3, 8, 16]),
    max_batch=st.integers(1, 5),
    max_step_tokens=st.integers(1, 40),
    lookahead=st.integers(0, 1),
    prefix_cache=st.booleans(),
    speculate=st.sampled_from(["", "ngram", "draft"]),
    n=st.sampled_from([1, 1, 2]),
)
def test_any_schedule(
    case: Case, order: list[int], pauses: list[int], aborts: list[int | None], pages: int, n: int, **sizes: Any
) -> None:
    pages = max(pages, -(-(48 + ANSWER) // sizes["page_size"]))
    answer(case, case.engine(pages, **sizes), order, pauses, aborts, n=n)
