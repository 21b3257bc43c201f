import pytest

from tenfold.engine.request import Logprob, Output, SamplingParams
from tenfold.serve.logprobs import TextLogprobs
from tenfold.serve.routes.completions import Choice, _pieces


def test_text(client, llm):
    body = client.complete().json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": llm.answer, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 2
    assert llm.calls[0]["params"] == SamplingParams(max_tokens=16, top_k=50)  # OpenAI's default for this endpoint


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_shapes_of_prompt(client, llm, prompt, prompts):
    body = client.complete(prompt=prompt, n=2, echo=True).json()
    assert sorted(bytes(call["prompt"]) for call in llm.calls) == sorted(prompts)
    expected = [text.decode() + llm.answer + str(i) for text in prompts for i in range(2)]
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(expected))
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert len({call["request_id"] for call in llm.calls}) == len(prompts)


def test_logprobs(client):
    choice = client.complete(logprobs=1, max_tokens=3).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["H", "bytes:\\xc3", "bytes:\\xa4"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"a": -1.0, name: -0.5} for name in ("H", "bytes:\\xc3", "bytes:\\xa4")],
        "text_offset": [0, 1, 1],
    }


def test_offsets_count_characters_of_the_text(client, llm):
    logprobs = client.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6]


def test_echo_with_logprobs_of_the_prompt(client, llm):
    body = client.complete(prompt="Hi!", logprobs=1, echo=True, max_tokens=1).json()
    choice = body["choices"][0]
    assert choice["text"] == "Hi!H"
    assert choice["logprobs"]["tokens"] == ["H", "i", "!", "H"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert llm.calls[0]["params"].prompt_logprobs == 1


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_every_answer_echoes_the_logprobs_of_its_prompt(client, read_events, max_tokens):
    asked = {"prompt": ["Hi!", "ab"], "n": 3, "logprobs": 1, "echo": True, "max_tokens": max_tokens}
    choices = client.complete(**asked).json()["choices"]
    streamed = [[] for _ in choices]
    for made in read_events(client.complete(**asked, stream=True)):
        for choice in made["choices"]:
            streamed[choice["index"]] += choice["logprobs"]["token_logprobs"]
    for choice, again in zip(choices, streamed, strict=True):
        size = 3 if choice["index"] < 3 else 2
        assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * (size - 1 + max_tokens) == again
        assert choice["logprobs"]["top_logprobs"][1] is not None


@pytest.mark.parametrize("order", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_answer_waits_for_the_logprobs_of_the_prompt(order):
    """Whichever answer comes first, the first of them is told the prompt's."""
    choices = [Choice(i, "ab", (97, 98), False, TextLogprobs(lambda token: bytes([token]))) for i in range(2)]
    texts, probabilities, sent = ["", ""], [[], []], [0, 0]
    for i in order:
        prompt = (None, Logprob(98, -0.25)) if i == 0 else None
        output = Output("a", i, (99 + sent[i],), chr(99 + sent[i]), (Logprob(99 + sent[i], -0.5),), prompt)
        sent[i] += 1
        for piece in _pieces(choices, 2, i, output):
            texts[piece["index"]] += piece["text"]
            probabilities[piece["index"]] += piece["logprobs"]["token_logprobs"]
    assert texts == ["abc", "abcd"]
    assert probabilities == [[None, -0.25, -0.5], [None, -0.25, -0.5, -0.5]]


def test_prompt_alone(client, llm):
    """What evaluation harnesses ask for: log-probabilities of a given text, and nothing generated."""
    body = client.complete(prompt="Hi!", logprobs=1, echo=True, max_tokens=0).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi!", "length")
    assert choice["logprobs"]["tokens"] == ["H", "i", "!"]
    assert body["usage"]["completion_tokens"] == 0


def test_stream(client, llm, read_events):
    events = read_events(client.complete(stream=True, stream_options={"include_usage": True}))
    assert {e["object"] for e in events} == {"text_completion"}
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == llm.answer
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 2 + len(llm.answer.encode())


def test_stream_of_a_batch_with_echo(client, llm, read_events):
    texts = {}
    for e in read_events(client.complete(prompt=["ab", "c"], stream=True, echo=True, n=2)):
        choice = e["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: f"ab{llm.answer}0", 1: f"ab{llm.answer}1", 2: f"c{llm.answer}0", 3: f"c{llm.answer}1"}


def test_stream_with_logprobs_has_every_token_once(client, llm, read_events):
    events = read_events(client.complete(stream=True, echo=True, logprobs=0))
    parts = [e["choices"][0]["logprobs"] for e in events]
    assert len([t for p in parts for t in p["tokens"]]) == 2 + len(llm.answer.encode())
    offsets = [o for p in parts for o in p["text_offset"]]
    assert offsets == sorted(offsets)


def test_one_failing_prompt_fails_the_batch_and_stops_the_others(client, llm):
    llm.fail, llm.fail_after = ValueError("The engine does not like this prompt."), 1
    response = client.complete(prompt=["ab", "c"])
    assert response.status_code == 400
    assert sorted(llm.cancelled) == sorted(call["request_id"] for call in llm.calls)


def test_a_format_reaches_the_engine(client, llm):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    held = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert client.complete(response_format=held).status_code == 200
    assert llm.calls[-1]["params"].grammar.kind == "json_schema"
    assert client.complete(guided_choice=["yes", "no"]).status_code == 200
    assert llm.calls[-1]["params"].grammar.kind == "choice"
    assert client.complete().status_code == 200
    assert llm.calls[-1]["params"].grammar is None


def test_two_formats_at_once_are_refused(client):
    answer = client.complete(guided_regex="a+", response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "guided_regex"
