"""Whatever JSON a client sends, it gets an answer or OpenAI's error shape with a 4xx, never a 5xx."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.serve.protocol.chat import ChatRequest
from tenfold.serve.protocol.completions import CompletionRequest
from tests.serve.fuzz import check_openai, values

WORDS = ["user", "assistant", "tool", "text", "type", "content", "role", "tiny", "none", "low"]
VALUES = values(WORDS)


def bodies(model):
    names = sorted(model.model_fields)
    base = st.sampled_from(
        [{"model": "tiny", "messages": [{"role": "user", "content": "x"}]}, {"model": "tiny", "prompt": "x"}, {}]
    )
    changes = st.dictionaries(st.sampled_from(names) | st.text(max_size=4), VALUES, max_size=3)
    return st.builds(lambda b, c: {k: v for k, v in b.items() if k in names} | c, base, changes)


FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(client, path, body):
    check_openai(client.request("POST", path, content=json.dumps(body).encode()))


@FUZZ
@given(bodies(ChatRequest))
def test_chat(client, body):
    check(client, "/v1/chat/completions", body)


@FUZZ
@given(bodies(CompletionRequest))
def test_completions(client, body):
    check(client, "/v1/completions", body)
