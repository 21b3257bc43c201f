"""Messages between the two processes: what is written is what is read, and what is wrong is refused."""

import io

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.config import EngineConfig
from tenfold.engine import wire
from tenfold.engine.facts import Facts, Stats
from tenfold.engine.request import FinishReason, Grammar, Logprob, Output, Request, SamplingParams

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # no halves of surrogate pairs
NUMBERS = st.floats(allow_nan=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
TOKENS = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)


def tuples(of, most=3):
    return st.lists(of, max_size=most).map(tuple)


LOGPROBS = st.builds(Logprob, INTEGERS, NUMBERS, tuples(st.tuples(INTEGERS, NUMBERS)), tuples(NUMBERS))
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | INTEGERS,
    temperature=NUMBERS,
    logit_bias=st.dictionaries(INTEGERS, NUMBERS, max_size=3),
    seed=st.none() | INTEGERS,
    stop=tuples(WORDS),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    grammar=st.none() | st.builds(Grammar, WORDS, WORDS),
    logprob_token_ids=TOKENS,
)
REQUESTS = st.builds(
    Request,
    id=WORDS,
    prompt=TOKENS,
    params=PARAMS,
    priority=INTEGERS,
    user=WORDS,
    salt=WORDS,
    deadline=st.none() | NUMBERS,
    pool=st.none() | WORDS,
    arrival=NUMBERS,
)
OUTPUTS = st.builds(
    Output,
    request_id=WORDS,
    index=INTEGERS,
    tokens=TOKENS,
    text=WORDS,
    logprobs=tuples(LOGPROBS),
    prompt_logprobs=st.none() | tuples(st.none() | LOGPROBS),
    finish=st.none() | st.sampled_from(FinishReason),
    stop=st.none() | WORDS | INTEGERS,
    error=st.none() | WORDS,
    queue_seconds=NUMBERS,
    cached_tokens=INTEGERS,
    embedding=st.none() | tuples(NUMBERS),
)
STATS = st.builds(Stats, *[INTEGERS] * 7, NUMBERS, NUMBERS, *[INTEGERS] * 6)
FACTS = st.builds(
    Facts,
    config=st.builds(EngineConfig, model=WORDS, threads=INTEGERS),
    vocab_size=INTEGERS,
    max_model_len=INTEGERS,
    pages=INTEGERS,
    memory=WORDS,
    timeline=tuples(st.tuples(WORDS, NUMBERS)),
    choices=tuples(st.dictionaries(WORDS, WORDS | INTEGERS | NUMBERS | st.none(), max_size=3)),
)
EVENTS = st.one_of(
    st.builds(wire.Ready, FACTS, STATS),
    st.builds(wire.Failed, WORDS, WORDS),
    st.builds(wire.Started, st.lists(WORDS, max_size=3)),
    st.builds(wire.Outputs, st.lists(OUTPUTS, max_size=3), STATS),
    st.builds(wire.Refused, WORDS, WORDS, WORDS, INTEGERS),
    st.builds(wire.Beat, STATS, st.booleans(), INTEGERS, NUMBERS, WORDS),
    st.builds(wire.Log, WORDS, INTEGERS, WORDS),
)


@given(REQUESTS)
def test_requests_round_trip(request):
    command = wire.decode_command(wire.submit(request))
    assert isinstance(command, wire.Submit)
    assert command.id == request.id
    assert wire.request_of(command) == request


@given(EVENTS)
def test_events_round_trip(event):
    assert wire.decode_event(wire.encode(event)) == event


@pytest.mark.parametrize("command", [wire.Abort("a"), wire.Dump(), wire.Stop()])
def test_commands_round_trip(command):
    assert wire.decode_command(wire.encode(command)) == command


def test_numbers_of_other_libraries_cross_as_numbers():
    params = SamplingParams(temperature=np.float32(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    command = wire.decode_command(wire.submit(Request("a", (np.int32(1), 2), params)))  # type: ignore[arg-type]
    assert isinstance(command, wire.Submit)
    found = wire.request_of(command)
    assert (found.prompt, found.params.temperature, found.params.seed) == ((1, 2), 0.5, 3)


def test_nan_crosses():
    """Whether it is allowed is for the engine to say."""
    params = SamplingParams(temperature=float("nan"))
    command = wire.decode_command(wire.submit(Request("a", (1,), params)))
    assert isinstance(command, wire.Submit)
    with pytest.raises(ValueError, match="temperature is nan"):
        wire.request_of(command).params.check()


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"max_tokens": 1.5}, "^params.max_tokens has the wrong type: Expected `int | null`, got `float`.$"),
        ({"temperature": "hot"}, "^params.temperature has the wrong type: Expected `float`, got `str`.$"),
        ({"stop": (1,)}, r"^params.stop\[0\] has the wrong type: Expected `str`, got `int`.$"),
        ({"logit_bias": {"a": 1.0}}, "^params.logit_bias has the wrong type: Expected `int`, got `str`.$"),
    ],
)
def test_wrong_types_are_refused_by_field(params, reason):
    command = wire.decode_command(wire.submit(Request("a", (1,), SamplingParams(**params))))
    assert isinstance(command, wire.Submit)
    with pytest.raises(ValueError, match=reason):
        wire.request_of(command)


@pytest.mark.parametrize(
    "message", [b"", b"\x93", wire.encode(wire.Stop()) + b"x", msgspec.msgpack.encode(["Run", "x"])]
)
def test_what_is_no_message_is_refused(message):
    with pytest.raises(msgspec.DecodeError):
        wire.decode_command(message)


def test_start_in_pieces():
    start = wire.Start("a:b", EngineConfig(model="m"), 6, 7, 0.5, 20)
    file = io.BytesIO()
    wire.write_start(file, start)
    content = io.BytesIO(file.getvalue() + b"more")
    assert wire.read_start(lambda count: content.read(min(count, 7))) == start
    assert content.read() == b"more"
    cut = io.BytesIO(file.getvalue()[:-1])
    with pytest.raises(EOFError):
        wire.read_start(cut.read)
