"""Guessing ahead: where guesses come from, which are right, how many pay, and that answers are the same with them."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.plan import Entry
from tenfold.engine.request import FinishReason, Request, SamplingParams
from tenfold.engine.speculate.ngram import LEAST, MOST, Lookup
from tenfold.engine.speculate.policy import UNCOUNTED, Costs, Load, Offer, Policy, Rates
from tenfold.engine.speculate.verify import Check, accepted, draws
from tests.engine.fake import (
    EOS,
    VOCAB,
    All,
    FakeDraft,
    FakeModel,
    FakeText,
    Guesses,
    Whim,
    answers,
    drain,
    make_engine,
    near_miss,
    next_token,
    reference,
    speculating,
    watch_drafts,
)
from tests.engine.test_sampler import KINDS, PARAMS, PROMPT, Fixed, generate, peaks

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
LOOKAHEAD = pytest.mark.parametrize("lookahead", [0, 1])


def ask(name: str = "r", prompt: tuple[int, ...] = (10, 11, 12), **values: Any) -> Request:
    return Request(name, prompt, values.pop("params", GREEDY), **values)


def one(engine: Any, request: Request) -> list[Any]:
    engine.add(request)
    return drain(engine)


def guessing(next: Callable[[list[int]], int] = next_token, policy: Any = None, **sizes: Any) -> Any:
    """An engine whose drafter says `next`; all of it is verified unless a policy says otherwise."""
    return speculating(make_engine(**{"speculate": "ngram"} | sizes), Guesses(next), policy or All())


# Guesses from the sequence itself


def looked_up(tokens: list[int]) -> tuple[int, int]:
    """By looking everywhere: the length of the longest match, and the token after its latest occurrence."""
    best, length = -1, 0
    for place in range(len(tokens) - 1):
        same = 0
        while same < MOST and same <= place and tokens[place - same] == tokens[len(tokens) - 1 - same]:
            same += 1
        if same >= max(length, LEAST):
            best, length = place, same
    return (tokens[best + 1], length) if length else (-1, 0)


@given(st.lists(st.integers(0, 2), max_size=14), st.lists(st.integers(0, 2), max_size=6))
def test_a_lookup_finds_the_longest_match_then_the_latest(first: list[int], then: list[int]) -> None:
    growing, tokens = Lookup(), list(first)
    growing.propose(tokens, 3)
    for token in then:
        tokens.append(token)
        proposed, length = growing.propose(tokens, 3)
        assert (proposed, length) == Lookup().propose(tokens, 3)
        expected, longest = looked_up(tokens)
        assert length == longest
        assert (proposed[0] if proposed else -1) == expected
        assert len(proposed) == (3 if longest else 0)


def test_a_lookup_goes_on_with_what_it_proposes() -> None:
    assert Lookup().propose([1, 2, 3, 1, 2, 3, 1, 2], 7) == ((3, 1, 2, 3, 1, 2, 3), 5)
    assert Lookup().propose([5, 5, 5], 4) == ((5, 5, 5, 5), 2)


def test_one_token_alone_is_no_ground_for_a_guess() -> None:
    assert Lookup().propose([1, 2, 3, 2], 4) == ((), 0)
    assert Lookup().propose([], 4) == ((), 0)
    assert Lookup().propose([1, 2, 1, 2], 0) == ((), 0)


# Which are right


def entry(drafts: tuple[int, ...], start: int = 5) -> Entry:
    sequence: Any = SimpleNamespace(tokens=list(range(start + 1)))
    return Entry(0, sequence, start, 1 + len(drafts), True, drafts)


def test_an_entry_with_drafts_is_drawn_once_for_each_and_once_more() -> None:
    plain, drafted = entry(()), entry((7, 8))
    got = draws([plain, drafted])
    assert got[0] is plain
    assert [(e.length, e.drafts) for e in got[1:]] == [(1, ()), (2, (7,)), (3, (7, 8))]
    assert drafted.tokens() == [5, 7, 8]
    assert drafted.undrafted() == entry(())._replace(sequence=drafted.sequence)


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), min_size=25, max_size=25),
)
def test_a_device_agrees_with_the_host_on_what_is_right(drafts: list[list[int]], drawn: list[int]) -> None:
    entries = [entry(tuple(d)) for d in drafts]
    tokens = torch.tensor(drawn[: sum(len(d) + 1 for d in drafts)])
    check = Check(entries, torch.device("cpu"))
    start, counts, last, kept = 0, [], [], []
    for own in drafts:
        part = tokens[start : start + len(own) + 1].tolist()
        counts.append(accepted(own, part))
        last.append(part[counts[-1]])
        kept += [i <= counts[-1] for i in range(len(part))]
        start += len(part)
    right = check.accepted(tokens)
    assert right.tolist() == counts
    assert check.last(tokens, right).tolist() == last
    assert check.kept(right).tolist() == kept


# Answers


@LOOKAHEAD
@pytest.mark.parametrize("next", [next_token, near_miss, lambda history: 1], ids=["right", "mostly", "wrong"])
def test_answers_are_those_without_guesses(lookahead: int, next: Callable[[list[int]], int]) -> None:
    engine = guessing(next, lookahead=lookahead, max_step_tokens=32)
    for i in range(6):
        engine.add(ask(str(i), (20 + i, 21, 22)))
    assert answers(drain(engine)) == {(str(i), 0): reference((20 + i, 21, 22), 23) for i in range(6)}
    stats = engine.stats()
    assert stats.drafted_tokens > 0
    assert (stats.accepted_tokens == 0) == (next([]) == 1 == next([2]))


def test_right_guesses_save_steps_and_come_together() -> None:
    engine = guessing(max_model_len=64)
    outputs = one(engine, ask(params=replace(GREEDY, ignore_eos=True)))
    assert [len(o.tokens) for o in outputs] == [1, 5, 5, 5, 4]
    assert engine.stats().steps == 5
    assert (engine.stats().drafted_tokens, engine.stats().accepted_tokens) == (15, 15)


@pytest.mark.parametrize("count", range(1, 9))
def test_an_answer_has_no_token_too_many(count: int) -> None:
    outputs = one(guessing(), ask(params=replace(GREEDY, max_tokens=count, ignore_eos=True)))
    assert answers(outputs)["r", 0] == reference((10, 11, 12), 3 + count, ())
    assert outputs[-1].finish is FinishReason.LENGTH
    engine = guessing(max_model_len=3 + count)
    assert len(answers(one(engine, ask(params=replace(GREEDY, max_tokens=None, ignore_eos=True))))["r", 0]) == count


@pytest.mark.parametrize("place", range(1, 6))
def test_what_follows_a_stop_in_the_middle_of_a_step_is_dropped(place: int) -> None:
    full = reference((10, 11, 12), 23, ())
    assert full.index(full[place]) == place
    outputs = one(guessing(text=FakeText()), ask(params=replace(GREEDY, stop_token_ids=(full[place],))))
    assert answers(outputs)["r", 0] == full[: place + 1]
    assert (outputs[-1].finish, outputs[-1].stop) == (FinishReason.STOP, full[place])
    string = chr(full[place] + 32)
    outputs = one(guessing(text=FakeText()), ask(params=replace(GREEDY, stop=(string,), ignore_eos=True)))
    assert answers(outputs)["r", 0] == full[: place + 1]
    assert "".join(o.text for o in outputs) == "".join(chr(t + 32) for t in full[:place])
    assert (outputs[-1].finish, outputs[-1].stop) == (FinishReason.STOP, string)


def test_several_answers_and_the_prompts_logprobs() -> None:
    engine = guessing(near_miss, max_batch=6, max_step_tokens=40)
    prompt = tuple(range(20, 30))
    outputs = one(engine, ask(prompt=prompt, params=replace(GREEDY, n=3, logprobs=2, prompt_logprobs=1)))
    plain = one(
        make_engine(max_batch=6), ask(prompt=prompt, params=replace(GREEDY, n=3, logprobs=2, prompt_logprobs=1))
    )
    assert answers(outputs) == answers(plain)
    assert engine.stats().accepted_tokens > 0

    def records(outputs: list[Any], index: int) -> list[Any]:
        return [r for o in outputs if o.index == index for r in o.logprobs]

    for index in range(3):
        assert records(outputs, index) == records(plain, index)
        assert [r.token for r in records(outputs, index)] == answers(outputs)["r", index]
    assert [o.prompt_logprobs for o in outputs if o.prompt_logprobs] == [
        o.prompt_logprobs for o in plain if o.prompt_logprobs
    ]


@LOOKAHEAD
@pytest.mark.parametrize("pages", [64, 12])
@pytest.mark.parametrize("every", [1, 3, 5])
def test_every_kind_of_sampling_draws_what_it_draws_alone(lookahead: int, pages: int, every: int) -> None:
    """Temperature, cuts, penalties, bias, min_tokens: guesses are right but for one in `every`."""
    kinds = [replace(p, max_tokens=12, min_tokens=min(p.min_tokens, 4)) for p in KINDS]
    alone = [generate(p, Fixed()) for p in kinds]
    script = {str(i): [*PROMPT, *alone[i % len(kinds)]] for i in range(2 * len(kinds))}

    class Script(Guesses):
        def draft(self, wanted: Any) -> Any:
            for sequence, count in wanted.items():
                known = len(sequence.tokens)
                text = script[sequence.request.id][known : known + count]
                guess = tuple((t + ((known + i) % every == 1)) % VOCAB for i, t in enumerate(text))
                sequence.guess.propose(known, guess)
            return {sequence: sequence.guess.tokens for sequence in wanted}

    sizes = {"max_batch": 6, "max_step_tokens": 27, "page_size": 3, "speculate": "ngram"}
    engine = speculating(make_engine(Fixed(), pages, lookahead=lookahead, **sizes), Script(), Whim())
    outputs = []
    for i, params in enumerate(kinds * 2):
        engine.add(Request(str(i), PROMPT, params))
        outputs += engine.step()
    outputs += drain(engine)
    got = answers(outputs)
    assert [got[str(i), 0] for i in range(2 * len(kinds))] == alone * 2
    assert engine.stats().accepted_tokens > 10
    assert (engine.stats().preemptions > 0) == (pages == 12)


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 3.0}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.4}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_penalties_know_the_guesses_before_each_place_and_forget_wrong_ones(penalty: dict[str, float]) -> None:
    """Each token lowers its own odds, so any that is counted twice or not at all changes what follows."""
    params = replace(PARAMS, max_tokens=16, **penalty)
    model = Fixed(peaks(5, 6, 7, 8) * 0.4)
    answer = generate(params, model)
    assert len(set(answer)) > 2
    right = guessing(lambda history: answer[(len(history) - 3) % 16], model=model)
    mixed = guessing(lambda h: 5 if len(h) % 3 == 0 else answer[(len(h) - 3) % 16], model=model)
    for engine in (right, mixed):
        assert answers(one(engine, Request("r", PROMPT, params)))["r", 0] == answer
        assert engine.stats().accepted_tokens > 4


def test_a_pool_is_not_guessed() -> None:
    engine = guessing()
    engine.add(ask("pool", tuple(range(20, 60)), pool="mean"))
    engine.step()
    assert engine.scheduler.running == 1
    assert not engine.speculator._offers(engine.scheduler)
    drain(engine)
    assert engine.stats().drafted_tokens == 0


# Pages


def test_a_page_of_wrong_guesses_is_never_shared_and_one_of_right_ones_is() -> None:
    full = reference((10, 11, 12), 23, ())
    params = replace(GREEDY, max_tokens=7, ignore_eos=True)
    wrong = guessing(lambda history: 50, page_size=2)
    one(wrong, ask(params=params))
    assert one(wrong, ask(prompt=(10, 11, 12, full[0], 50, 50, 50, 50), params=params))[0].cached_tokens == 4
    assert one(wrong, ask(prompt=(10, 11, 12, *full[:7], 60), params=params))[0].cached_tokens == 8
    right = guessing(page_size=2)
    one(right, ask(params=params))
    assert one(right, ask(prompt=(10, 11, 12, *full[:7], 60), params=params))[0].cached_tokens == 8
    assert wrong.stats().pages_used == right.stats().pages_used == 0


def test_guesses_take_no_page_and_no_place_that_another_needs() -> None:
    engine = guessing(pages=3, page_size=4, max_model_len=12)
    engine.add(ask("a", (1, 2, 3), params=replace(GREEDY, max_tokens=6, ignore_eos=True)))
    engine.add(ask("b", (4, 5, 6), params=replace(GREEDY, max_tokens=6, ignore_eos=True)))
    engine.step()  # both have their prompts: two pages of three, and the next token fills the first of each
    assert engine.stats().pages_used == 2
    engine.step()
    outputs = drain(engine)
    assert {o.request_id: o.finish for o in outputs if o.finish} == dict.fromkeys("ab", FinishReason.LENGTH)
    small = guessing(max_step_tokens=4, max_batch=4)
    small.add(ask("a"))
    small.step()
    small.add(ask("b", tuple(range(20, 40))))
    plan = small.scheduler.plan
    plans: list[Any] = []
    small.scheduler.plan = lambda drafts=None: plans.append(plan(drafts)) or plans[-1]
    drain(small)
    assert all(p.tokens <= 4 for p in plans)
    assert all(p.drafts <= 1 for p in plans if any(e.start < 20 and e.sequence.request.id == "b" for e in p.entries))


@LOOKAHEAD
def test_guesses_can_be_verified_as_decodes(lookahead: int) -> None:
    """As on a GPU: so many requests of one token, padded."""
    model = FakeModel()
    engine = guessing(near_miss, model=model, lookahead=lookahead, max_step_tokens=32)
    engine.runner.rows.apart = True
    for i in range(3):
        engine.add(ask(str(i), (20 + i, 21, 22)))
    assert answers(drain(engine)) == {(str(i), 0): reference((20 + i, 21, 22), 23) for i in range(3)}
    assert engine.stats().accepted_tokens > 10
    assert max(max(step) for step in model.steps[1:]) == 1
    assert max(map(len, model.steps)) > 4


# Faults


def test_a_guess_that_breaks_a_step_harms_nobody() -> None:
    model = FakeModel()
    full = reference((10, 11, 12), 23, ())
    bad = next(t for t in range(4, VOCAB) if t not in full and t not in (10, 11, 12))
    model.fail_on = bad
    engine = guessing(lambda history: bad, model=model)
    outputs = one(engine, ask(params=replace(GREEDY, ignore_eos=True)))
    assert answers(outputs)["r", 0] == full
    assert engine.stats().errors == 0


def test_a_drafter_that_fails_is_given_up() -> None:
    engine = guessing(lambda history: 1 // 0)
    outputs = one(engine, ask())
    assert answers(outputs)["r", 0] == reference((10, 11, 12), 23)
    assert engine.speculator is None
    assert engine.stats().drafted_tokens == 0


def test_what_was_guessed_stays_counted_when_a_drafter_is_given_up() -> None:
    def guess(history: list[int]) -> int:
        return next_token(history) if len(history) < 12 else 1 // 0

    engine = guessing(guess)
    one(engine, ask())
    assert engine.speculator is None
    stats = engine.stats()
    assert stats.drafted_tokens >= stats.accepted_tokens > 0


def test_a_draft_model_that_cannot_run_is_noticed_at_warm_up() -> None:
    draft = FakeDraft()
    draft.fail_on = 0
    with pytest.raises(RuntimeError, match="The draft model tiny cannot run"):
        make_engine(draft=draft, speculate="tiny").warm_up()
    good = make_engine(draft=FakeDraft(), speculate="tiny")
    good.warm_up()
    assert (good.stats().drafted_tokens, good.stats().steps) == (0, 0)


def test_a_named_model_must_be_given() -> None:
    with pytest.raises(ValueError, match="speculate is 'tiny', but no such model was given"):
        make_engine(speculate="tiny")


# A draft model


class Twin(FakeDraft):
    """Says just what the model says, from its own store."""

    def forward(self, step: Any) -> Any:
        return FakeModel.forward(self, step)


@LOOKAHEAD
@pytest.mark.parametrize("page_size", [1, 4, 5])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_draft_model_reads_all_it_needs_and_nothing_twice(lookahead: int, page_size: int, prefix_cache: bool) -> None:
    """Its guesses are all right, so it has read all; prompts it shares with others it has read once."""
    twin = Twin()
    sizes = {"page_size": page_size, "prefix_cache": prefix_cache, "lookahead": lookahead}
    engine = make_engine(draft=twin, speculate="twin", max_step_tokens=40, max_batch=4, pages=160, **sizes)
    speculating(engine, policy=All())
    prompt = tuple(range(20, 41))
    params = replace(GREEDY, max_tokens=11, ignore_eos=True)
    engine.add(ask("a", prompt, params=replace(params, n=2)))
    engine.add(ask("b", (*prompt, 50, 51), params=params))
    outputs = drain(engine)
    first = sum(map(sum, twin.steps))
    outputs += one(engine, ask("c", (*prompt, 60), params=params))
    stats = engine.stats()
    assert all(answers(outputs)[name, 0][:5] for name in "abc")
    assert answers(outputs)["a", 1] == reference(prompt, 32, ())
    assert stats.accepted_tokens == stats.drafted_tokens > 0
    whole = -(-21 // page_size)
    assert first <= (21 + page_size + 2 + 23) + 3 * (page_size + 16) + (0 if prefix_cache else 21)
    again = sum(map(sum, twin.steps)) - first
    assert again <= 16 + (21 % page_size + page_size if prefix_cache else 22 + whole)


def test_of_sequences_that_share_pages_the_first_reads_them_for_all() -> None:
    twin = Twin()
    engine = speculating(make_engine(draft=twin, speculate="twin", max_step_tokens=64), policy=All())
    speculator, engine.speculator = engine.speculator, None
    prompt = tuple(range(20, 36))
    params = replace(GREEDY, max_tokens=30, ignore_eos=True)
    engine.add(ask("a", prompt, params=params))
    engine.step()
    engine.add(ask("b", (*prompt, 50), params=params))
    for _ in range(3):
        engine.step()
    engine.speculator = speculator
    outputs = [o for _ in range(2) for o in engine.step()]
    assert {o.request_id for o in outputs if len(o.tokens) > 1} == {"a", "b"}
    assert sum(map(sum, twin.steps)) < 16 + 2 * (4 + 8 + 8)
    drain(engine)
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens


@pytest.mark.parametrize("seed", range(24))
def test_a_draft_model_never_takes_one_page_for_another(seed: int) -> None:
    """Prompts that begin alike, few pages, preemptions, aborts: it says what its store says, so that must be right."""
    rng = random.Random(seed)
    base = rng.choices(range(4, VOCAB), k=24)
    sizes = {"page_size": rng.choice([1, 2, 4]), "lookahead": rng.randint(0, 1), "prefix_cache": rng.random() < 0.7}
    pages = rng.randint(36, 60) // sizes["page_size"]
    sizes |= {"max_model_len": 36, "max_step_tokens": rng.randint(6, 40), "max_batch": rng.randint(2, 5)}
    engine = speculating(make_engine(draft=FakeDraft(), speculate="small", pages=pages, **sizes))
    watch_drafts(engine)
    prompts = [(*base[: rng.choice([0, 8, 24])], *rng.choices(range(4, VOCAB), k=rng.randint(1, 6))) for _ in range(14)]
    params = [replace(GREEDY, max_tokens=rng.randint(1, 30), n=rng.choice([1, 1, 2])) for _ in prompts]
    outputs, aborted = [], set()
    for i, prompt in enumerate(prompts):
        engine.add(ask(str(i), prompt, params=params[i], priority=rng.choice([0, 0, 1])))
        for _ in range(rng.randint(0, 4)):
            outputs += engine.step()
        if rng.random() < 0.2:
            victim = str(rng.randint(0, i))
            aborted |= {victim} if engine.abort(victim) else set()
    outputs += drain(engine)
    for (name, _), tokens in answers(outputs).items():
        expected = reference(prompts[int(name)], min(36, len(prompts[int(name)]) + (params[int(name)].max_tokens or 0)))
        assert tokens == (expected[: len(tokens)] if name in aborted else expected)


def test_a_draft_model_reads_long_prompts_in_chunks() -> None:
    twin = Twin()
    engine = speculating(make_engine(draft=twin, speculate="twin", max_step_tokens=8), policy=All())
    prompt = tuple(range(20, 50))
    outputs = one(engine, ask(prompt=prompt, params=replace(GREEDY, ignore_eos=True)))
    assert answers(outputs)["r", 0] == reference(prompt, 50, ())
    assert max(map(sum, twin.steps)) <= 8
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens > 0


def test_a_draft_model_of_a_shorter_context_or_vocabulary_guesses_as_far_as_it_can() -> None:
    short = Twin(max_positions=20)
    engine = speculating(make_engine(draft=short, speculate="twin"), policy=All())
    assert answers(one(engine, ask(params=replace(GREEDY, max_tokens=40, ignore_eos=True))))["r", 0] == reference(
        (10, 11, 12), 43, ()
    )
    assert 0 < engine.stats().drafted_tokens <= 17
    narrow = Twin()
    narrow.config.vocab_size = 60
    engine = speculating(make_engine(draft=narrow, speculate="twin"), policy=All())
    full = reference((10, 11, 12), 23, ())
    assert max(full) >= 60
    assert answers(one(engine, ask(params=replace(GREEDY, ignore_eos=True))))["r", 0] == full


# How many pay


def test_costs_are_straight_lines_between_what_was_measured() -> None:
    costs = Costs()
    assert costs.seconds(3) is None
    for tokens, seconds in ((2, 4.0), (6, 8.0)):
        for _ in range(UNCOUNTED):
            costs.add(tokens, 99.0)
        costs.add(tokens, seconds)
    assert [costs.seconds(n) for n in (1, 2, 4, 6, 100)] == [4.0, 4.0, 6.0, 8.0, 8.0]
    for _ in range(UNCOUNTED):
        costs.add(4, 1.0)
    costs.add(4, 2.0)  # faster than 2 tokens: both count as what they take on average
    assert [costs.seconds(n) for n in (2, 3, 4, 6)] == [3.0, 3.0, 3.0, 8.0]


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0.001, 10)), max_size=40))
def test_costs_never_fall(measured: list[tuple[int, float]]) -> None:
    costs = Costs()
    for tokens, seconds in measured:
        costs.add(tokens, seconds)
    known = [s for n in range(1, 700, 7) if (s := costs.seconds(n)) is not None]
    assert all(a <= b + 1e-9 for a, b in pairwise(known))


def measured(step: Callable[[int], float], draft: float = 0.0) -> Policy:
    """A policy that knows what steps take, and believes the odds."""
    policy = Policy()
    for tokens in range(1, 70):
        for _ in range(UNCOUNTED + 1):
            policy.steps.add(tokens, step(tokens))
            policy.draft.add(tokens, draft)
    policy.promise([(1.0, 1000)])
    policy.keep(1000)
    return policy


@pytest.mark.parametrize(
    ("step", "odds", "rows", "expected"),
    [
        (lambda n: 1.0, 0.9, 1, 4),  # tokens cost nothing: all there are
        (lambda n: 1.0, 0.0, 1, 0),  # but not those that are never right
        (lambda n: float(n), 0.9, 1, 0),  # a step as slow as it is long: none
        (lambda n: 1.0 + 0.5 * n, 0.9, 1, 4),
        (lambda n: 1.0 + 0.5 * n, 0.4, 1, 0),
        (lambda n: 1.0 + 0.25 * n, 0.7, 1, 3),
        (lambda n: 1.0 if n <= 8 else 2.0, 0.9, 6, 2),  # room for two more until it gets slower
        (lambda n: 1.0 if n <= 8 else 2.0, 0.9, 8, 0),
    ],
)
def test_as_many_drafts_as_pay(step: Callable[[int], float], odds: float, rows: int, expected: int) -> None:
    assert measured(step).choose([Offer(4, odds)], Load(rows, rows), 64) == [expected]


def test_drafts_go_where_the_odds_are_and_within_what_fits() -> None:
    policy = measured(lambda n: 1.0)
    assert policy.choose([Offer(4, 0.5), Offer(4, 0.9)], Load(2, 2), 5) == [1, 4]
    assert policy.choose([Offer(4, 0.5), Offer(2, 0.9)], Load(2, 2), 0) == [0, 0]
    cheap = measured(lambda n: 1.0 + 0.3 * n)
    assert cheap.choose([Offer(4, 0.1), Offer(4, 0.95)], Load(2, 2), 64) == [0, 4]


def test_a_draft_model_must_earn_its_own_time() -> None:
    assert measured(lambda n: 1.0, draft=0.1).choose([Offer(4, 0.9)], Load(1, 1), 64) == [4]
    assert measured(lambda n: 1.0, draft=0.5).choose([Offer(4, 0.9)], Load(1, 1), 64) == [3]
    assert measured(lambda n: 1.0, draft=2.0).choose([Offer(4, 0.9)], Load(1, 1), 64) == [0]


def test_waiting_for_the_host_must_be_earned_too() -> None:
    policy = measured(lambda n: 1.5)
    for _ in range(UNCOUNTED + 1):
        policy.ahead.add(1, 1.0)
    assert policy.choose([Offer(1, 0.5)], Load(1, 1, behind=True), 64) == [0]
    assert policy.choose([Offer(1, 0.9)], Load(1, 1, behind=True), 64) == [1]
    assert policy.choose([Offer(1, 0.5)], Load(1, 1), 64) == [1]


def test_promises_that_were_not_kept_are_believed_less() -> None:
    policy = measured(lambda n: 1.0 + 0.3 * n)
    assert policy.choose([Offer(4, 0.8)], Load(1, 1), 64) != [0]
    for _ in range(400):
        policy.promise([(0.8, 4)])
    assert policy.choose([Offer(4, 0.8)], Load(1, 1), 64) == [0]


def test_rates_remember_and_fall_back_on_the_prior() -> None:
    rates = Rates(2)
    assert rates.odds(0, 0.5) == 0.5
    for _ in range(200):
        rates.add(0, 1, 0, 0.97)
    assert rates.odds(0, 0.5) < 0.1
    assert rates.odds(1, 0.5) == 0.5
    for _ in range(500):
        rates.fade(0.98)
    assert rates.odds(0, 0.5) > 0.49


def paced(engine: Any, step: Callable[[int], float]) -> Any:
    """The engine's steps take what `step` says."""
    engine.speculator.policy = measured(step)
    engine.speculator.took = lambda tokens, seconds, waited: None
    return engine


@LOOKAHEAD
def test_drafting_stops_where_guesses_are_wrong(lookahead: int) -> None:
    engine = paced(guessing(lambda history: 1, lookahead=lookahead, max_model_len=600, pages=160), lambda n: 1 + n / 4)
    outputs = one(engine, ask(params=replace(GREEDY, max_tokens=500, ignore_eos=True)))
    assert answers(outputs)["r", 0] == reference((10, 11, 12), 503, ())
    assert 0 < engine.stats().drafted_tokens < 50
    assert engine.stats().accepted_tokens < 5


@LOOKAHEAD
def test_drafting_stops_where_steps_are_bound_by_arithmetic_and_is_tried_again(lookahead: int) -> None:
    engine = paced(guessing(lookahead=lookahead, max_model_len=600, pages=160), lambda n: float(n))
    outputs = one(engine, ask(params=replace(GREEDY, max_tokens=500, ignore_eos=True)))
    assert answers(outputs)["r", 0] == reference((10, 11, 12), 503, ())
    assert 0 < engine.stats().drafted_tokens <= 12  # after 64, 128 and 256 steps without
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens


def test_one_step_ahead_unless_drafts_pay() -> None:
    engine = paced(guessing(lambda history: 1, lookahead=1, max_model_len=600, pages=160), lambda n: 1 + n / 4)
    engine.add(ask(params=replace(GREEDY, max_tokens=500, ignore_eos=True)))
    flying = []
    for _ in range(120):
        engine.step()
        flying.append(len(engine._inflight))
    assert flying[-20:].count(1) >= 19
    eager = guessing(lookahead=1)
    eager.add(ask(params=replace(GREEDY, ignore_eos=True)))
    eager.step()
    eager.step()
    assert eager.step()[0].tokens
    assert not eager._inflight


def test_lookups_are_judged_without_being_verified() -> None:
    class Cycle(FakeModel):
        """A period of 6 tokens."""

        def forward(self, step: Any) -> Any:
            histories = self._run(step)
            logits = torch.zeros(len(step.logits_rows), VOCAB)
            for i, row in enumerate(step.logits_rows.tolist()):
                logits[i, 10 + len(histories[row]) % 6] = 9.0
            return logits

    engine = paced(make_engine(Cycle(), speculate="ngram", pages=160, max_model_len=600), float)
    speculator = engine.speculator
    one(engine, ask(params=replace(GREEDY, max_tokens=60)))
    assert engine.stats().drafted_tokens == 0
    assert speculator.rates.odds(MOST, 0.0) > 0.8
    speculator.policy = measured(lambda n: 1.0)
    steps = engine.stats().steps
    one(engine, ask(params=replace(GREEDY, max_tokens=60)))
    assert engine.stats().steps - steps < 25
    assert engine.stats().accepted_tokens > 40


def test_end_tokens_are_guessed_as_any_other() -> None:
    prompt = next(p for p in ((a, b) for a in range(VOCAB) for b in range(VOCAB)) if EOS in reference(p, 6)[1:4])
    outputs = one(guessing(), ask(prompt=prompt))
    assert answers(outputs)["r", 0] == reference(prompt, 22)
    assert outputs[-1].stop == EOS


# Loading


def load(path: Path, **values: Any) -> Engine:
    sizes = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "max_batch": 2, "threads": 1}
    return Engine.load(EngineConfig(str(path), **sizes, **values))


def test_a_draft_model_is_loaded_beside_the_other(tiny: Callable[[str], Path]) -> None:
    plain = load(tiny("llama"))
    engine = load(tiny("llama"), speculate=str(tiny("llama")))
    twice = load(tiny("llama"), speculate=str(tiny("llama-mqa")))
    assert engine.memory is not None
    assert plain.memory is not None
    assert engine.memory.weights == 2 * plain.memory.weights
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    expected = answers(one(plain, ask(params=params)))
    for other in (engine, twice):
        other.speculator.policy = All()  # type: ignore[union-attr]
        assert answers(one(other, ask(params=params))) == expected
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens > 10
    assert twice.stats().accepted_tokens < twice.stats().drafted_tokens


def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<unused3>"', '"<unlike>"'))
    with pytest.raises(ValueError, match=r"whose vocabulary of 320 tokens is not that of .* 1 of them missing"):
        load(tiny("llama"), speculate=str(other))


def test_a_draft_model_that_is_not_there_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"speculate is .*nothing'; allowed: '', ngram or the name of a model"):
        load(tiny("llama"), speculate=str(tmp_path / "nothing"))


@pytest.mark.real_model
def test_a_real_model_repeats_a_text_in_fewer_steps(smollm2_path: Path) -> None:
    engine = speculating(load(smollm2_path, speculate="ngram"), policy=All())
    assert engine.text is not None
    sentence = "The Aurora came with salt, the Beatrice with timber, the Cormorant with coal, the Delphin with rope. "
    prompt = tuple(engine.text.encode(sentence * 3 + "The Aurora came"))  # 24 tokens before the sentence's end
    speculator, found, steps = engine.speculator, [], []
    for speculates in (False, True):
        engine.speculator = speculator if speculates else None
        before = engine.stats().steps
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        found.append(one(engine, Request("r", prompt, params)))
        steps.append(engine.stats().steps - before)
    plain, guessed = ("".join(o.text for o in outputs) for outputs in found)
    assert plain == guessed
    assert "Beatrice with timber" in guessed
    assert answers(found[0]) == answers(found[1])
    assert engine.stats().accepted_tokens > 12
    assert steps[1] < steps[0] / 3


def test_logs_of_a_prompt_are_its_own_beside_drafts() -> None:
    """Each draft has logits in front of those of the prompt."""

    def logs(drafts: bool) -> list[float]:
        engine = make_engine(max_step_tokens=32, max_model_len=96)
        if drafts:
            speculating(engine, Guesses(), All())
        engine.add(ask("a", params=SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)))
        outputs = [output for _ in range(4) for output in engine.step()]
        prompt = (9, *reference((9,), 7))  # as the model goes on itself, so that every token is likely
        engine.add(ask("b", prompt, params=SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)))
        outputs += drain(engine)
        assert drafts == bool(engine.stats().drafted_tokens)
        (found,) = [o.prompt_logprobs for o in outputs if o.prompt_logprobs]
        return [one.logprob for one in found if one]

    assert logs(drafts=True) == pytest.approx(logs(drafts=False), abs=1e-4)
