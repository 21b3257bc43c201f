"""Structured output: whatever the model wants to say, an answer that ends by itself is a sentence of its grammar."""

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.engine.core import Engine
from tenfold.engine.grammar import GrammarLimits, Grammars, _Tokens
from tenfold.engine.llm import LLM
from tenfold.engine.masks import Masks
from tenfold.engine.request import FinishReason, Grammar, Output, Request, SamplingParams
from tenfold.engine.schema import DATE, json_schema, nesting
from tenfold.engine.text import Text
from tenfold.models.table import build_model
from tenfold.nn.step import Step
from tenfold.ops.kernels import Separate
from tenfold.ops.table import make_kernels
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.engine import fake
from tests.engine.test_text import TEXTS

VOCAB = 320  # more than any of these tokenizers has
LOOKAHEAD = pytest.mark.parametrize("lookahead", [0, 1])
KINDS = pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
EOS = {"byte-level": "<|end|>", "llama": "</s>", "gemma": "</s>", "metaspace": "</s>"}
PROMPT = (40, 41, 42)
TEXT = TEXTS["byte-level"]


class Babbling(fake.FakeModel):
    """Wants random tokens that depend on all before; `likes` some more than others."""

    def __init__(self, likes: dict[int, float] | None = None) -> None:
        super().__init__()
        self.config.vocab_size = VOCAB
        self.likes = likes or {}

    def forward(self, step: Step) -> Tensor:
        histories = self._run(step)
        rows = [self.row(histories[i]) for i in step.logits_rows.tolist()]
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)

    def row(self, history: list[int]) -> Tensor:
        seed = hash(tuple(history)) & 0xFFFFFFFF
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
        for token, value in self.likes.items():
            logits[token] += value
        return logits


def eos_of(kind: str) -> int:
    eos = TEXTS[kind].token_id(EOS.get(kind, ""))
    return VOCAB - 1 if eos is None else eos


def make_engine(kind: str = "byte-level", model: Any = None, pages: int = 512, **changes: Any) -> Engine:
    kernels: Any = Separate()
    values = {"max_model_len": 512, "page_size": 8, "max_batch": 8, "max_step_tokens": 32} | changes
    eos = (eos_of(kind),)
    return Engine(model or Babbling(), kernels, fake.settings(**values), TEXTS[kind], pages=pages, eos_ids=eos)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def text_of(outputs: list[Output], id: str = "r", index: int = 0) -> str:
    return "".join(o.text for o in outputs if (o.request_id, o.index) == (id, index))


def end_of(outputs: list[Output], id: str = "r", index: int = 0) -> Output:
    (end,) = [o for o in outputs if (o.request_id, o.index) == (id, index) and o.finish]
    return end


def ask(engine: Engine, grammar: Grammar, **params: Any) -> tuple[str, Output]:
    """The text of one answer, and its end."""
    values = {"temperature": 1.0, "seed": 5, "max_tokens": 300} | params
    engine.add(Request("r", PROMPT, SamplingParams(grammar=grammar, **values)))
    outputs = fake.drain(engine)
    return text_of(outputs), end_of(outputs)


# What is answered

STRING = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"enum": ["x", 1, None]}},
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": "é👩"}, {"type": "boolean"}], "items": False, "minItems": 2},
    "any of": {"anyOf": [{"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 99}, {"const": {"k": [1]}}]},
    "pattern": {"type": "string", "pattern": "^[a-f]{2}(-[0-9]{2}){1,2}$"},
    "recursive": {
        "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}},
        "$ref": "#/$defs/t",
    },
    "dates": {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 2},
}


@KINDS
@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_valid_under_their_schema(kind: str, name: str) -> None:
    """Several answers at a time, one step ahead, ends rarely wanted."""
    engine = make_engine(kind, lookahead=1)
    params = SamplingParams(grammar=schema(SCHEMAS[name]), n=4, seed=1, max_tokens=400)
    engine.add(Request("r", PROMPT, params))
    outputs = fake.drain(engine)
    checker = jsonschema.FormatChecker()
    stopped = 0
    for index in range(4):
        if end_of(outputs, index=index).finish is FinishReason.STOP:
            stopped += 1
            jsonschema.validate(json.loads(text_of(outputs, index=index)), SCHEMAS[name], format_checker=checker)
        else:
            assert end_of(outputs, index=index).finish is FinishReason.LENGTH
    assert stopped


@KINDS
@LOOKAHEAD
@pytest.mark.parametrize("pattern", ["[a-c]{3}", r"^\d{2}é+👩$", "(Hello| world)* stop", r"a/b\\[/]", "日本.{2}", ""])
def test_answers_match_their_pattern(kind: str, lookahead: int, pattern: str) -> None:
    text, end = ask(make_engine(kind, lookahead=lookahead), Grammar("regex", pattern))
    assert end.finish is FinishReason.STOP
    assert re.fullmatch(pattern, text)


CHOICES = ["yes", "yes, indeed", "no", "naïve 👩‍👩‍👧", 'quote " and \\ and /', "new\nline", "$^.*[]()|"]


@KINDS
@pytest.mark.parametrize("wanted", range(len(CHOICES)))
def test_each_choice_can_be_made_and_no_other(kind: str, wanted: int) -> None:
    grammar = Grammar("choice", json.dumps(CHOICES))
    likes = {
        i: 20.0 for i in range(VOCAB) if (b := TEXTS[kind].certain_bytes(i)) and CHOICES[wanted].encode().startswith(b)
    }
    texts = [ask(make_engine(kind, Babbling(likes)), grammar, seed=seed)[0] for seed in range(3)]
    assert set(texts) <= set(CHOICES)
    only, _ = ask(make_engine(kind), Grammar("choice", json.dumps([CHOICES[wanted]])))
    assert only == CHOICES[wanted]


@LOOKAHEAD
def test_answers_follow_a_lark_grammar(lookahead: int) -> None:
    source = 'start: pair ("," pair)*\npair: NAME "=" NUMBER\nNAME: /[a-z]{1,3}/\nNUMBER: /[0-9]{1,2}/'
    text, end = ask(make_engine(lookahead=lookahead), Grammar("lark", source))
    assert end.finish is FinishReason.STOP
    assert re.fullmatch(r"[a-z]{1,3}=[0-9]{1,2}(,[a-z]{1,3}=[0-9]{1,2})*", text)


@pytest.mark.parametrize("kind", ["metaspace", "words"])
def test_a_vocabulary_without_a_table_says_what_it_can(kind: str) -> None:
    """Its tokens count as the text they are in the middle of an answer."""
    pattern = {"metaspace": "(Hello| world)( stop| Paris| is){2}", "words": " bc d bc"}[kind]
    text, end = ask(make_engine(kind), Grammar("regex", pattern))
    assert end.finish is FinishReason.STOP
    assert re.fullmatch(pattern, text)


def test_any_json_object() -> None:
    quotes = {TEXT.encode(c, False)[0]: 6.0 for c in '"}'}
    text, end = ask(make_engine(model=Babbling(quotes)), Grammar("json_object"))
    assert end.finish is FinishReason.STOP
    assert isinstance(json.loads(text), dict)


def test_the_leading_space_of_a_word_is_text_under_a_grammar() -> None:
    """Without one, it belongs to the word where nothing visible stands before it."""
    engine = make_engine("llama")
    engine.add(Request("r", (1,), SamplingParams(grammar=Grammar("regex", " Paris"), temperature=0.0)))
    assert text_of(fake.drain(engine)) == " Paris"


# Ends


def test_an_answer_ends_where_nothing_can_follow() -> None:
    """Without an end token, even one that is to be ignored."""
    for ignore_eos in (False, True):
        engine = make_engine()
        text, end = ask(engine, Grammar("regex", "[ab]{4}"), ignore_eos=ignore_eos)
        assert re.fullmatch("[ab]{4}", text)
        assert (end.finish, end.stop, len(end.tokens)) == (FinishReason.STOP, None, 1)
        assert engine.stats().pages_used == 0


@LOOKAHEAD
def test_end_tokens_come_only_where_the_grammar_is_complete(lookahead: int) -> None:
    eager = Babbling({eos_of("byte-level"): 50.0})
    text, end = ask(make_engine(model=eager, lookahead=lookahead), Grammar("regex", "[a-z]{3,}"))
    assert len(text) == 3
    assert (end.finish, end.stop) == (FinishReason.STOP, eos_of("byte-level"))


def test_min_tokens_and_ignore_eos_put_the_end_off_as_long_as_the_grammar_can_go_on() -> None:
    eager = Babbling({eos_of("byte-level"): 50.0})
    grammar = Grammar("regex", "[xyz]*")
    text, end = ask(make_engine(model=eager), grammar, min_tokens=5)
    assert len(text) == 5
    assert end.finish is FinishReason.STOP
    text, end = ask(make_engine(model=eager), grammar, ignore_eos=True, max_tokens=9)
    assert (len(text), end.finish) == (9, FinishReason.LENGTH)
    for params in ({"min_tokens": 50}, {"ignore_eos": True}):
        text, end = ask(make_engine(model=eager), Grammar("regex", "[xyz]{2}|xyzz"), **params)
        assert re.fullmatch("[xyz]{2}|xyzz", text)
        assert end.finish is FinishReason.STOP


def test_stop_tokens_end_an_answer_and_wait_for_min_tokens() -> None:
    (x,) = TEXT.encode("x", False)
    model = Babbling({x: 50.0})
    text, end = ask(make_engine(model=model), Grammar("regex", "[xyz]{8}"), stop_token_ids=(x,), min_tokens=4)
    assert re.fullmatch("[yz]{4}", text)
    assert (end.finish, end.stop) == (FinishReason.STOP, x)


def test_stop_strings_end_an_answer() -> None:
    text, end = ask(make_engine(), Grammar("regex", "[xyz]{80}"), stop=("xy",))
    assert (end.finish, end.stop) == (FinishReason.STOP, "xy")
    assert "xy" not in text


def test_max_tokens_end_an_answer_that_is_not_complete() -> None:
    text, end = ask(make_engine(), Grammar("regex", "[xyz]{80}"), max_tokens=7)
    assert (len(text), end.finish) == (7, FinishReason.LENGTH)
    text, end = ask(make_engine(), Grammar("regex", "[xyz]{7}"), max_tokens=7)
    assert (len(text), end.finish) == (7, FinishReason.STOP)


def test_bias_and_penalties_never_lead_out_of_the_grammar() -> None:
    ids = {TEXT.encode(c, False)[0]: 100.0 for c in "qrs"} | {TEXT.encode(c, False)[0]: -100.0 for c in "ab"}
    params = {"logit_bias": ids, "frequency_penalty": 2.0, "repetition_penalty": 3.0, "top_k": 2, "top_p": 0.5}
    text, _ = ask(make_engine(), Grammar("regex", "[ab]{20}"), **params)
    assert re.fullmatch("[ab]{20}", text)
    text, _ = ask(make_engine(), Grammar("regex", "[ab]{20}"), **(params | {"temperature": 0.0}))
    assert re.fullmatch("[ab]{20}", text)
    assert set(text) == {"a", "b"}  # the penalty works among what is allowed


def test_logprobs_are_the_models_own() -> None:
    (a,) = TEXT.encode("a", False)
    engine = make_engine()
    params = SamplingParams(grammar=Grammar("regex", "a{3}"), logprobs=1, logprob_token_ids=(a, 7), temperature=0.0)
    engine.add(Request("r", PROMPT, params))
    outputs = fake.drain(engine)
    history = list(PROMPT)
    for output in outputs:
        logs = torch.log_softmax(Babbling().row(history), -1)
        (record,) = output.logprobs
        assert record.asked == pytest.approx((float(logs[a]), float(logs[7])))
        assert record.logprob == pytest.approx(float(logs[a]))
        assert record.top[0][1] == pytest.approx(float(logs.max()))
        history.append(output.tokens[0])


# Batches

JOBS = [
    SamplingParams(grammar=schema(SCHEMAS["object"]), temperature=0.0, max_tokens=40),
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(grammar=Grammar("regex", "[a-f]{9}"), seed=1, max_tokens=20, repetition_penalty=1.4, logprobs=2),
    SamplingParams(grammar=Grammar("choice", json.dumps(CHOICES)), seed=2, top_k=3, logit_bias={70: 5.0}),
    SamplingParams(seed=3, max_tokens=9, top_p=0.9, min_tokens=4),
    SamplingParams(grammar=schema(SCHEMAS["array"]), temperature=0.0, max_tokens=15, min_tokens=9, n=2),
    SamplingParams(grammar=Grammar("regex", "[xyz]*"), temperature=0.0, max_tokens=14, ignore_eos=True),
]


def alone(params: SamplingParams) -> dict[int, list[int]]:
    engine = make_engine()
    engine.add(Request("r", PROMPT, params))
    return {index: tokens for (_, index), tokens in fake.answers(fake.drain(engine)).items()}


class Told(fake.Guesses):
    """Guesses what the answers are, but for every sixth token."""

    def __init__(self, answers: list[dict[int, list[int]]]) -> None:
        super().__init__()
        self.answers = answers

    def draft(self, wanted: Any) -> Any:
        for sequence, count in wanted.items():
            known, done = len(sequence.tokens), sequence.generated
            answer = self.answers[int(sequence.request.id) % len(JOBS)][sequence.index][done : done + count]
            guess = tuple((t + ((known + i) % 6 == 0)) % VOCAB for i, t in enumerate(answer))
            sequence.guess.propose(known, guess)
        return {sequence: sequence.guess.tokens for sequence in wanted}


@LOOKAHEAD
@pytest.mark.parametrize("pages", [512, 12])
@pytest.mark.parametrize("speculates", [False, True])
def test_an_answer_does_not_depend_on_others(lookahead: int, pages: int, speculates: bool) -> None:
    """In changing batches, in chunks, preempted, one step ahead, guessed ahead."""
    expected = [alone(p) for p in JOBS]
    sizes = {"max_batch": 5, "max_step_tokens": 17 if speculates else 7, "max_model_len": 96}
    engine = make_engine(pages=pages, lookahead=lookahead, speculate="ngram" if speculates else "", **sizes)
    if speculates:
        fake.speculating(engine, Told(expected))
    engine.grammars = Grammars(TEXT, VOCAB, engine.eos_ids)
    for grammar in filter(None, (p.grammar for p in JOBS)):
        engine.grammars.check(grammar)  # so that every run has the same schedule
    outputs = []
    for i, params in enumerate(JOBS * 2):
        engine.add(Request(str(i), PROMPT, params))
        outputs += engine.step()
    got = fake.answers(outputs + fake.drain(engine))
    for i in range(2 * len(JOBS)):
        assert {k: got[str(i), k] for k in range(JOBS[i % len(JOBS)].n)} == expected[i % len(JOBS)]
    assert (engine.stats().preemptions > 0) == (pages == 12)
    assert engine.stats().pages_used == 0
    assert (engine.stats().accepted_tokens > 20) == speculates


def test_guesses_are_cut_where_the_grammar_does_not_allow_them() -> None:
    answer = alone(replace(JOBS[2], temperature=0.0))[0]

    class Wild(fake.Guesses):
        def draft(self, wanted: Any) -> Any:
            for sequence in wanted:
                following = answer[sequence.generated : sequence.generated + 2]
                sequence.guess.propose(len(sequence.tokens), (*following, VOCAB - 1, VOCAB - 2))
            return {sequence: sequence.guess.tokens for sequence in wanted}

    engine = fake.speculating(make_engine(speculate="ngram"), Wild(), fake.All())
    engine.add(Request("r", PROMPT, replace(JOBS[2], temperature=0.0)))
    outputs = fake.drain(engine)
    assert fake.answers(outputs)["r", 0] == answer
    assert [r.token for o in outputs for r in o.logprobs] == answer
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens > 4


def test_real_models_answer_in_a_batch_as_they_do_alone(tiny: Callable[[str], Path]) -> None:
    """A checkpoint's own weights, tokenizer and end tokens."""
    checkpoint = open_checkpoint(tiny("qwen3"))
    kernels = make_kernels("torch", torch.device("cpu"), torch.float32, 1)
    model = build_model(checkpoint.config, Weights(checkpoint, kernels), 128)
    text = Text(checkpoint)
    kinds = [Grammar("regex", "[a-z ]{12}"), schema(SCHEMAS["any of"]), schema(SCHEMAS["object"]), None]

    def answers(prompts: list[int], n: int) -> dict[tuple[str, int], list[int]]:
        engine = Engine(
            model, kernels, fake.settings(max_model_len=128, max_batch=6), text, pages=256, eos_ids=text.eos_ids
        )
        for i in prompts:
            params = SamplingParams(temperature=0.0, max_tokens=24, grammar=kinds[i], n=n)
            engine.add(Request(str(i), tuple(text.encode("the land and"[i:])), params))
        return fake.answers(fake.drain(engine))

    single = {i: answers([i], 1)[str(i), 0] for i in range(4)}
    assert answers([0, 1, 2, 3], 2) == {(str(i), k): single[i] for i in range(4) for k in range(2)}
    assert re.fullmatch("[a-z ]{12}", text.decode(single[0]))
    jsonschema.validate(json.loads(text.decode(single[1])), SCHEMAS["any of"])


@pytest.mark.real_model
def test_a_real_model_fills_a_schema_in(smollm2_path: Path) -> None:
    messages = [{"role": "user", "content": "Bob is 32 years old. Describe him as JSON."}]
    with LLM(str(smollm2_path), max_batch=1, max_model_len=256) as llm:
        params = SamplingParams(grammar=schema(SCHEMAS["object"]), temperature=0.0, max_tokens=40)
        (answer,) = llm.chat(messages, params)
    assert json.loads(answer.text) == {"name": "Bob", "age": 32}


# While grammars compile, and when they cannot be


def test_a_grammar_that_cannot_be_compiled_ends_its_request_only() -> None:
    engine = make_engine()
    engine.add(Request("bad", PROMPT, SamplingParams(grammar=schema({"not": {}}), n=2)))
    engine.add(Request("good", PROMPT, SamplingParams(grammar=Grammar("regex", "ab"))))
    outputs = fake.drain(engine)
    for index in range(2):
        end = end_of(outputs, "bad", index)
        assert end.finish is FinishReason.ERROR
        assert end.error == 'The JSON schema is not supported: Unimplemented keys: ["not"].'
    assert text_of(outputs, "good") == "ab"


class Slow:
    """Grammars that are compiled when a test says so."""

    limits = GrammarLimits(compile_seconds=10.0)

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []
        self.real = Grammars(TEXT, VOCAB, (eos_of("byte-level"),))

    def prepare(self, grammar: Grammar) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]

    def too_slow(self, grammar: Grammar) -> str:
        return "too slow"


def waiting_engine(n: int = 1) -> tuple[Engine, Slow]:
    """An engine at work on one request while another waits for its grammar."""
    engine, slow = make_engine(), Slow()
    engine.grammars = slow  # type: ignore[assignment]
    engine.clock = fake.Clock()
    engine.add(Request("r", PROMPT, SamplingParams(grammar=Grammar("regex", "ab"), n=n), deadline=50.0))
    engine.add(Request("other", PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)))
    outputs = [o for _ in range(9) for o in engine.step()]
    assert end_of(outputs, "other").finish is FinishReason.LENGTH
    assert not [o for o in outputs if o.request_id == "r"]
    assert engine.has_work
    assert engine.stats().waiting == n
    return engine, slow


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_waits_for_its_grammar_without_stopping_others(n: int) -> None:
    engine, slow = waiting_engine(n)
    slow.futures[0].set_result(slow.real.start(Grammar("regex", "ab")))
    outputs = fake.drain(engine)
    assert [text_of(outputs, "r", i) for i in range(n)] == ["ab"] * n
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("end", ["abort", "deadline", "slow"])
def test_a_request_can_end_while_its_grammar_is_compiled(end: str, n: int) -> None:
    engine, slow = waiting_engine(n)
    if end == "abort":
        assert engine.abort("r")
    else:
        engine.clock.now = 60.0 if end == "deadline" else 11.0  # type: ignore[attr-defined]
    outputs = fake.drain(engine)
    expected = (FinishReason.ERROR, "too slow") if end == "slow" else None
    for index in range(n):
        found = end_of(outputs, index=index)
        assert found.finish is FinishReason.ABORT if expected is None else (found.finish, found.error) == expected
    slow.futures[0].set_result(slow.real.start(Grammar("regex", "ab")))
    assert engine.step() == []
    assert engine.stats().waiting == 0
    engine.add(Request("r", PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)))
    assert end_of(fake.drain(engine)).finish is FinishReason.LENGTH


@LOOKAHEAD
def test_a_grammar_the_vocabulary_cannot_follow_ends_its_request_only(lookahead: int) -> None:
    """An ASCII vocabulary, and a choice it can begin but not end."""

    class Ascii(fake.FakeText):
        special_ids = frozenset((3,))
        vocab_size = fake.VOCAB

        def certain_bytes(self, token: int) -> bytes:
            return bytes([token + 32]) if token < 95 else b""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) - 32 for c in text if 32 <= ord(c) < 127]

    engine = fake.make_engine(text=Ascii(), lookahead=lookahead)
    engine.add(Request("bad", PROMPT, SamplingParams(grammar=Grammar("regex", "[ab]é"), temperature=0.0)))
    engine.add(Request("good", PROMPT, SamplingParams(grammar=Grammar("regex", "[ab]c"), temperature=0.0)))
    outputs = fake.drain(engine)
    end = end_of(outputs, "bad")
    assert end.finish is FinishReason.ERROR
    assert end.error is not None
    assert end.error.startswith("The grammar cannot be followed further: ")
    assert re.fullmatch("[ab]c", text_of(outputs, "good"))
    assert engine.stats().pages_used == 0


@LOOKAHEAD
def test_a_fault_in_a_step_with_grammars_ends_the_request_that_caused_it(lookahead: int) -> None:
    model = Babbling()
    engine = make_engine(model=model, lookahead=lookahead)
    grammar = Grammar("regex", "[a-c]{6}")
    expected = alone(SamplingParams(grammar=grammar, temperature=0.0))[0]
    engine.add(Request("a", PROMPT, SamplingParams(grammar=grammar, temperature=0.0)))
    outputs = engine.step() + engine.step()
    model.fail_on = 260
    engine.add(Request("bad", (259, 260), SamplingParams(grammar=grammar)))
    while engine.has_work:
        outputs += engine.step()
    assert end_of(outputs, "bad").error == "RuntimeError: token 260 is not digestible"
    assert fake.answers(outputs)["a", 0] == expected


def test_a_grammar_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="grammar is set, but this engine has no tokenizer"):
        fake.make_engine().add(Request("r", PROMPT, SamplingParams(grammar=Grammar("json_object"))))


# Compiling


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TEXT, VOCAB, (eos_of("byte-level"),))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("xml", "<a/>"), "kind is 'xml'; allowed: json_schema, json_object, regex, choice, lark"),
        (Grammar("json_schema", "{"), "The JSON schema cannot be read: "),
        (Grammar("json_schema", "[]"), "it is a list, not an object"),
        (Grammar("json_schema", "false"), "it is false, not an object"),
        (Grammar("json_schema", '{"minimum": NaN}'), "it contains NaN, which is not JSON"),
        (Grammar("json_schema", '{"minimum": 1e999}'), "cannot be read"),
        (Grammar("json_schema", '{"type": "text"}'), "not supported: Invalid type: text"),
        (schema({"$ref": "http://127.0.0.1:1/schema.json"}), "'http://127.0.0.1:1/schema.json' is not present"),
        (schema({"$ref": "#/$defs/none"}), "does not exist"),
        (schema({"if": {}, "then": {}}), 'Unimplemented keys: .*"if", "then"'),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (schema({"type": "string", "format": "iri"}), "Unknown format: iri"),
        (schema({"$schema": "http://json-schema.org/draft-03/schema#"}), "allowed: draft-04 and later"),
        (schema({"allOf": [{"type": "string"}, {"type": "number"}]}), "incompatible types"),
        (schema({"oneOf": [{"type": "string"}, {"minLength": 1}]}), "oneOf constraints are not supported"),
        (schema({"type": "object", "minProperties": 2}), "minProperties is 2 where only 0 names are required"),
        (schema({"uniqueItems": True, "x-guidance": {"lenient": True}}), "Unimplemented keys"),
        (schema({"$ref": "#"}), "No answer fits the JSON schema"),
        (schema({"allOf": [{"$ref": "#"}]}), "No answer fits the JSON schema"),
        (Grammar("regex", "["), "The regex is not supported: .*unclosed character class"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("choice", "[]"), "not a list of strings, at least one"),
        (Grammar("choice", '["a", 1]'), "not a list of strings"),
        (Grammar("choice", "a"), "The choice is not JSON"),
        (Grammar("lark", "begin: A"), "The Lark grammar is not supported"),
        (Grammar("lark", 'start: "' + "\ud800" + '"'), "The Lark grammar has half of a surrogate pair"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_with_the_reason(grammars: Grammars, grammar: Grammar, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        grammars.check(grammar)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        True,
        {},
        {"type": "object", "minProperties": 1},
        {"type": "object", "minProperties": 2, "required": ["a"]},
        {
            "type": "object",
            "minProperties": 1,
            "properties": {"a": {}},
            "required": ["a"],
            "additionalProperties": False,
        },
        {"const": {"minProperties": 9, "uniqueItems": False}},
        {"type": "array", "uniqueItems": False, "items": {"type": "string", "format": "colour"}},
        {"$schema": "https://example.org/own", "properties": {"uniqueItems": False, "format": True}},
        {"oneOf": [{"type": "string"}, {"type": "null"}]},
        {"$id": "http://127.0.0.1:1/s", "$defs": {"a": {"type": "null"}}, "$ref": "#/$defs/a"},
    ],
)
def test_what_can_be_kept_to_is_taken(grammars: Grammars, value: Any) -> None:
    grammars.check(schema(value))


def accepts(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    matcher = grammars.start(grammar)
    return all(matcher.advance(t) for t in TEXT.encode(text, add_special_tokens=False)) and matcher.accepting


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("[1,2]", True),
        ("[1, 2]", True),
        ("[\n  1,\n\t2\n]", True),
        ("[" + " " * 64 + "1]", True),
        ("[" + " " * 65 + "1]", False),
        ("[\r\n\n1]", True),
        (" [1]", False),
        ("[1] ", False),
        ("[1;2]", False),
    ],
)
def test_white_space_is_free_but_bounded(grammars: Grammars, text: str, fits: bool) -> None:
    value = {"type": "array", "items": {"type": "integer"}, "x-guidance": {"item_separator": ";"}}
    assert accepts(grammars, schema(value), text) == fits


def test_digits_are_ascii(grammars: Grammars) -> None:
    assert accepts(grammars, Grammar("regex", r"\d"), "7")
    assert not accepts(grammars, Grammar("regex", r"\d"), "٧")


def test_a_compiled_grammar_is_kept_and_its_matchers_go_their_own_ways(grammars: Grammars) -> None:
    grammar = Grammar("regex", "[ab]{2}")
    assert grammars.prepare(grammar) is grammars.prepare(Grammar("regex", "[ab]{2}"))
    one, two = grammars.start(grammar), grammars.start(grammar)
    (a,) = TEXT.encode("a", False)
    assert one.advance(a)
    assert one.advance(a)
    assert (one.stopped, two.stopped, two.accepting) == (True, False, False)
    assert not one.advance(a)
    assert one.error


def test_sizes_have_caps() -> None:
    limits = GrammarLimits(max_bytes=100, max_depth=3)
    limits.check(Grammar("regex", "a" * 100))
    with pytest.raises(ValueError, match="The regex has 101 bytes; allowed: up to 100"):
        limits.check(Grammar("regex", "a" * 99 + "é"))
    limits.check(schema({"items": {"items": {}}}))
    with pytest.raises(ValueError, match="The JSON schema is nested 4 levels deep; allowed: up to 3"):
        limits.check(schema({"items": {"items": {"anyOf": []}}}))
    with pytest.raises(ValueError, match="nested 102 levels"):
        Grammars(TEXT, VOCAB, ()).check(Grammar("json_schema", '{"items":' * 101 + "{}" + "}" * 101))


@given(
    st.recursive(st.text('[]{}"\\a', max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text('["'), inner))
)
def test_nesting_is_the_depth_of_containers(value: Any) -> None:
    def depth(part: Any) -> int:
        if isinstance(part, str):
            return 0
        return 1 + max(map(depth, part.values() if isinstance(part, dict) else part), default=0)

    assert nesting(json.dumps(value)) == depth(value)


def schema_chain(count: int) -> Grammar:
    defs = {f"{i:x}": {"items": {"$ref": f"#/$defs/{i + 1:x}"}} for i in range(count)}
    return schema({"$defs": defs | {f"{count:x}": {"type": "null"}}, "$ref": "#/$defs/0"})


def rule_chain(count: int) -> Grammar:
    rules = [f"a{i:x}:a{i + 1:x}" for i in range(count)]
    return Grammar("lark", "\n".join(["start:a0", *rules, f'a{count:x}:"x"']))


LARGEST = GrammarLimits().max_bytes
CHAINS = {"schema": schema_chain(LARGEST // 64), "rules": rule_chain(LARGEST // 12)}


@pytest.mark.parametrize("name", CHAINS)
def test_no_chain_of_references_overflows_the_stack(grammars: Grammars, name: str) -> None:
    """llguidance follows them by recursion, and an overflow would end the process."""
    assert 0.6 * LARGEST < len(CHAINS[name].source) <= LARGEST
    grammars.check(CHAINS[name])


def test_compiling_has_a_time_limit_and_is_bounded_in_number() -> None:
    """Two compile at a time; a third waits no longer than the limit."""
    grammars = Grammars(TEXT, VOCAB, (0,), GrammarLimits(compile_seconds=0.02))
    go = threading.Event()
    grammars._made = lambda grammar: go.wait()  # type: ignore[assignment, return-value]
    for pattern in "abc":
        with pytest.raises(ValueError, match=r"The regex was not compiled within 0\.02 s"):
            grammars.start(Grammar("regex", pattern))
    go.set()


# Vocabularies


@pytest.mark.parametrize("kind", [*TEXTS])
@given(text=st.text(st.sampled_from('Helo wrd"{}:,é日👩\n ab<|end|>s'), max_size=12))
@settings(max_examples=40, deadline=None)
def test_forced_text_becomes_tokens_that_say_it(kind: str, text: str) -> None:
    tokens = _Tokens(TEXTS[kind], VOCAB, (2,))
    ids = tokens(text)
    assert not set(ids) & set(tokens.special_token_ids)
    if kind not in ("metaspace", "words"):  # which have no bytes, so not every text can be said
        assert b"".join(tokens.tokens[i] for i in ids) == text.encode()


def test_the_table_of_tokens_is_what_llguidance_reads_from_the_tokenizer(tiny: Callable[[str], Path]) -> None:
    from llguidance import LLTokenizer

    text = Text(open_checkpoint(tiny("llama")))
    ours = Grammars(text, VOCAB, text.eos_ids).tokenizer()
    theirs = LLTokenizer(text.tokenizer.to_str(), n_vocab=VOCAB, eos_token=list(text.eos_ids))
    for i in range(VOCAB):
        assert ours.is_special_token(i) == theirs.is_special_token(i)
        assert ours.decode_bytes([i]) == theirs.decode_bytes([i])
    assert ours.eos_tokens == theirs.eos_tokens == list(text.eos_ids)
    assert [ours.tokenize_str(t) for t in ("the land", ' "and"')] == [
        theirs.tokenize_str(t) for t in ("the land", ' "and"')
    ]


def test_all_end_tokens_are_allowed_where_the_grammar_is_complete_and_padding_never() -> None:
    ends = (eos_of("byte-level"), 300, VOCAB - 1)
    grammars = Grammars(TEXT, VOCAB, ends)
    engine = make_engine()
    engine.eos_ids = ends
    engine.grammars = grammars
    engine.add(Request("r", PROMPT, SamplingParams(grammar=Grammar("regex", "(.|\n)*"), temperature=0.0)))
    while not engine.scheduler.running:
        engine.step()
    (sequence,) = engine.scheduler.decoding
    engine.masks.settle()  # a matcher serves one thread at a time
    row = Masks(VOCAB).fill([sequence]).rows[sequence, 0]
    allowed = {i for i in range(32 * len(row)) if row[i // 32] >> (i % 32) & 1}
    known = {i for i in range(TEXT.vocab_size) if i not in TEXT.special_ids}
    assert allowed - set(ends) <= known
    assert set(ends) <= allowed


def test_a_vocabulary_without_an_end_token_ends_where_nothing_can_follow() -> None:
    engine = Engine(Babbling(), Separate(), fake.settings(max_model_len=64), TEXT, pages=64, eos_ids=())  # type: ignore[arg-type]
    text, end = ask(engine, Grammar("regex", "[ab]{3}"))
    assert re.fullmatch("[ab]{3}", text)
    assert end.finish is FinishReason.STOP


def test_taking_out_what_says_nothing_changes_no_names_and_no_data() -> None:
    value = {
        "properties": {"uniqueItems": False, "format": {"format": "colour"}},
        "enum": [{"uniqueItems": False, "format": "colour"}],
        "items": {"uniqueItems": False, "format": "ipv4"},
    }
    kept = json.loads(json_schema(json.dumps(value)))
    assert kept == {**value, "properties": {"uniqueItems": False, "format": {}}, "items": {"format": "ipv4"}}


@pytest.mark.parametrize(
    ("kind", "text", "fits"),
    [
        ("date", "2024-02-29", True),
        ("date", "2023-02-29", False),
        ("date", "1900-02-29", False),
        ("date", "2000-02-29", True),
        ("date", "2024-04-31", False),
        ("date", "0000-01-01", False),
        ("date", "2024-13-01", False),
        ("time", "23:59:59.25+01:00", True),
        ("time", "12:00:60Z", False),
        ("time", "24:00:00Z", False),
        ("time", "12:00:00", False),
        ("date-time", "2024-12-31T00:00:00Z", True),
        ("date-time", "2024-11-31T00:00:00Z", False),
        ("date-time", "2024-11-30 00:00:00Z", False),
    ],
)
def test_dates_and_times_exist(grammars: Grammars, kind: str, text: str, fits: bool) -> None:
    assert accepts(grammars, schema({"type": "string", "format": kind}), json.dumps(text)) == fits
    both = {"type": "string", "format": kind, "pattern": "^2", "allOf": [{"maxLength": 30}]}
    assert accepts(grammars, schema(both), json.dumps(text)) == (fits and text.startswith("2"))


@given(st.dates() | st.tuples(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32)))
def test_every_date_that_exists_is_in_the_pattern_and_no_other(value: Any) -> None:
    text = value.isoformat() if isinstance(value, date) else "{:04}-{:02}-{:02}".format(*value)
    try:
        date.fromisoformat(text)
        exists = True
    except ValueError:
        exists = False
    assert bool(re.fullmatch(DATE, text)) == exists
