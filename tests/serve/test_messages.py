"""/v1/messages with Anthropic's own client."""

import json

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from tenfold.engine.request import FinishReason, Grammar, Output, SamplingParams
from tenfold.serve.app import create_app
from tenfold.serve.messages.answer import arguments
from tenfold.serve.parse.pieces import CallArguments, CallBegin, Text
from tenfold.serve.settings import ServeConfig
from tests.serve.clients import FULL, KEY, asked, scripted, with_anthropic

EVENTS = TypeAdapter(RawMessageStreamEvent)
TEXT = {"type": "text", "text": "x"}
USE = {"type": "tool_use", "id": "t", "name": "x", "input": {}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
TOOL = {"name": "find", "description": "Look.", "input_schema": {"type": "object"}}
USER = {"role": "user", "content": "Hi"}
LEAST = {"model": "tiny", "max_tokens": 20, "messages": [USER]}


@pytest.fixture(autouse=True)
def room(llm, monkeypatch):
    """For tools in the prompt."""
    monkeypatch.setattr(type(llm), "max_model_len", 2000)


@pytest.fixture
def app(llm):
    return create_app({"tiny": llm})


def create(app, **fields):
    return with_anthropic(app, lambda c: c.messages.create(**LEAST | fields))


def send(client, path="/v1/messages", **fields):
    return client.post(path, LEAST | fields)


def events_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    found = [part.split("\n") for part in response.text.split("\n\n")[:-1]]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in found]


def check_error(response, status, kind):
    body = response.json()
    assert response.status_code == status, body
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["error"]["message"]
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]["message"]


def test_whole(app, llm):
    message = create(app)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    (block,) = message.content
    assert (block.type, block.text) == ("text", llm.answer)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (8, 8)
    assert message.usage.cache_read_input_tokens == message.usage.cache_creation_input_tokens == 0
    assert message.usage.output_tokens_details.thinking_tokens == 0
    assert message._request_id == message.id.replace("msg_", "req-")
    assert llm.calls[0]["request_id"] == message.id.replace("msg_", "msg-")


def test_cached_tokens_are_counted_apart(app):
    usage = create(app, messages=[{"role": "user", "content": "x" * 40}]).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (46 - 16, 16)


def test_every_sampling_field_reaches_the_engine(client, llm):
    fields = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "ann"},
        "priority": -5,
        "cache_salt": "s",
    }
    assert send(client, **fields).status_code == 200
    call = llm.calls[0]
    assert call["params"] == SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9, top_k=4, stop=("END",))
    assert (call["priority"], call["user"], call["salt"]) == (-5, "ann", ":s")


def test_blocks_of_a_conversation_become_messages(app, monkeypatch):
    asks = asked(monkeypatch)
    use = {"type": "tool_use", "id": "t1", "name": "find", "input": {"q": 1}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                use,
                use | {"id": "t2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "x"}],
                },
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    create(app, messages=messages, system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}])
    calls = [{"id": f"t{i}", "type": "function", "function": {"name": "find", "arguments": {"q": 1}}} for i in (1, 2)]
    assert asks[0].messages == [
        {"role": "system", "content": "Be\nkind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: x"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "So?"},
    ]


def test_an_answer_can_be_sent_back_as_it_is(app, monkeypatch):
    scripted(monkeypatch, FULL)
    asks = asked(monkeypatch)

    async def scenario(client):
        async with client.messages.stream(**LEAST, tools=[TOOL]) as stream:
            first = await stream.get_final_message()
        results = [{"type": "tool_result", "tool_use_id": f"call_{i}", "content": "ok"} for i in (1, 2)]
        messages = [USER, first.to_param(), {"role": "user", "content": results}]
        await client.messages.create(**LEAST | {"messages": messages}, tools=[TOOL])

    with_anthropic(app, scenario)
    answer = asks[1].messages[1]
    assert (answer["content"], answer["reasoning_content"]) == ("I look it up.", "Let me see.")
    assert [call["function"]["arguments"] for call in answer["tool_calls"]] == [{"q": "ä"}, {}]


def test_the_last_message_may_begin_the_answer(app, llm):
    create(app, messages=[USER, {"role": "assistant", "content": "The answer is"}])
    messages, settings = llm.rendered[0]
    assert messages[-1] == {"role": "assistant", "content": "The answer is"}
    assert settings["continue_final_message"] is True


def test_thoughts_texts_and_calls_are_blocks(app, monkeypatch):
    scripted(monkeypatch, FULL)
    message = create(app, tools=[TOOL])
    thought, text, find, stop = message.content
    assert (thought.type, thought.thinking) == ("thinking", "Let me see.")
    assert thought.signature
    assert text.text == "I look it up."
    assert (find.type, find.id, find.name, find.input) == ("tool_use", "call_1", "find", {"q": "ä"})
    assert (stop.id, stop.input) == ("call_2", {})
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens_details.thinking_tokens == 2


@pytest.mark.parametrize("thinking", [None, {"type": "adaptive", "display": "omitted"}])
@pytest.mark.parametrize("script", [None, FULL, []])
def test_a_stream_adds_up_to_the_whole(app, script, thinking, monkeypatch):
    if script is not None:
        scripted(monkeypatch, script)
    fields = {"tools": [TOOL]} | ({"thinking": thinking} if thinking else {})

    async def scenario(client):
        async with client.messages.stream(**LEAST, **fields) as stream:
            texts = [text async for text in stream.text_stream]
            return "".join(texts), await stream.get_final_message()

    text, streamed = with_anthropic(app, scenario)
    whole = create(app, **fields)
    forget = {"id": True, "content": {"__all__": {"parsed_output"}}}
    assert streamed.model_dump(exclude=forget, exclude_none=True) == whole.model_dump(exclude=forget, exclude_none=True)
    assert text == "".join(block.text for block in whole.content if block.type == "text")


def test_events_are_what_the_client_types_say(client, monkeypatch):
    scripted(monkeypatch, FULL)
    events = events_of(send(client, stream=True, tools=[TOOL]))
    for name, payload in events:
        assert name == payload["type"]
        EVENTS.validate_python(payload)
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert [name for name, _ in events] == [
        *("message_start", start, delta, delta, delta, stop),
        *(start, delta, delta, stop),
        *(start, delta, delta, stop),
        *(start, delta, stop),
        *("message_delta", "message_stop"),
    ]
    assert [e["index"] for n, e in events if n == stop] == [0, 1, 2, 3]
    deltas = [e["delta"]["type"] for n, e in events if n == delta]
    assert deltas == ["thinking_delta"] * 2 + ["signature_delta"] + ["text_delta"] * 2 + ["input_json_delta"] * 3
    started = events[0][1]["message"]
    assert (started["content"], started["stop_reason"]) == ([], None)


@pytest.mark.parametrize(
    ("finish", "stop", "max_tokens", "reason", "sequence"),
    [
        (FinishReason.STOP, None, 20, "end_turn", None),
        (FinishReason.STOP, 7, 20, "end_turn", None),
        (FinishReason.STOP, "END", 20, "stop_sequence", "END"),
        (FinishReason.STOP, "of the template", 20, "end_turn", None),
        (FinishReason.LENGTH, None, 8, "max_tokens", None),
        (FinishReason.LENGTH, None, 20, "model_context_window_exceeded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_why_it_stopped(client, llm, monkeypatch, finish, stop, max_tokens, reason, sequence, stream):
    outputs = [Output("", 0, (97,) * 8, "a", finish=finish, stop=stop)]
    monkeypatch.setattr(llm, "_outputs", lambda *_: outputs)
    response = send(client, stop_sequences=["END"], max_tokens=max_tokens, stream=stream)
    told = events_of(response)[-2][1]["delta"] if stream else response.json()
    assert (told["stop_reason"], told["stop_sequence"]) == (reason, sequence)


def test_a_call_that_was_cut_off_has_what_there_is(app, llm, monkeypatch):
    llm.finish = FinishReason.LENGTH
    scripted(monkeypatch, [[CallBegin(0, "t", "find"), CallArguments(0, '{"q": "ab", "r": [1, 2')]])
    message = create(app, tools=[TOOL], max_tokens=8)
    assert message.stop_reason == "max_tokens"
    assert message.content[0].input == {"q": "ab", "r": [1, 2]}


@pytest.mark.parametrize(("text", "found"), [("", {}), ("[1]", {}), ("{oops", {}), ('{"a": {"b": 1', {"a": {"b": 1}})])
def test_arguments(text, found):
    assert arguments(text) == found


def test_structured_outputs_are_parsed(app, llm, monkeypatch):
    class Found(BaseModel):
        n: int

    scripted(monkeypatch, [[Text('{"n": 3}')]])
    parsed = with_anthropic(app, lambda c: c.messages.parse(**LEAST, output_format=Found))
    assert parsed.parsed_output == Found(n=3)
    grammar = llm.calls[0]["params"].grammar
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.source)["required"] == ["n"]


# --- what a field does


def test_every_field_of_anthropics_client_is_known():
    from anthropic.types import message_count_tokens_params as counting
    from anthropic.types import message_create_params as creating
    from anthropic.types import output_config_param, tool_param
    from anthropic.types.beta import message_create_params as beta

    from tenfold.serve.protocol import messages as ours

    def check(theirs, model):
        assert set(theirs.__annotations__) - {"stream", "betas"} <= set(model.model_fields)
        for name in model.model_fields:
            assert model.treatment(name) in ("honoured", "ignored", "refused")

    check(creating.MessageCreateParamsBase, ours.MessagesRequest)
    check(beta.MessageCreateParamsBase, ours.MessagesRequest)
    check(counting.MessageCountTokensParams, ours.CountTokensRequest)
    check(output_config_param.OutputConfigParam, ours.OutputOptions)
    check(tool_param.ToolParam, ours.ClientTool)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "x"}]}, "nothing to answer"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "without text"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [USE]},
                ]
            },
            "tool_result",
        ),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "image",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 1}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]}, "input"),
        ({"messages": [USER], "system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "web_search_20260318"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL, TOOL]}, "find"),
        ({"tools": [{"name": "x"}] * 129}, "--max-tools"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"fallbacks": ["x"]}, "fallbacks"),
        ({"compaction": {"type": "auto"}}, "compaction"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"misspelt": 1}, "misspelt"),
    ],
)
def test_what_cannot_be_is_refused(client, fields, named):
    assert named in check_error(send(client, **fields), 400, "invalid_request_error")


def test_ignored_fields_are_named(client):
    fields = {"speed": "fast", "service_tier": "auto", "thinking": {"type": "enabled", "budget_tokens": 1024}}
    response = send(client, **fields, cache_control={"type": "ephemeral"}, mcp_servers=[], diagnostics=None)
    assert response.status_code == 200
    named = "cache_control, diagnostics, service_tier, speed, thinking.budget_tokens"
    assert response.headers["x-tenfold-ignored"] == named


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True, "thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    ],
)
def test_thinking_is_told_to_the_template(client, llm, fields, told):
    assert send(client, **fields).status_code == 200
    assert llm.rendered[0][1] == told


def test_tools_and_choices_reach_the_turn(client, monkeypatch):
    asks = asked(monkeypatch)
    for kind in ({"type": "auto"}, {"type": "any", "disable_parallel_tool_use": True}, {"type": "none"}):
        send(client, tools=[TOOL | {"strict": True}], tool_choice=kind)
    send(client, tools=[TOOL], tool_choice={"type": "tool", "name": "find"})
    assert [(a.choose.mode, a.choose.name, a.choose.parallel) for a in asks] == [
        ("auto", "", True),
        ("required", "", False),
        ("none", "", True),
        ("named", "find", True),
    ]
    assert (asks[0].tools[0].strict, asks[0].tools[0].parameters) == (True, {"type": "object"})


def test_formats_reach_the_engine(client, llm):
    send(client, output_config={"format": {"type": "json_schema", "schema": {"type": "array"}}})
    assert llm.calls[0]["params"].grammar == Grammar("json_schema", '{"type": "array"}')


# --- counting


def test_count_tokens(app, llm):
    counted = with_anthropic(app, lambda c: c.messages.count_tokens(model="tiny", messages=[USER], system="S"))
    assert counted.input_tokens == len("<system>S<user>Hi")
    assert llm.calls == []


def test_what_is_too_long_can_be_counted(app):
    long = [{"role": "user", "content": "x" * 5000}]
    counted = with_anthropic(app, lambda c: c.messages.count_tokens(model="tiny", messages=long))
    assert counted.input_tokens == len("<user>") + 5000


def test_count_tokens_takes_no_max_tokens(client):
    message = check_error(send(client, "/v1/messages/count_tokens"), 400, "invalid_request_error")
    assert "max_tokens" in message


# --- errors


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(ValueError("bad"), 400, "invalid_request_error"), (RuntimeError("secret"), 500, "api_error")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors(client, llm, error, status, kind, stream):
    llm.fail = error
    assert "secret" not in check_error(send(client, stream=stream), status, kind)


def test_an_error_in_a_stream_is_an_error_event(app, client, llm):
    llm.fail, llm.fail_after = RuntimeError("secret"), 2
    name, payload = events_of(send(client, stream=True))[-1]
    assert (name, payload["error"]["type"]) == ("error", "api_error")
    assert "secret" not in json.dumps(payload)

    async def scenario(anthropics):
        with pytest.raises(anthropic.APIError, match="went wrong"):
            async with anthropics.messages.stream(**LEAST) as stream:
                await stream.get_final_message()

    with_anthropic(app, scenario)


def test_an_unknown_model(client):
    check_error(send(client, model="other"), 404, "not_found_error")


def test_errors_of_the_router(client):
    check_error(client.get("/v1/messages"), 405, "invalid_request_error")
    check_error(client.get("/v1/messages/batches"), 404, "not_found_error")


def test_errors_of_the_guard(make_client):
    keyed = make_client(api_key=KEY)
    check_error(send(keyed), 401, "authentication_error")
    small = make_client(max_body=1024)
    check_error(send(small, system="x" * 2000), 413, "request_too_large")
    limited = make_client(key_requests_per_minute=1)
    send(limited)
    check_error(send(limited), 429, "rate_limit_error")


def test_other_paths_keep_openais_shape(client):
    assert set(client.chat(model="other").json()) == {"error"}
    assert set(client.get("/v1/messagesx").json()) == {"error"}


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"x-api-key": KEY, "anthropic-version": "2099"}]
)
def test_either_header_carries_the_key(make_client, headers):
    headers = {"anthropic-version": "2023-06-01"} | headers
    assert send(make_client(headers, api_key=KEY)).status_code == 200


def test_the_client_itself_carries_the_key(llm):
    app = create_app({"tiny": llm}, ServeConfig(api_key=KEY))
    assert create(app).content[0].text == llm.answer
    with pytest.raises(anthropic.AuthenticationError):
        with_anthropic(app, lambda c: c.messages.create(**LEAST), key="w" * 20)
