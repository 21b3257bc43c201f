"""The engine from outside: what requests get, refusals, ends in every phase, faults, statistics."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tenfold.engine import scheduler
from tenfold.engine.core import QueueFull
from tenfold.engine.request import FinishReason, Output, Request, SamplingParams
from tests.engine.fake import EOS, VOCAB, Clock, FakeModel, FakeText, answers, drain, make_engine, next_token, reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=5)
LOOKAHEAD = pytest.mark.parametrize("lookahead", [0, 1])


def ask(name: str = "r", prompt: tuple[int, ...] = (10, 11, 12), **values: Any) -> Request:
    return Request(name, prompt, values.pop("params", GREEDY), **values)


def one(engine: Any, request: Request) -> list[Output]:
    engine.add(request)
    return drain(engine)


# Answers


@LOOKAHEAD
def test_an_answer_ends_at_max_tokens(lookahead: int) -> None:
    outputs = one(make_engine(lookahead=lookahead), ask())
    assert answers(outputs) == {("r", 0): reference((10, 11, 12), 8)}
    assert outputs[-1].finish is FinishReason.LENGTH
    assert outputs[-1].stop is None
    assert [len(o.tokens) for o in outputs] == [1] * 5


@LOOKAHEAD
def test_an_answer_ends_at_the_context(lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead, max_model_len=12)
    outputs = one(engine, ask(params=SamplingParams(temperature=0.0, ignore_eos=True)))
    assert len(answers(outputs)["r", 0]) == 9
    assert outputs[-1].finish is FinishReason.LENGTH


@LOOKAHEAD
def test_an_end_token_ends_it_and_is_told(lookahead: int) -> None:
    prompt = next(p for p in ((a, b) for a in range(VOCAB) for b in range(VOCAB)) if next_token(p) == EOS)
    engine = make_engine(lookahead=lookahead)
    outputs = one(engine, ask(prompt=prompt))
    assert [o.tokens for o in outputs] == [(EOS,)]
    assert (outputs[0].finish, outputs[0].stop) == (FinishReason.STOP, EOS)
    ignored = one(engine, ask(prompt=prompt, params=replace(GREEDY, ignore_eos=True)))
    assert len(answers(ignored)["r", 0]) == 5


@LOOKAHEAD
def test_stop_token_ids_end_it(lookahead: int) -> None:
    full = reference((10, 11, 12), 8)
    outputs = one(make_engine(lookahead=lookahead), ask(params=replace(GREEDY, stop_token_ids=(full[2],))))
    assert answers(outputs)["r", 0] == full[:3]
    assert (outputs[-1].finish, outputs[-1].stop) == (FinishReason.STOP, full[2])


@LOOKAHEAD
def test_a_stop_string_ends_it_when_the_text_layer_says_so(lookahead: int) -> None:
    full = reference((10, 11, 12), 8)
    engine = make_engine(text=FakeText(), lookahead=lookahead)
    outputs = one(engine, ask(params=replace(GREEDY, stop=(chr(full[1] + 32),))))
    assert answers(outputs)["r", 0] == full[:2]
    assert "".join(o.text for o in outputs) == chr(full[0] + 32)
    assert (outputs[-1].finish, outputs[-1].stop) == (FinishReason.STOP, chr(full[1] + 32))


def test_text_held_back_comes_with_the_end() -> None:
    full = reference((10, 11, 12), 8)
    outputs = one(make_engine(text=FakeText()), ask())
    assert "".join(o.text for o in outputs) == "".join(chr(t + 32) for t in full)
    assert outputs[0].text == ""


def test_a_stop_token_is_text_only_where_asked_for() -> None:
    full = reference((10, 11, 12), 8)
    params = replace(GREEDY, stop_token_ids=(full[1],))
    hidden = one(make_engine(text=FakeText()), ask(params=params))
    shown = one(make_engine(text=FakeText()), ask(params=replace(params, include_stop=True)))
    assert "".join(o.text for o in hidden) == chr(full[0] + 32)
    assert "".join(o.text for o in shown) == chr(full[0] + 32) + chr(full[1] + 32)


@LOOKAHEAD
def test_n_answers_share_the_prompts_pages(lookahead: int) -> None:
    model = FakeModel()
    engine = make_engine(model, lookahead=lookahead, prefix_cache=False)
    prompt = tuple(range(20, 30))
    outputs = one(engine, ask(prompt=prompt, params=replace(GREEDY, n=3)))
    assert answers(outputs) == {("r", i): reference(prompt, 15) for i in range(3)}
    computed = sum(sum(step) for step in model.steps)
    assert (
        computed <= 10 + 2 * 1 + 3 * 4 + 3 * lookahead
    )  # the prompt once, and its last token again for each other answer
    assert engine.stats().pages_used == 0


def test_answers_of_one_request_differ_by_their_seeds_and_repeat() -> None:
    class Flat(FakeModel):
        def forward(self, step: Any) -> Any:
            return super().forward(step) * 0

    params = SamplingParams(max_tokens=8, n=3, seed=7, ignore_eos=True)
    first = answers(one(make_engine(Flat()), ask(params=params)))
    again = answers(one(make_engine(Flat(), max_step_tokens=2), ask(params=params)))
    single = answers(one(make_engine(Flat()), ask(params=replace(params, n=1, seed=8))))
    assert first == again
    assert len({tuple(a) for a in first.values()}) == 3
    assert single["r", 0] == first["r", 1]
    unseeded = [answers(one(make_engine(Flat()), ask(params=replace(params, n=1, seed=None)))) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


# The prefix cache


@LOOKAHEAD
def test_a_known_beginning_is_not_computed_again(lookahead: int) -> None:
    model = FakeModel()
    engine = make_engine(model, lookahead=lookahead)
    prompt = tuple(range(20, 34))  # three full pages of 4 and a rest
    first = one(engine, ask(prompt=prompt))
    model.steps.clear()
    second = one(engine, ask(prompt=prompt))
    assert answers(first) == answers(second)
    assert (first[0].cached_tokens, second[0].cached_tokens) == (0, 12)
    assert [o.cached_tokens for o in second[1:]] == [0] * (len(second) - 1)
    assert model.steps[0] == [2]
    assert engine.stats().prefix_hit_tokens == 12


def test_a_wholly_known_prompt_computes_its_last_token_in_a_page_of_its_own() -> None:
    model = FakeModel()
    engine = make_engine(model)
    prompt = tuple(range(20, 28))
    first = one(engine, ask(prompt=prompt))
    model.steps.clear()
    second = one(engine, ask(prompt=prompt))
    assert answers(first) == answers(second)
    assert second[0].cached_tokens == 7
    assert model.steps[0] == [1]


def test_a_wholly_known_prompt_that_fills_the_cache_still_runs() -> None:
    engine = make_engine(pages=2, max_model_len=8)
    prompt = tuple(range(20, 27))
    first = one(engine, ask(prompt=prompt, params=replace(GREEDY, max_tokens=1)))
    pooled = one(engine, ask(prompt=(*prompt, 27), pool="last"))
    again = one(engine, ask(prompt=(*prompt, 27), pool="last"))
    assert answers(first)["r", 0] == reference(prompt, 8)
    assert pooled[0].embedding == again[0].embedding == (27.0, 8.0)


def test_salts_share_nothing() -> None:
    engine = make_engine()
    prompt = tuple(range(20, 34))
    one(engine, ask(prompt=prompt, salt="a"))
    assert one(engine, ask(prompt=prompt, salt="b"))[0].cached_tokens == 0
    assert one(engine, ask(prompt=prompt, salt="a"))[0].cached_tokens == 12


def test_answers_are_cached_for_the_next_turn() -> None:
    engine = make_engine()
    answer = answers(one(engine, ask(prompt=(20, 21, 22))))["r", 0]
    follow_up = one(engine, ask(prompt=(20, 21, 22, *answer, 50)))
    assert follow_up[0].cached_tokens == 4


def test_without_the_cache_nothing_is_found() -> None:
    engine = make_engine(prefix_cache=False)
    prompt = tuple(range(20, 34))
    one(engine, ask(prompt=prompt))
    assert one(engine, ask(prompt=prompt))[0].cached_tokens == 0
    assert engine.stats().pages_cached == 0


def test_a_page_whose_step_failed_is_not_shared() -> None:
    model = FakeModel()
    engine = make_engine(model)
    prompt = tuple(range(20, 34))
    model.fail_on = 21
    assert one(engine, ask(prompt=prompt))[-1].finish is FinishReason.ERROR
    model.fail_on = None
    outputs = one(engine, ask(prompt=prompt))
    assert outputs[0].cached_tokens == 0
    assert answers(outputs)["r", 0] == reference(prompt, 19)


# Log-probabilities and pooling


def test_logprobs_come_with_each_token() -> None:
    outputs = one(make_engine(), ask(params=replace(GREEDY, logprobs=2)))
    for output in outputs:
        (record,) = output.logprobs
        assert record.token == output.tokens[0] == record.top[0][0]
        assert record.logprob == record.top[0][1] > record.top[1][1]
        assert len(record.top) == 2


@pytest.mark.parametrize("chunk", [3, 16])
@LOOKAHEAD
def test_prompt_logprobs_cover_the_whole_prompt_once(chunk: int, lookahead: int) -> None:
    engine = make_engine(max_step_tokens=chunk, lookahead=lookahead)
    prompt = tuple(range(20, 30))
    one(engine, ask(prompt=prompt))
    outputs = one(engine, ask(prompt=prompt, params=replace(GREEDY, prompt_logprobs=1, n=2)))
    records = outputs[0].prompt_logprobs
    assert records is not None
    assert records[0] is None
    assert [r.token for r in records[1:] if r] == list(prompt[1:])
    assert [r.top[0][0] for r in records[1:] if r] == [next_token(prompt[:i]) for i in range(1, 10)]
    assert all(o.prompt_logprobs is None for o in outputs[1:])
    assert outputs[0].cached_tokens == 0
    assert answers(outputs)["r", 1] == reference(prompt, 15)


@LOOKAHEAD
def test_a_step_has_logits_of_so_many_prompt_tokens_at_most(lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants no log-probabilities does not wait for those who do."""
    monkeypatch.setattr(scheduler, "PROMPT_LOGPROBS", 8)
    engine, wanted = make_engine(max_step_tokens=64, max_batch=8, lookahead=lookahead), list[int]()
    forward = engine.runner.model.forward
    monkeypatch.setattr(engine.runner.model, "forward", lambda s: wanted.append(len(s.logits_rows)) or forward(s))
    prompts = [tuple(range(20 + i, 32 + i)) for i in range(6)]
    for i, prompt in enumerate(prompts[:5]):
        engine.add(ask(str(i), prompt=prompt, params=replace(GREEDY, prompt_logprobs=1)))
    engine.add(ask("5", prompt=prompts[5]))
    outputs = drain(engine)
    assert next(o.request_id for o in outputs if o.tokens) == "5"
    assert max(wanted) <= 8 + 6
    for i, prompt in enumerate(prompts):
        assert answers(outputs)[str(i), 0] == reference(prompt, len(prompt) + GREEDY.max_tokens)
    for i, prompt in enumerate(prompts[:5]):
        (records,) = [o.prompt_logprobs for o in outputs if o.request_id == str(i) and o.prompt_logprobs is not None]
        assert [r.token for r in records[1:]] == list(prompt[1:])


@LOOKAHEAD
def test_who_waits_for_the_logits_of_others_has_not_begun(lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row, but in no step: it is told when there is one, and does not miss that its row is prepared."""
    monkeypatch.setattr(scheduler, "PROMPT_LOGPROBS", 4)
    clock, begun, prepared = Clock(), list[str](), list[str]()
    engine = make_engine(lookahead=lookahead, clock=clock)
    engine.on_start = begun.extend
    monkeypatch.setattr(engine.runner.sampler, "admit", lambda s: prepared.append(s.request.id))
    for i in range(2):
        params = replace(GREEDY, prompt_logprobs=0, repetition_penalty=1.1)
        engine.add(ask(str(i), prompt=tuple(range(20 + i, 32 + i)), params=params, arrival=0.0))
    outputs: list[Output] = []
    while engine.has_work:
        clock.now += 1
        outputs += engine.step()
        assert begun == prepared == ["0", "1"][: 1 + (clock.now > 3)]
    assert [o.queue_seconds for o in outputs if o.prompt_logprobs is not None] == [1, 4]


@pytest.mark.parametrize("chunk", [3, 16])
@LOOKAHEAD
def test_pooling_does_not_depend_on_chunks(chunk: int, lookahead: int) -> None:
    engine = make_engine(max_step_tokens=chunk, lookahead=lookahead)
    prompt = tuple(range(20, 30))
    engine.add(ask("mean", prompt, pool="mean"))
    engine.add(ask("last", prompt, pool="last"))
    engine.add(ask("text", prompt))
    outputs = {o.request_id: o for o in drain(engine) if o.finish}
    assert outputs["mean"].embedding == (24.5, 5.5)
    assert outputs["last"].embedding == (29.0, 10.0)
    assert outputs["mean"].tokens == ()
    assert outputs["mean"].finish is FinishReason.STOP
    assert outputs["text"].embedding is None


# Refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(prompt=()), "prompt is empty"),
        (ask(prompt=(1, VOCAB)), f"token id {VOCAB}; allowed: 0 to {VOCAB - 1}"),
        (ask(prompt=(1, -1)), "token id -1"),
        (ask(prompt=(1,) * 64), "prompt is 64 tokens long; allowed: up to 63"),
        (ask(prompt=(1,) * 65, pool="mean"), "prompt is 65 tokens long; allowed: up to 64"),
        (ask(pool="max"), "pool is 'max'; allowed: mean, last"),
        (ask(params=SamplingParams(temperature=-1)), "temperature is -1"),
        (ask(params=SamplingParams(stop_token_ids=(VOCAB,))), "stop_token_ids"),
        (ask(params=SamplingParams(stop=("x" * 4097,))), r"^stop is .{200}; allowed: up to 128 .* of 4096 characters"),
        (ask(params=SamplingParams(stop=("x" * 2048, "y" * 2049))), "^stop is .{200}; allowed"),
        (ask(ttft=math.nan), r"^ttft is nan; allowed: seconds from 0 \(the engine's\) to 3600\.$"),
        (ask(ttft=-1.0), "^ttft is -1.0; allowed"),
        (ask(tpot=math.inf), "^tpot is inf; allowed"),
        (ask(tpot="soon"), "^tpot is 'soon'; allowed"),
    ],
)
def test_what_can_never_run_is_refused(request_: Request, message: str) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add(request_)
    assert not engine.has_work


def test_a_prompt_larger_than_the_kv_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"allowed: up to 11 .*kv_memory"):
        make_engine(pages=3).add(ask(prompt=(1,) * 12))


def test_an_id_in_use_is_refused_until_its_request_ends() -> None:
    engine = make_engine()
    engine.add(ask())
    with pytest.raises(ValueError, match="id is 'r'"):
        engine.add(ask())
    drain(engine)
    engine.add(ask())


def test_a_full_queue_says_when_to_try_again() -> None:
    engine = make_engine(max_batch=1, max_queue=2)
    for i in range(3):
        engine.add(ask(str(i)))
    with pytest.raises(QueueFull, match=r"3 requests wait, 2 may\. Try again in 1 s") as caught:
        engine.add(ask("late"))
    assert caught.value.retry_after == 1
    engine.step()
    with pytest.raises(QueueFull) as caught:
        engine.add(ask("late"))
    assert 1 <= caught.value.retry_after <= 60
    drain(engine)
    engine.add(ask("late"))


def test_queued_tokens_are_limited_but_one_prompt_may_always_wait() -> None:
    engine = make_engine(max_queue_tokens=8)
    engine.add(ask("long", (1,) * 20))
    with pytest.raises(QueueFull, match="20 prompt tokens wait, 8 may"):
        engine.add(ask("next"))


# Ends from outside


@pytest.mark.parametrize("steps", range(6))
@LOOKAHEAD
def test_a_request_can_be_aborted_in_every_phase(steps: int, lookahead: int) -> None:
    """Waiting at 0 steps, in the middle of its prompt after 1, answering later; another is not disturbed."""
    engine = make_engine(max_step_tokens=6, lookahead=lookahead)
    engine.add(ask("a", tuple(range(30, 40)), params=replace(GREEDY, n=2)))
    engine.add(ask("b"))
    outputs = [o for _ in range(steps) for o in engine.step()]
    assert engine.abort("a")
    assert not engine.abort("a")
    outputs += drain(engine)
    got = answers(outputs)
    assert got["b", 0] == reference((10, 11, 12), 8)
    ends = [o for o in outputs if o.request_id == "a" and o.finish]
    assert {o.finish for o in ends} == {FinishReason.ABORT}
    assert {o.index for o in ends} == {0, 1}
    assert engine.stats().pages_used == 0


def test_aborting_what_is_not_there_says_so() -> None:
    assert not make_engine().abort("nobody")


def test_a_deadline_ends_a_request_waiting_or_running() -> None:
    clock = Clock()
    engine = make_engine(clock=clock, max_batch=1)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    engine.add(ask("running", deadline=5.0, params=params))
    engine.add(ask("waiting", deadline=5.0, params=params))
    engine.add(ask("patient", deadline=1e9))
    engine.step()
    clock.now = 4.9
    assert [o.finish for o in engine.step()] == [None]
    clock.now = 5.0
    outputs = drain(engine)
    ends = {o.request_id: o for o in outputs if o.finish}
    assert ends["running"].finish is ends["waiting"].finish is FinishReason.ABORT
    assert ends["running"].error == "Its deadline has passed."
    assert ends["patient"].finish is FinishReason.LENGTH


# Faults


@LOOKAHEAD
def test_a_fault_ends_the_request_that_caused_it_and_no_other(lookahead: int) -> None:
    model = FakeModel()
    engine = make_engine(model, lookahead=lookahead)
    engine.add(ask("a"))
    engine.step()
    model.fail_on = 60
    engine.add(ask("bad", (59, 60)))
    engine.add(ask("b", (40, 41)))
    ends: dict[str, Output] = {}
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    ends = {o.request_id: o for o in outputs if o.finish}
    assert ends["bad"].finish is FinishReason.ERROR
    assert ends["bad"].error == "RuntimeError: token 60 is not digestible"
    assert ends["a"].finish is ends["b"].finish is FinishReason.LENGTH
    assert engine.stats().errors == 1
    assert engine.stats().pages_used == 0


def test_a_fault_of_the_text_layer_ends_one_request() -> None:
    class Broken(FakeText):
        def detokenizer(self, request: Request) -> Any:
            good = super().detokenizer(request)
            if request.id == "bad":
                good.feed = lambda token: 1 / 0  # type: ignore[assignment]
            return good

    engine = make_engine(text=Broken())
    engine.add(ask("bad"))
    engine.add(ask("good"))
    ends = {o.request_id: o for o in drain(engine) if o.finish}
    assert ends["bad"].error == "ZeroDivisionError: division by zero"
    assert ends["good"].finish is FinishReason.LENGTH


def test_a_model_that_cannot_run_is_noticed_at_warm_up() -> None:
    model = FakeModel()
    model.fail_on = 0
    with pytest.raises(RuntimeError, match="cannot run: RuntimeError: token 0"):
        make_engine(model).warm_up()


def test_warming_up_leaves_no_trace() -> None:
    engine = make_engine(page_size=1)
    engine.warm_up()
    stats = engine.stats()
    assert (stats.pages_free, stats.steps, stats.generated_tokens, stats.prompt_tokens) == (stats.pages, 0, 0, 0)
    assert not engine.has_work


def test_statistics_count_what_happened() -> None:
    engine = make_engine(max_batch=1)
    engine.add(ask("a"))
    engine.add(ask("b"))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (1, 1, 1)
    assert stats.pages_used == 1
    drain(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert (stats.prompt_tokens, stats.generated_tokens) == (6, 10)
    assert stats.computed_tokens == 2 * (3 + 4)
    assert stats.pages_used + stats.pages_cached + stats.pages_free == stats.pages
    assert stats.step_seconds >= stats.last_step_seconds > 0


def test_end_tokens_outside_of_the_vocabulary_are_nobodys() -> None:
    """As a generation config may have them; `min_tokens` forbids end tokens by their logits."""
    engine = make_engine()
    engine = type(engine)(engine.model, engine.kernels, engine.config, None, pages=64, eos_ids=(EOS, 10**6))
    assert engine.eos_ids == (EOS,)
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=4, min_tokens=2)))
    assert drain(engine)[-1].finish is not None
