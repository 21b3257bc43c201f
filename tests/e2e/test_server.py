"""The whole way on a tiny random model: OpenAI's client, a socket, `tenfold serve`, the engine, and back."""

import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

MODEL = "llama"
KEY = "sk-e2e"
USER = [{"role": "user", "content": "the land and the hill"}]


@pytest.fixture(scope="module")
def server(tiny, serve):
    with serve("--model", str(tiny(MODEL)), "--kernels", "torch", "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def chat(client, **fields):
    given = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 12} | fields
    return client.chat.completions.create(**given)


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_streams_what_it_answers(client):
    whole = chat(client, extra_body={"ignore_eos": True})
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    pieces = list(chat(client, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}))
    text = "".join(e.choices[0].delta.content or "" for e in pieces if e.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 12
    assert pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens >= 16  # the same prompt was there before


def test_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=4)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob <= 0
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy
        assert len(entry.top_logprobs) == 3


def test_seeded_choices_are_reproducible(client):
    def texts():
        answer = chat(client, n=3, seed=5, temperature=1.5)
        return [c.message.content for c in answer.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_completions(client):
    answer = client.completions.create(
        model=MODEL, prompt=["the and", "in a hill"], max_tokens=3, temperature=0, echo=True, logprobs=1
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert [c.text.startswith(p) for c, p in zip(answer.choices, ("the and", "in a hill"), strict=True)] == [True, True]
    for choice in answer.choices:
        assert choice.logprobs.token_logprobs[0] is None
        assert all(p <= 0 for p in choice.logprobs.token_logprobs[1:])


def test_concurrent_requests_do_not_disturb_each_other(client):
    prompts = [f"the {word} and the hill" for word in ("land", "inn", "all", "an", "thin", "hand", "tin", "lid")]

    def complete(prompt):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0)
        return answer.choices[0].text

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(complete, prompts)) == alone


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "the " * 500}]}, openai.BadRequestError, "messages"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
    ],
)
def test_errors_reach_the_client_as_its_own(client, fields, error, param):
    with pytest.raises(error) as raised:
        chat(client, **fields)
    assert raised.value.param == param


def test_wrong_key(server):
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_stopping_lets_running_answers_end(server):
    """The last test of this module: it ends the server."""
    body = {"model": MODEL, "prompt": "the", "max_tokens": 150, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert server.wait() == 0
    assert "Traceback" not in "".join(server.log)
