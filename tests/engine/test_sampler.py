"""The sampler in the engine: what each parameter does to an answer, alone and next to other requests."""

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tenfold.engine import masks
from tenfold.engine.grammar import GrammarLimits
from tenfold.engine.masks import FEW, Masks, members
from tenfold.engine.request import Grammar, Request, SamplingParams
from tenfold.nn.step import Step
from tests.engine.fake import EOS, VOCAB, FakeModel, answers, drain, make_engine, next_token


class Fixed(FakeModel):
    """The same logits at every place, or logits made from the history."""

    def __init__(self, logits: Tensor | None = None) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, step: Step) -> Tensor:
        histories = self._run(step)
        return torch.stack([self.row(histories[i]) for i in step.logits_rows.tolist()])

    def row(self, history: list[int]) -> Tensor:
        if self.logits is not None:
            return self.logits
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(next_token(history))) * 2


def peaks(*tokens: int) -> Tensor:
    """Logits that fall from the first token named to the last, 1 a step, others far below."""
    logits = torch.full((VOCAB,), -20.0)
    for i, token in enumerate(tokens):
        logits[token] = 5.0 - i
    return logits


PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = (40, 41, 42)


def generate(params: SamplingParams, model: Any = None, prompt: tuple[int, ...] = PROMPT, **sizes: Any) -> list[int]:
    engine = make_engine(model or Fixed(), **sizes)
    engine.add(Request("r", prompt, params))
    return answers(drain(engine))["r", 0]


KINDS = [
    PARAMS,
    replace(PARAMS, temperature=0.9, seed=1),
    replace(PARAMS, temperature=1.5, seed=2, top_k=7),
    replace(PARAMS, temperature=0.8, seed=3, top_p=0.8, min_p=0.01),
    replace(PARAMS, temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.3),
    replace(PARAMS, temperature=1.0, seed=4, presence_penalty=1.1, logit_bias={5: 4.0, 6: -100.0}),
    replace(PARAMS, temperature=1.0, seed=5, logprobs=3, stop_token_ids=(9, 10), min_tokens=4),
    replace(PARAMS, temperature=2.0, seed=6, top_p=0.9999),
]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("pages", [64, 9])
def test_every_kind_of_request_answers_as_it_does_alone(lookahead: int, pages: int) -> None:
    """Together in changing batches, in chunks, preempted, one step ahead."""
    alone = [generate(p) for p in KINDS]
    engine = make_engine(Fixed(), pages, lookahead=lookahead, max_batch=6, max_step_tokens=7)
    outputs = []
    for i, params in enumerate(KINDS * 2):
        engine.add(Request(str(i), PROMPT, params))
        outputs += engine.step()
    outputs += drain(engine)
    got = answers(outputs)
    assert [got[str(i), 0] for i in range(len(KINDS) * 2)] == alone * 2
    assert (engine.stats().preemptions > 0) == (pages == 9)


def test_zero_temperature_takes_the_best() -> None:
    assert generate(PARAMS, Fixed(peaks(7, 8))) == [7] * 6


@pytest.mark.parametrize("temperature", [1e-8, 1e-36, 1e-40, 5e-324])
def test_temperatures_next_to_zero_take_the_best(temperature: float) -> None:
    for cuts in ({}, {"top_p": 0.9}, {"top_k": 5, "top_p": 5e-324, "min_p": 0.1}):
        params = replace(PARAMS, temperature=temperature, seed=3, **cuts)  # type: ignore[arg-type]
        assert generate(params) == generate(PARAMS)


def test_where_no_token_is_allowed_one_is_drawn_all_the_same() -> None:
    params = replace(PARAMS, temperature=1.0, top_p=0.9, min_tokens=3, stop_token_ids=tuple(range(VOCAB)))
    assert generate(params)


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    hot = replace(PARAMS, temperature=5.0, seed=1, max_tokens=40)
    model = Fixed(peaks(7, 8, 9, 10))
    assert set(generate(hot, model)) > {7, 8, 9}
    assert set(generate(replace(hot, top_k=2), model)) == {7, 8}
    assert set(generate(replace(hot, top_k=1), model)) == {7}
    assert set(generate(replace(hot, top_p=0.05), model)) == {7}
    assert set(generate(replace(hot, min_p=0.75), model)) == {7, 8}  # e^-0.2 = 0.82, e^-0.4 = 0.67


def test_seeds_repeat_and_differ() -> None:
    hot = replace(PARAMS, temperature=1.0, max_tokens=20)
    assert generate(replace(hot, seed=1)) == generate(replace(hot, seed=1))
    assert generate(replace(hot, seed=1)) != generate(replace(hot, seed=2))
    assert generate(hot) != generate(hot)
    assert len(generate(replace(hot, seed=-(2**63)))) == 20


def test_an_answer_does_not_use_one_random_number_twice() -> None:
    flat = Fixed(torch.zeros(VOCAB))
    assert len(set(generate(replace(PARAMS, temperature=1.0, seed=1, max_tokens=40), flat))) > 20


def test_presence_penalty_is_for_what_was_answered_not_asked() -> None:
    model = Fixed(peaks(40, 8, 9))
    assert generate(replace(PARAMS, presence_penalty=1.5), model) == [40, 8, 40, 40, 40, 40]


def test_frequency_penalty_grows_with_each_use() -> None:
    model = Fixed(peaks(7, 8))
    assert generate(replace(PARAMS, frequency_penalty=0.6), model) == [7, 7, 8, 7, 8, 7]


def test_repetition_penalty_is_for_prompt_and_answer() -> None:
    model = Fixed(peaks(40, 8, 9))
    assert generate(replace(PARAMS, repetition_penalty=2.0), model)[:3] == [8, 9, 40]


def test_penalties_survive_preemption() -> None:
    params = replace(PARAMS, frequency_penalty=0.6, max_tokens=12)
    alone = generate(params, Fixed(peaks(7, 8)))
    engine = make_engine(Fixed(peaks(7, 8)), pages=4, prefix_cache=False)
    for name in "ab":
        engine.add(Request(name, PROMPT, replace(params, max_tokens=12)))
    got = answers(drain(engine))
    assert engine.stats().preemptions > 0
    assert got == {("a", 0): alone, ("b", 0): alone}


def test_a_row_forgets_the_request_before() -> None:
    engine = make_engine(Fixed(peaks(7, 8, 40)), max_batch=1)
    params = replace(PARAMS, frequency_penalty=0.6, repetition_penalty=1.5)
    for name, prompt in (("a", (7, 8, 9)), ("b", PROMPT)):
        engine.add(Request(name, prompt, params))
    assert answers(drain(engine))["b", 0] == generate(params, Fixed(peaks(7, 8, 40)))


def test_penalties_follow_a_sequence_to_another_row() -> None:
    params = replace(PARAMS, frequency_penalty=0.6, max_tokens=12)
    engine = make_engine(Fixed(peaks(7, 8)))
    engine.add(Request("a", PROMPT, params))
    outputs = [o for _ in range(5) for o in engine.step()]
    (sequence,) = engine.scheduler.decoding
    row = sequence.row
    engine.scheduler._preempt(sequence)
    engine.add(Request("b", (7,) * 40, params, priority=-1))  # takes the row, and ends before it samples anything
    engine.step()
    engine.abort("b")
    engine.scheduler._free_rows.reverse()
    outputs += engine.step()
    assert sequence.row != row
    outputs += drain(engine)
    assert answers([o for o in outputs if o.request_id == "a"])["a", 0] == generate(params, Fixed(peaks(7, 8)))


def test_logit_bias_lifts_and_bans() -> None:
    model = Fixed(peaks(7, 8))
    assert generate(replace(PARAMS, logit_bias={8: 2.0}), model) == [8] * 6
    assert generate(replace(PARAMS, logit_bias={7: -100.0}), model) == [8] * 6


def test_nothing_ends_an_answer_before_min_tokens() -> None:
    model = Fixed(peaks(EOS, 8, 9))
    params = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=3, stop_token_ids=(8,))
    assert generate(params, model) == [9, 9, 9, EOS]
    assert generate(replace(params, min_tokens=0), model) == [EOS]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_taken_before_every_transform(temperature: float) -> None:
    logits = peaks(7, 8, 9)
    engine = make_engine(Fixed(logits))
    params = replace(PARAMS, temperature=temperature, top_k=1, logprobs=2, logit_bias={9: 50.0}, presence_penalty=2.0)
    engine.add(Request("r", PROMPT, params))
    outputs = drain(engine)
    logs = torch.log_softmax(logits, -1)
    assert [t for o in outputs for t in o.tokens] == [9] * 6
    for output in outputs:
        (record,) = output.logprobs
        assert record.token == 9
        assert record.logprob == pytest.approx(float(logs[9]))
        assert [t for t, _ in record.top] == [7, 8]
        assert [v for _, v in record.top] == pytest.approx([float(logs[7]), float(logs[8])])


def test_each_request_gets_as_many_best_tokens_as_it_asks_for() -> None:
    engine = make_engine(Fixed())
    for name, wanted in (("none", None), ("own", 0), ("five", 5)):
        engine.add(Request(name, PROMPT, replace(PARAMS, logprobs=wanted)))
    outputs = drain(engine)
    assert {len(o.logprobs) for o in outputs if o.request_id == "none"} == {0}
    assert {len(o.logprobs[0].top) for o in outputs if o.request_id == "own"} == {0}
    assert {len(o.logprobs[0].top) for o in outputs if o.request_id == "five"} == {5}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_log_probabilities_of_ids_asked_for_come_in_their_order(lookahead: int) -> None:
    """Next to requests that ask for others, or for none; without logprobs they mean logprobs=0."""
    logits = peaks(7, 8, 9)
    engine = make_engine(Fixed(logits), lookahead=lookahead)
    asked = {"none": (), "one": (9,), "many": (0, 8, 96, 8)}
    for name, ids in asked.items():
        wanted = 2 if name == "many" else None
        engine.add(Request(name, PROMPT, replace(PARAMS, logprobs=wanted, logprob_token_ids=ids, logit_bias={9: 50.0})))
    logs = torch.log_softmax(logits, -1)
    for output in drain(engine):
        ids = asked[output.request_id]
        assert len(output.logprobs) == bool(ids)
        for record in output.logprobs:
            assert record.asked == pytest.approx([float(logs[i]) for i in ids])
            assert (record.token, len(record.top)) == (9, 2 if output.request_id == "many" else 0)


def test_ids_asked_for_must_be_in_the_vocabulary() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=f"logprob_token_ids has token id {VOCAB}"):
        engine.add(Request("r", PROMPT, replace(PARAMS, logprob_token_ids=(1, VOCAB))))
    with pytest.raises(ValueError, match=r"logprob_token_ids is .*; allowed: up to 4096 token ids"):
        engine.add(Request("r", PROMPT, replace(PARAMS, logprob_token_ids=(1,) * 4097)))


class Every5th:
    """Stands for a grammar, and its matcher, that always allows the same 20 of 97 tokens."""

    ALLOWED = range(2, VOCAB, 5)
    limits = GrammarLimits()
    error = ""
    stopped = False

    def prepare(self, grammar: Grammar) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self)
        return future

    def too_slow(self, grammar: Grammar) -> str:
        return ""

    def copy(self) -> "Every5th":
        return self

    def advance(self, token: int) -> bool:
        assert token in self.ALLOWED
        return True

    @classmethod
    def compute(cls, masks: Masks, sequences: list[Any], bits: Any) -> None:
        for token in cls.ALLOWED:
            bits[:, token // 32] |= np.uint32(1 << token % 32)


def shares(params: SamplingParams, logits: Tensor) -> Any:
    """How often each token comes in 3000."""
    engine = make_engine(Fixed(logits), 1600, max_batch=100, max_step_tokens=128)
    engine.grammars = Every5th()  # type: ignore[assignment]
    engine.add(Request("r", PROMPT, replace(params, n=100, max_tokens=30)))
    tokens = [t for answer in answers(drain(engine)).values() for t in answer]
    assert len(tokens) == 3000
    return np.bincount(tokens, minlength=VOCAB) / len(tokens)


@pytest.mark.parametrize("few", [0, 160])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 4}, {"temperature": 0.0}])
def test_tokens_under_a_mask_are_drawn_as_if_the_others_were_impossible(
    few: int, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the work is saved: by looking at few tokens only, or by drawing without the mask first."""
    monkeypatch.setattr(masks, "FEW", few)
    monkeypatch.setattr(Masks, "_compute", lambda *given: Every5th.compute(*given))
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    banned = [i for i in range(VOCAB) if i not in Every5th.ALLOWED]
    logits[banned] -= 1.0  # about as likely as the allowed, all together
    params = replace(PARAMS, **{"temperature": 1.0, "seed": 1, **cut})
    got = shares(replace(params, grammar=Grammar("json_object")), logits)
    expected = shares(replace(params, logit_bias=dict.fromkeys(banned, -100.0)), logits)
    assert got == pytest.approx(expected, abs=0.03)
    assert (np.count_nonzero(got), np.count_nonzero(expected)) == (np.count_nonzero(expected),) * 2


@given(st.sets(st.integers(0, 3000), max_size=1100))
def test_members_are_the_bits_of_a_row(ids: set[int]) -> None:
    row = np.zeros(3001 // 32 + 1, np.uint32)
    for i in ids:
        row[i // 32] |= np.uint32(1 << i % 32)
    found = members(row)
    if len(ids) > FEW:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == sorted(ids)
