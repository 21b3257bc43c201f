"""Right requests with one thing changed anywhere inside them get an answer or a 4xx in OpenAI's shape, never a 5xx."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import FakeLLM
from tests.serve.decide.conftest import Opinionated
from tests.serve.fuzz import check_openai
from tests.serve.test_embeddings import Embedder
from tests.serve.test_tokens import Words

TEXT = {"type": "input_text", "text": "x"}
REQUESTS = {
    "/v1/embeddings": {"model": "tiny", "input": ["a", "b"], "dimensions": 3, "encoding_format": "float", "user": "u"},
    "/v1/completions": {"model": "tiny", "prompt": [[1, 2], [3]], "logit_bias": {"5": 1.0}, "stop": ["a"], "n": 2},
    "/v1/classify": {"model": "tiny", "input": ["a"], "labels": ["x", "y"], "orders": 2, "temperature": 1.5},
    "/v1/decisions": {
        "model": "tiny",
        "input": [
            {"role": "user", "content": [TEXT, {"type": "input_json", "data": {"a": [1, {"b": None}]}}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "y"}], "phase": "commentary"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
            {"type": "function_call_output", "call_id": "1", "output": [TEXT]},
        ],
        "questions": [
            {"type": "predicate", "instructions": [TEXT], "name": "p"},
            {"type": "choice", "instructions": "q", "choices": [{"value": True}, {"value": "a", "description": "d"}]},
            {"type": "score", "instructions": "q", "levels": [{"label": "a"}, {"label": "b"}]},
        ],
        "prompt_cache_options": {"mode": "explicit"},
    },
    "/tokenize": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "chat_template_kwargs": {"enable_thinking": True},
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "/detokenize": {"model": "tiny", "tokens": [1, 2, 3]},
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["", "\x00", "\u2028", "😀" * 50, [], {}, [[]], [{}], {"type": "input_image"}, [None] * 300]),
)


def places(value, path=()):
    """Every place in a request."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(request, path, value, remove):
    if not path:
        return value
    request = copy.deepcopy(request)
    inner = request
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return request


class Everything(Opinionated):
    """Decides, embeds and continues, whatever is asked for."""

    def __init__(self):
        super().__init__(lambda text: {"A": 1.0})
        self.text = Words()

    def generate(self, prompt, params, **rest):
        kind = Embedder if rest.get("pool") else Opinionated if params.logprob_token_ids else FakeLLM
        return kind.generate(self, prompt, params, **rest)


@pytest.fixture
def llm():
    return Everything()


@pytest.mark.parametrize("path", REQUESTS)
def test_the_requests_are_right_as_they_are(client, path):
    assert client.request("POST", path, json=REQUESTS[path]).status_code == 200


@pytest.mark.parametrize("path", REQUESTS)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_one_change(client, path, data):
    where = data.draw(st.sampled_from(sorted(places(REQUESTS[path]), key=repr)))
    body = changed(REQUESTS[path], where, data.draw(VALUES), data.draw(st.booleans()))
    check_openai(client.request("POST", path, content=json.dumps(body).encode()))
