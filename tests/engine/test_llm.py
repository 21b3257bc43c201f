"""LLM and AsyncLLM over a real engine with a model made of arithmetic: answers, cancellation in every phase,
failures, ends.
"""

import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tenfold
from tenfold import LLM, AsyncLLM, EngineConfig, SamplingParams
from tenfold.engine import defaults, loop
from tenfold.engine.completion import Collector
from tenfold.engine.llm import EngineDead, QueueFull, RequestFailed
from tenfold.engine.request import FinishReason, Grammar, Output, Request
from tenfold.engine.text import Text
from tests.engine.fake import EOS, VOCAB, FakeModel, make_engine, reference

GREEDY = SamplingParams(max_tokens=6, temperature=0)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
CHAT = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}{% if enable_thinking %}?{% endif %}"


def make_text(path: Path = Path("none"), template: str | None = CHAT) -> Text:
    """Token t is the character chr(t + 32), one of printable ASCII; the last is special."""
    characters = [chr(t + 32) if t else "\u0120" for t in range(VOCAB - 2)]
    tokenizer = Tokenizer(models.BPE({c: t for t, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<a>", special=True), AddedToken("<b>", special=True)])
    checkpoint = SimpleNamespace(
        config={}, path=path, tokenizer=lambda: tokenizer, special={}, eos_ids=(EOS,), chat_template=template
    )
    return Text(checkpoint)


TEXT = make_text()


class Gate:
    """An engine that makes a step only when it is let to, so that a test can look at it between two steps."""

    def __init__(self, engine, steps: int = 0) -> None:
        self.inner = engine
        self.steps = threading.Semaphore(steps)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self):
        assert self.steps.acquire(timeout=20), "the test never let this step happen"
        return self.inner.step()

    def let(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.steps.release()

    def open(self) -> None:
        self.steps.release(10**6)


def make(front=LLM, gate: bool = False, model=None, text: Text = TEXT, **settings):
    engine = make_engine(model, text=text, clock=time.monotonic, **settings)
    return front(engine=Gate(engine) if gate else engine)


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def is_idle(llm) -> bool:
    stats = llm.stats()
    return not (llm._loop.open_requests or stats.running or stats.waiting or stats.pages_used)


@pytest.fixture
def llm():
    with make() as llm:
        yield llm
        wait_until(lambda: not llm.alive or is_idle(llm))


# Whole answers


def test_one_prompt(llm):
    (done,) = llm.generate("abc", GREEDY)
    tokens = reference(TEXT.encode("abc"), 9)
    assert done.tokens == tuple(tokens)
    assert done.choices[0].finish_reason == ("stop" if tokens[-1] == EOS else "length")
    assert done.text == TEXT.decode([t for t in tokens if t != EOS])
    assert (done.prompt, done.prompt_tokens) == ("abc", tuple(TEXT.encode("abc")))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, len(tokens))
    assert done.usage.total_tokens == 3 + len(tokens)
    assert 0 <= done.timing.ttft <= done.timing.total
    assert done.choices[0].logprobs is None


def test_many_prompts_come_back_in_order(llm):
    prompts = ["a" * (1 + i % 7) + chr(97 + i % 20) for i in range(40)]
    done = llm.generate(prompts, GREEDY)
    assert [c.prompt for c in done] == prompts
    for prompt, completion in zip(prompts, done):
        ids = TEXT.encode(prompt)
        assert list(completion.tokens) == reference(ids, len(ids) + 6)


def test_prompts_as_tokens(llm):
    assert llm.generate([5, 6, 7], GREEDY)[0].tokens == tuple(reference([5, 6, 7], 9))
    both = llm.generate([[5, 6, 7], np.array([8, 9])], GREEDY)
    assert [c.tokens for c in both] == [tuple(reference(p, len(p) + 6)) for p in ([5, 6, 7], [8, 9])]
    assert both[0].prompt is None
    assert llm.generate([], GREEDY) == []


def test_parameters_for_each_prompt(llm):
    done = llm.generate(["ab", "ab"], [GREEDY, SamplingParams(max_tokens=1, temperature=0)])
    assert [len(c.tokens) for c in done] == [len(reference(TEXT.encode("ab"), 8)), 1]
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_several_answers_with_logprobs(llm):
    params = SamplingParams(max_tokens=4, n=3, logprobs=2, prompt_logprobs=1, temperature=0, ignore_eos=True)
    (done,) = llm.generate("abcd", params)
    assert [c.index for c in done.choices] == [0, 1, 2]
    for choice in done.choices:
        assert len(choice.logprobs) == len(choice.tokens) == 4
        assert [p.token for p in choice.logprobs] == list(choice.tokens)
        assert all(len(p.top) == 2 for p in choice.logprobs)
    assert done.usage.completion_tokens == 12
    assert len(done.prompt_logprobs) == 4
    assert done.prompt_logprobs[0] is None


def test_stop_strings_given_as_text_or_list(llm):
    whole = llm.generate("ab", SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))[0]
    stop = whole.text[4:6]
    for given in (stop, [stop], (stop,)):
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=given)
        (choice,) = llm.generate("ab", params)[0].choices
        assert (choice.text, choice.finish_reason, choice.stop) == (whole.text[: whole.text.index(stop)], "stop", stop)


def test_prefix_hits_are_counted(llm):
    llm.generate("abcdefghij", GREEDY)
    assert llm.generate("abcdefghij", GREEDY)[0].usage.cached_tokens >= 4
    assert llm.generate("abcdefghij", GREEDY, salt="x")[0].usage.cached_tokens == 0


@pytest.mark.parametrize("settings", [{"max_queue": 3}, {"max_queue": 1}, {"max_queue_tokens": 7}])
def test_more_prompts_than_may_wait(settings):
    with make(**settings, max_batch=2) as llm:
        prompts = [[10 + i % 50, 11, 12] for i in range(30)]
        done = llm.generate(prompts, GREEDY)
        assert [c.tokens for c in done] == [tuple(reference(p, 9)) for p in prompts]


def test_progress(llm, capsys):
    llm.generate(["a", "b"], GREEDY, progress=True)
    assert "prompts" in capsys.readouterr().out


# Refusals


@pytest.mark.parametrize(
    ("prompts", "params", "reason"),
    [
        ("", GREEDY, "^prompt is empty"),
        ("a" * 64, GREEDY, "^prompt is 64 tokens long; allowed: up to 63"),
        ([VOCAB], GREEDY, f"^prompt has token id {VOCAB}"),
        (["a", "", "b"], GREEDY, r"^prompts\[1\]: prompt is empty"),
        ("a", SamplingParams(temperature=-1), "^temperature is -1"),
        ("a", {"temperature": 1}, "^params is a dict; allowed: SamplingParams"),
        ({"prompt": "a"}, GREEDY, "^prompts is a dict; allowed: a text"),
        (b"a", GREEDY, "^prompts is a bytes"),
        (["a", 5.0], GREEDY, "^prompt is a float; allowed: a text or a list of token ids"),
        ([{"prompt": "a"}], GREEDY, "^prompt is a dict"),
        (["a", [1, "b"]], GREEDY, "^prompt is a list; allowed"),
        ("ab\ud800", GREEDY, "surrogate"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing_behind(llm, prompts, params, reason):
    with pytest.raises(ValueError, match=reason):
        llm.generate(prompts, params)
    wait_until(lambda: is_idle(llm))
    assert llm.generate("a", GREEDY)[0].tokens


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"params": SamplingParams(max_tokens="5")}, "params.max_tokens has the wrong type: Expected `int | null`"),
        ({"params": SamplingParams(top_k=None)}, "params.top_k has the wrong type"),
        ({"params": SamplingParams(seed=2**70)}, "seed is 1180591620717411303424; allowed"),
        ({"priority": "high"}, "priority has the wrong type: Expected `int`, got `str`"),
        ({"deadline": "soon"}, "deadline has the wrong type"),
    ],
)
def test_requests_with_fields_of_another_kind_are_refused_and_the_engine_lives(llm, values, reason):
    with pytest.raises(ValueError, match=reason):
        llm.generate("a", **{"params": GREEDY} | values)
    with pytest.raises(ValueError, match=reason):
        next(llm.stream("a", **{"params": GREEDY} | values))
    params = replace(GREEDY, top_k=np.int64(3), temperature=np.float32(0.0))
    assert llm.generate("a", params)[0].tokens == llm.generate("a", GREEDY)[0].tokens


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"max_bach is not a setting of the engine; allowed: .*max_batch"):
        LLM(max_bach=3)
    with pytest.raises(ValueError, match="either config or single settings"):
        LLM(config=EngineConfig(), max_batch=3)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_batch": "x"}, "max_batch is 'x'; allowed: a whole number"),
        ({"max_model_len": 64.0}, "max_model_len is 64.0; allowed: a whole number"),
        ({"page_size": True}, "page_size is True; allowed: a whole number"),
        ({"graphs": "yes"}, "graphs is 'yes'; allowed: True or False"),
        ({"overtake": None}, "overtake is None; allowed: a number"),
        ({"schedule": 3}, "schedule is 3; allowed: text"),
        ({"model": Path("checkpoint")}, "model is .*Path.*; allowed: text"),
    ],
)
def test_settings_of_another_kind_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        LLM(**settings)


def test_what_loading_raises_is_raised(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))
    assert not any(t.name == "tenfold-engine" for t in threading.enumerate())


# Chats


def test_chat(llm):
    messages = [{"role": "user", "content": "ab"}]
    expected = tuple(reference(TEXT.encode("uab;"), 10))
    assert llm.chat(messages, GREEDY)[0].tokens == expected
    assert [c.tokens for c in llm.chat([messages, messages], GREEDY)] == [expected] * 2
    thinking = llm.chat(messages, GREEDY, enable_thinking=True)[0]
    assert thinking.prompt_tokens == tuple(TEXT.encode("uab;?"))
    assert tuple(t for o in llm.chat_stream(messages, GREEDY) for t in o.tokens) == expected


def test_bad_conversations_are_refused(llm):
    for messages, reason in [
        ("Hi", "messages is a str"),
        ([], "messages is empty"),
        ([["Hi"]], r"messages\[0\] is a str"),
    ]:
        with pytest.raises(ValueError, match=reason):
            llm.chat(messages, GREEDY)


def write_generation_config(folder: Path, **values) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_defaults_follow_the_model(tmp_path, caplog):
    path = write_generation_config(
        tmp_path, temperature=0.6, top_p=0.9, top_k=20.0, repetition_penalty=99, do_sample=True
    )
    assert defaults.recommended(path) == SamplingParams(temperature=0.6, top_p=0.9, top_k=20)
    assert "repetition_penalty is 99" in caplog.text
    with make(text=make_text(path, template=None)) as llm:
        assert llm.default_params() == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=16)
        assert llm.default_params(chat=True) == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, stop=("\nUser:",))
    assert defaults.recommended(Path("none.gguf")) == SamplingParams()
    path = write_generation_config(tmp_path, max_new_tokens=5, temperature=None, top_p="high", min_p=True)
    assert defaults.completion(defaults.recommended(path)) == SamplingParams(max_tokens=5)


def test_a_completion_without_parameters_ends(llm):
    assert 1 <= len(llm.generate("abc")[0].tokens) <= 16


# Streams


def test_stream(llm):
    outputs = list(llm.stream("abc", GREEDY))
    assert [t for o in outputs for t in o.tokens] == reference(TEXT.encode("abc"), 9)
    assert "".join(o.text for o in outputs) == llm.generate("abc", GREEDY)[0].text
    assert [o.finish is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]


def test_streams_of_one_model_run_side_by_side(llm):
    streams = [llm.stream(p, GREEDY) for p in ("ab", "cd", "ef")]
    tokens = [[] for _ in streams]
    for outputs in zip(*streams):
        for own, output in zip(tokens, outputs):
            own += output.tokens
    for prompt, own in zip(("ab", "cd", "ef"), tokens):
        expected = reference(TEXT.encode(prompt), 8)
        assert own == expected[: len(own)]


def test_a_stream_that_is_left_is_aborted():
    with make(gate=True) as llm:
        engine = llm._loop.engine
        closed = llm.stream("abc", ENDLESS)
        with llm.stream("abd", ENDLESS) as left:
            dropped = llm.stream("abe", ENDLESS)
            engine.let(3)
            assert [next(s).tokens for s in (closed, left, dropped)]
        closed.close()
        closed.close()
        del dropped
        gc.collect()
        engine.open()
        wait_until(lambda: is_idle(llm))
        assert list(closed) == []
        assert engine.inner.stats().errors == 0


def test_a_stream_of_a_pooled_prompt_ends(llm):
    """Whatever number of answers its parameters speak of."""
    outputs = list(llm.stream("abc", SamplingParams(n=2), pool="last"))
    assert [o.finish for o in outputs] == [FinishReason.STOP]


def test_a_refused_stream_raises_at_its_first_output(llm):
    with pytest.raises(ValueError, match="prompt is empty"):
        next(llm.stream(""))


def test_ctrl_c_leaves_no_request_behind(llm, monkeypatch):
    from tenfold.engine.stream import _Mailbox

    calls = []

    def interrupted(mailbox):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(mailbox)

    real = _Mailbox.receive
    monkeypatch.setattr(_Mailbox, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["ab", "cd"], ENDLESS)
    wait_until(lambda: is_idle(llm))


def test_threads_share_a_model(llm):
    prompts = ["".join(chr(97 + (i * k) % 20) for k in range(1, 5)) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda p: llm.generate(p, GREEDY)[0].tokens, prompts))
    assert done == [tuple(reference(TEXT.encode(p), 10)) for p in prompts]


# Embeddings


def test_embed(llm):
    vectors = llm.embed(["abc", [5, 6]], normalize=False)
    a, b, c = TEXT.encode("abc")
    np.testing.assert_allclose(vectors, [[(a + b + c) / 3, 2], [5.5, 1.5]])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(llm.embed("abc", pool="last", normalize=False), [[c, 3]])
    np.testing.assert_allclose(np.linalg.norm(llm.embed(["abc", "d"]), axis=1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="pool is 'max'; allowed: mean, last"):
        llm.embed("abc", pool="max")
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt is empty"):
        llm.embed(["a", ""])

    async def main():
        async with make(AsyncLLM) as other:
            return await other.embed(["abc", [5, 6]], normalize=False)

    np.testing.assert_array_equal(asyncio.run(main()), vectors)


# Failures and ends


class Broken(FakeModel):
    """Fails in a way that no step can survive once `broken`."""


def break_engine(llm) -> None:
    engine = llm._loop.engine

    def step():
        raise RuntimeError("out of luck")

    engine.inner.step = step
    engine.open()


def test_a_request_that_fails_does_not_take_others_with_it():
    model = FakeModel()
    model.fail_on = 90
    with make(model=model) as llm:
        with pytest.raises(RequestFailed, match=r"prompts\[1\]: RuntimeError: token 90 is not digestible"):
            llm.generate([[5], [90], [6]], GREEDY)
        assert llm.alive
        assert llm.generate([5], GREEDY)[0].tokens == tuple(reference([5], 7))


def test_a_dead_engine_says_so(caplog):
    llm = make(gate=True)
    stream = llm.stream("abc", SamplingParams(n=2, temperature=0, ignore_eos=True))
    break_engine(llm)
    ends = [o for o in stream if o.finish]
    assert [(o.index, o.finish, o.error) for o in sorted(ends, key=lambda o: o.index)] == [
        (i, FinishReason.ERROR, "The engine failed: RuntimeError: out of luck") for i in (0, 1)
    ]
    assert not llm.alive
    with pytest.raises(EngineDead, match="out of luck"):
        llm.generate("abc")
    with pytest.raises(EngineDead, match="out of luck"):
        llm.stream("abc")
    llm.close()
    assert "the engine failed" in caplog.text


def test_generate_on_an_engine_that_dies(caplog):
    llm = make(gate=True)
    timer = threading.Timer(0.05, break_engine, [llm])
    timer.start()
    with pytest.raises(EngineDead, match="out of luck"):
        llm.generate(["abc", "d"], ENDLESS)
    llm.close()


def test_close_ends_open_requests():
    llm = make(gate=True)
    engine = llm._loop.engine  # which is gone as soon as the loop has ended
    stream = llm.stream("abc", ENDLESS)
    engine.let(2)
    next(stream)
    closing = threading.Thread(target=llm.close)
    closing.start()
    wait_until(lambda: llm._loop._closing)
    engine.open()
    closing.join()
    assert [o.finish for o in stream][-1] is FinishReason.ABORT
    with pytest.raises(EngineDead, match="The engine was closed"):
        llm.generate("abc")
    llm.close()
    assert llm.stats() is not None


def test_a_dropped_model_stops_its_thread():
    llm = make()
    thread = llm._loop._thread
    del llm
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_commands_that_come_too_late_are_refused():
    """A request posted between the failure and its handling gets an answer, too."""
    received = []
    receiver = SimpleNamespace(send=received.extend)

    request = Request("late", (1,))
    engine_loop = loop.EngineLoop(make_engine)
    engine_loop.close()
    engine_loop._commands.append(lambda engine: engine_loop._add(engine, request, receiver))
    engine_loop._end_all(FinishReason.ERROR, "gone")
    assert [(id, type(e)) for id, e in received] == [("late", EngineDead)]


# Asynchronous


async def collect(llm, prompt, params=GREEDY, **rest) -> list[Output]:
    async with aclosing(llm.generate(prompt, params, **rest)) as outputs:
        return [output async for output in outputs]


def tokens_of(outputs) -> list[int]:
    return [t for o in outputs for t in o.tokens]


def test_async_requests_run_together():
    prompts = ["".join(chr(97 + (i * k) % 20) for k in range(1, 6)) for i in range(30)]

    async def main():
        async with make(AsyncLLM) as llm:
            found = await asyncio.gather(*(collect(llm, p) for p in prompts))
            assert llm.stats().steps < 30 * 6, "they shared steps"
            return found

    for prompt, outputs in zip(prompts, asyncio.run(main())):
        assert tokens_of(outputs) == reference(TEXT.encode(prompt), 11)
        assert outputs[-1].finish is not None


def test_async_chat_and_several_answers():
    async def main():
        async with make(AsyncLLM) as llm:
            messages = [{"role": "user", "content": "ab"}]
            chat = [o async for o in llm.chat(messages, GREEDY, template_settings={"enable_thinking": True})]
            assert tokens_of(chat) == reference(TEXT.encode("uab;?"), 11)
            outputs = await collect(llm, "uab;?", SamplingParams(max_tokens=4, n=3, temperature=0, ignore_eos=True))
            assert sorted(o.index for o in outputs if o.finish) == [0, 1, 2]

    asyncio.run(main())


def test_a_step_crosses_over_once():
    """However many requests a step answers, the event loop is called once for it."""

    async def main():
        async with make(AsyncLLM, max_batch=8) as llm:
            running, calls = asyncio.get_running_loop(), []
            real = running.call_soon_threadsafe

            def counted(callback, *args, **kwargs):
                if getattr(callback, "__name__", "") == "_dispatch":
                    calls.append(args[0])
                return real(callback, *args, **kwargs)

            running.call_soon_threadsafe = counted
            await asyncio.gather(
                *(collect(llm, [5 + i, 6], SamplingParams(max_tokens=9, ignore_eos=True)) for i in range(8))
            )
            wait_until(lambda: is_idle(llm))
            return len(calls), llm.stats().steps, max(map(len, calls))

    crossings, steps, largest = asyncio.run(main())
    assert crossings <= steps
    assert largest == 8


@pytest.mark.parametrize("takes", ["all", "none", "every other"])
def test_a_tap_gets_outputs_that_were_waited_for(takes):
    """Between them, the tap and the iterator have every token once and in order; the last is the iterator's."""
    everything, offered = [], []

    def tap(output):
        offered.append(output)
        assert output.finish is None
        taken = {"all": True, "none": False, "every other": len(offered) % 2 == 0}[takes]
        if taken:
            everything.append(output)
        return taken

    async def main():
        llm = make(AsyncLLM, gate=True)
        async with llm, aclosing(llm.generate("abc", GREEDY, tap=tap)) as outputs:
            task = asyncio.ensure_future(anext(outputs))
            for _ in range(5):  # each step when what the one before brought has been taken
                await asyncio.sleep(0)
                steps = llm.stats().steps
                llm._loop.engine.let()
                await asyncio.to_thread(wait_until, lambda before=steps: llm.stats().steps > before)
                await asyncio.sleep(0.01)
                if task.done():
                    everything.append(task.result())
                    task = asyncio.ensure_future(anext(outputs))
            llm._loop.engine.open()
            everything.append(await task)
            async for output in outputs:
                everything.append(output)

    asyncio.run(main())
    assert tokens_of(everything) == reference(TEXT.encode("abc"), 9)
    assert offered
    assert everything[-1].finish is not None
    assert everything[-1] not in offered


def test_a_tap_that_fails_ends_its_request_alone():
    def tap(output):
        raise KeyError("a fault of its own")

    async def main():
        async with make(AsyncLLM) as llm:
            other = asyncio.ensure_future(collect(llm, "abd"))
            with pytest.raises(KeyError, match="a fault of its own"):
                await collect(llm, "abc", ENDLESS, tap=tap)
            assert tokens_of(await other) == reference(TEXT.encode("abd"), 9)
            await asyncio.to_thread(wait_until, lambda: is_idle(llm))

    asyncio.run(main())


def test_a_tap_is_offered_nothing_once_its_iterator_is_closed():
    offered = []

    async def main():
        async with make(AsyncLLM) as llm:
            outputs = llm.generate("abc", ENDLESS, tap=lambda output: bool(offered.append(output)))
            await anext(outputs)
            await outputs.aclose()
            count = len(offered)
            await asyncio.to_thread(wait_until, lambda: is_idle(llm))
            await asyncio.sleep(0)
            assert len(offered) == count

    asyncio.run(main())


PHASES = {
    "before any step": 0,
    "between two chunks of its prompt": 1,
    "while it decodes": 6,
}


@pytest.mark.parametrize("how", ["close the iterator", "cancel the task", "abort by id"])
@pytest.mark.parametrize("phase", PHASES)
def test_cancelling_frees_everything_in_every_phase(phase, how):
    async def main():
        llm = make(AsyncLLM, gate=True, max_step_tokens=8, max_batch=2)
        engine = llm._loop.engine
        outputs = llm.generate("abcdefghijklmnopqrst", ENDLESS, request_id="r")
        task = asyncio.ensure_future(anext(outputs)) if phase != "while it decodes" else None
        engine.let(PHASES[phase])
        if task is None:
            await anext(outputs)
        await asyncio.to_thread(wait_until, lambda: engine.inner._requests)
        await asyncio.to_thread(wait_until, lambda: engine.inner.stats().steps >= PHASES[phase])
        if how == "abort by id":
            llm.abort("r")
            engine.open()
            rest = [await task] if task else []
            rest += [o async for o in outputs]
            assert rest[-1].finish is FinishReason.ABORT
        else:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await outputs.aclose()
            engine.open()
        await asyncio.to_thread(wait_until, lambda: is_idle(llm))
        assert engine.inner.stats().generated_tokens <= PHASES[phase] + 2, "it did not run on"
        assert not llm._port.inboxes
        await asyncio.to_thread(llm.close)

    asyncio.run(main())


def test_cancelling_one_leaves_the_others():
    async def main():
        async with make(AsyncLLM) as llm:
            left = llm.generate("abc", ENDLESS)
            others = [asyncio.ensure_future(collect(llm, p)) for p in ("abd", "abe")]
            await anext(left)
            await left.aclose()
            return await asyncio.gather(*others)

    assert [tokens_of(o) for o in asyncio.run(main())] == [reference(TEXT.encode(p), 9) for p in ("abd", "abe")]


def test_async_refusals():
    async def main():
        async with make(AsyncLLM, gate=True, max_queue=1, max_batch=1) as llm:
            with pytest.raises(ValueError, match="prompt is empty"):
                await collect(llm, "")
            first = llm.generate("abc", ENDLESS, request_id="same")
            tasks = [asyncio.ensure_future(anext(first))]
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="request_id is 'same'"):
                await collect(llm, "abc", request_id="same")
            llm._loop.engine.let()
            await tasks[0]
            second = llm.generate("abd", ENDLESS)
            tasks.append(asyncio.ensure_future(anext(second)))
            full = asyncio.ensure_future(collect(llm, "abe"))
            await asyncio.sleep(0)
            llm._loop.engine.let()
            with pytest.raises(QueueFull) as refusal:
                await full
            assert refusal.value.retry_after >= 1
            llm._loop.engine.open()
            await first.aclose()
            await tasks[1]
            await second.aclose()

    asyncio.run(main())


def test_a_deadline_ends_a_request():
    async def main():
        async with make(AsyncLLM) as llm:
            outputs = await collect(llm, "abc", ENDLESS, deadline=time.monotonic() - 1)
            return outputs[-1]

    last = asyncio.run(main())
    assert last.finish is FinishReason.ABORT
    assert "deadline" in last.error


def test_an_engine_that_dies_ends_all_async_requests(caplog):
    async def main():
        llm = make(AsyncLLM, gate=True)
        tasks = [
            asyncio.ensure_future(collect(llm, p, SamplingParams(n=2, temperature=0, ignore_eos=True)))
            for p in ("ab", "cd")
        ]

        def both_are_open() -> bool:
            if llm._loop.open_requests == 2:
                return True
            llm._loop.engine.let()  # the loop may stand before a step with the first alone
            return False

        await asyncio.to_thread(wait_until, both_are_open)
        break_engine(llm)
        for outputs in await asyncio.gather(*tasks):
            assert sorted(o.index for o in outputs if o.finish is FinishReason.ERROR) == [0, 1]
        with pytest.raises(EngineDead, match="out of luck"):
            await collect(llm, "ab")
        with pytest.raises(EngineDead), llm_raises_groups():
            await llm.embed("ab")
        llm.close()

    asyncio.run(main())


class llm_raises_groups:
    """Unwraps the exception group of a task group with one failed task."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0]


def test_closing_ends_async_requests():
    async def main():
        llm = make(AsyncLLM, gate=True)
        task = asyncio.ensure_future(collect(llm, "abc", ENDLESS))
        await asyncio.to_thread(wait_until, lambda: llm._loop.open_requests == 1)
        llm._loop.engine.open()
        await asyncio.to_thread(llm.close)
        return await task

    assert asyncio.run(main())[-1].finish is FinishReason.ABORT


def test_several_event_loops_one_after_the_other():
    llm = make(AsyncLLM)
    expected = reference(TEXT.encode("abc"), 9)
    assert [tokens_of(asyncio.run(collect(llm, "abc"))) for _ in range(2)] == [expected] * 2

    async def leave():
        """Ends its event loop with a request under way that nobody closes."""
        outputs = llm.generate("abc", ENDLESS)
        await anext(outputs)
        return outputs

    running = asyncio.new_event_loop()
    outputs = running.run_until_complete(leave())
    running.close()
    wait_until(lambda: is_idle(llm))
    assert outputs.ag_running is False
    assert tokens_of(asyncio.run(collect(llm, "abc"))) == expected
    llm.close()


def test_loading_off_the_event_loop(monkeypatch):
    engine = make_engine(text=TEXT)
    assert asyncio.run(AsyncLLM.load(engine=engine)).close() is None


# The package


def test_importing_tenfold_imports_nothing_heavy():
    code = (
        "import sys, tenfold; tenfold.SamplingParams(); tenfold.EngineConfig(); "
        "print(sorted({'torch', 'numpy', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_server_can_start_its_engine_process_before_it_has_pytorch():
    code = "import sys, tenfold.engine.llm, tenfold.engine.process; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_offers_what_it_names():
    assert {getattr(tenfold, name).__name__ for name in tenfold.__all__} == set(tenfold.__all__)
    assert set(tenfold.__all__) <= set(dir(tenfold))
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        tenfold.LMM  # noqa: B018


def test_timing_of_a_single_token():
    collector = Collector(Request("r", (1,), SamplingParams(max_tokens=1)), None)
    collector.add(Output("r", 0, (5,), "x", finish=FinishReason.LENGTH))
    done = collector.completion()
    assert done.timing.tpot is None
    assert done.timing.total == done.timing.ttft


# The real model


@pytest.mark.real_model
def test_smollm2_knows_the_capital_of_france(smollm2_path):
    with LLM(str(smollm2_path), max_model_len=256) as llm:
        greedy = SamplingParams(max_tokens=8, temperature=0)
        assert "Paris" in llm.generate("The capital of France is", greedy)[0].text
    with LLM(str(smollm2_path), max_model_len=256, kernels="torch") as llm:
        # A close call between two first tokens, which quantised activations may turn: so in full precision.
        (answer,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], greedy)
        assert "Paris" in answer.text


def test_grammars_can_be_checked_before_they_are_asked_for(llm):
    llm.check_grammar(Grammar("choice", '["a", "b"]'))
    with pytest.raises(ValueError, match="unclosed"):
        llm.check_grammar(Grammar("regex", "[a-"))
