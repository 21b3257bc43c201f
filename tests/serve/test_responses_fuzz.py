"""Whatever JSON is sent to /v1/responses and /v1/messages, it gets an answer or a 4xx in the API's shape."""

import json
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.serve.messages import conversation
from tenfold.serve.protocol.messages import CountTokensRequest, MessagesRequest
from tenfold.serve.protocol.responses import InputTokensRequest, ResponsesRequest
from tenfold.serve.responses import items
from tests.serve.fuzz import refusal, scalars, values

WORDS = sorted(
    {"type", "role", "content", "text", "name", "id", "call_id", "arguments", "output", "summary", "input", "tools"}
    | {"function", "custom", "input_schema", "json_schema", "schema", "strict", "mode", "format", "effort", "auto"}
    | {"required", "allowed_tools", "any", "tool", "none", "thinking", "signature", "tool_use_id", "{}", "tiny", "[1"}
    | {*items.READERS, *items.TEXT_PARTS, *items.ROLES, "item_reference", "parameters", "image", "enabled"}
    | {kind for readers in conversation.READERS.values() for kind in readers}
)
SCALARS = scalars(WORDS)
VALUES = values(WORDS, widest=5, leaves=12)
STRINGS = st.sampled_from(["x", "{}", '{"a": 1}', "[1", "find"])
TEXTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(list(items.TEXT_PARTS)), "text": STRINGS}), max_size=2)
# Close to right, so that what is behind the first checks is met too.
ITEMS = st.fixed_dictionaries(
    {"type": st.sampled_from([*items.READERS, "item_reference"])},
    optional={
        "role": st.sampled_from([*items.ROLES, "tool"]),
        "content": STRINGS | TEXTS | VALUES,
        "summary": TEXTS | VALUES,
        "output": STRINGS | TEXTS | VALUES,
        **dict.fromkeys(["id", "call_id", "name", "arguments"], STRINGS),
    },
)
BLOCKS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "redacted_thinking", "image"])},
    optional={
        "input": st.dictionaries(STRINGS, VALUES, max_size=2) | VALUES,
        "content": STRINGS | TEXTS | VALUES,
        **dict.fromkeys(["text", "id", "name", "thinking", "tool_use_id", "is_error"], STRINGS | SCALARS),
    },
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": STRINGS | st.lists(BLOCKS, max_size=3)}
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": STRINGS},
        optional={"type": st.sampled_from(["function", "custom"]), "parameters": VALUES, "input_schema": VALUES},
    ),
    max_size=2,
)


def bodies(model, conversation):
    changes = st.dictionaries(st.sampled_from(sorted(model.model_fields)) | st.text(max_size=4), VALUES, max_size=3)
    least = {"model": "tiny", "max_tokens": 5} if "max_tokens" in model.model_fields else {"model": "tiny"}
    return st.builds(lambda talk, tools, more: least | talk | tools | more, conversation, tools_or_none(), changes)


def tools_or_none():
    return st.just({}) | st.fixed_dictionaries({"tools": TOOLS, "tool_choice": st.just("auto") | VALUES})


def talk(name, of):
    return st.fixed_dictionaries({name: st.lists(of, min_size=1, max_size=4) | VALUES})


FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(client, path, body, keys):
    response = client.request("POST", path, content=json.dumps(body).encode())
    if response.status_code == 200:
        assert "event: error" not in response.text
        assert "response.failed" not in response.text
        return
    assert set(refusal(response)) == keys


@FUZZ
@given(bodies(ResponsesRequest, talk("input", ITEMS)))
def test_responses(client, body):
    check(client, "/v1/responses", body, {"error"})


@FUZZ
@given(bodies(InputTokensRequest, talk("input", ITEMS)))
def test_input_tokens(client, body):
    check(client, "/v1/responses/input_tokens", body, {"error"})


@FUZZ
@given(bodies(MessagesRequest, talk("messages", TURNS)))
def test_messages(client, body):
    check(client, "/v1/messages", body, {"type", "error", "request_id"})


@FUZZ
@given(bodies(CountTokensRequest, talk("messages", TURNS)))
def test_count_tokens(client, body):
    check(client, "/v1/messages/count_tokens", body, {"type", "error", "request_id"})


@FUZZ
@given(st.text(max_size=20), st.dictionaries(st.sampled_from(["limit", "order", "after", "stream"]), st.text()))
def test_ids_and_queries(client, id, query):
    for path in (f"/v1/responses/{id}", f"/v1/responses/{id}/input_items"):
        response = client.get(path.replace(id, quote(id, safe="")) if id else path, params=query)
        assert 400 <= response.status_code < 500, response.text
