import base64

import numpy as np
import pytest

from tenfold.engine.request import FinishReason, Output
from tests.serve.conftest import FakeLLM

VECTOR = (3.0, 0.0, -4.0)


class Embedder(FakeLLM):
    """The vector of a prompt is VECTOR times its length."""

    async def generate(self, prompt, params, *, request_id, **rest):
        self.calls.append({"prompt": tuple(prompt), "params": params, "request_id": request_id} | rest)
        if self.fail is not None:
            raise self.fail
        vector = tuple(x * len(prompt) for x in VECTOR)
        yield Output(request_id, 0, finish=self.finish, embedding=vector)


@pytest.fixture
def llm():
    return Embedder()


def embed(client, **fields):
    return client.post("/v1/embeddings", {"input": "Hi"} | fields)


def test_floats(client, llm):
    body = embed(client).json()
    assert body["object"] == "list"
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": pytest.approx([0.6, 0, -0.8])}]
    assert body["model"] == "tiny"
    assert body["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert llm.calls[0]["pool"] == "mean"


def test_base64_is_little_endian_float32(client):
    (entry,) = embed(client, encoding_format="base64").json()["data"]
    assert np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") == pytest.approx([0.6, 0, -0.8])


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        ("x" * 128, [b"x" * 128]),  # a whole context: no answer has to fit in
    ],
)
def test_shapes_of_input(client, llm, given, prompts):
    body = embed(client, input=given, pooling="last", user="me").json()
    assert [bytes(call["prompt"]) for call in llm.calls] == prompts
    assert [entry["index"] for entry in body["data"]] == list(range(len(prompts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert {call["pool"] for call in llm.calls} == {"last"}
    assert {call["user"] for call in llm.calls} == {"me"}


def test_the_models_own_number_of_dimensions(client):
    assert embed(client, dimensions=3).status_code == 200


WRONG = [
    ({"dimensions": 2}, "dimensions", "have 3 and cannot be cut"),
    ({"dimensions": 0}, "dimensions", "1"),
    ({"input": ""}, "input", "empty"),
    ({"input": []}, "input", "empty"),
    ({"input": ["a", ""]}, "input", "empty"),
    ({"input": [[]]}, "input", "empty"),
    ({"input": ["a"] * 65}, "input", "--max-prompts"),
    ({"input": [256]}, "input", "0 to 255"),
    ({"input": "x" * 129}, "input", "128 tokens"),
    ({"input": {"text": "x"}}, "input", "string"),
    ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ({"pooling": "max"}, "pooling", "'mean' or 'last'"),
    ({"inptu": 1}, "inptu", "not a field"),
]


@pytest.mark.parametrize(("fields", "param", "word"), WRONG)
def test_wrong_fields(client, fields, param, word):
    response = embed(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert word in error["message"]


def test_failures(client, llm):
    llm.finish = FinishReason.ERROR
    assert embed(client).status_code == 500
    llm.fail = ValueError("The engine refuses.")
    assert embed(client).json()["error"]["message"] == "The engine refuses."


def test_a_cap_from_the_settings(make_client):
    client = make_client(max_prompts=2)
    assert embed(client, input=["a", "b"]).status_code == 200
    assert "up to 2 in one request (--max-prompts)" in embed(client, input=["a", "b", "c"]).text
