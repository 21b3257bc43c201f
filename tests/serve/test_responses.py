"""/v1/responses with OpenAI's own client."""

import asyncio
import json

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tenfold.engine.request import FinishReason, Grammar, SamplingParams
from tenfold.serve.app import create_app
from tenfold.serve.parse.pieces import CallArguments, CallBegin, Text
from tenfold.serve.settings import ServeConfig
from tests.serve.clients import FULL, asked, scripted, with_openai

EVENTS = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "find", "parameters": {"type": "object"}, "strict": False, "description": "Look."}
ALLOWED = {"type": "allowed_tools", "mode": "auto"}
SCHEMA = Grammar("json_schema", '{"type": "array"}')
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(autouse=True)
def room(llm, monkeypatch):
    """For tools in the prompt."""
    monkeypatch.setattr(type(llm), "max_model_len", 2000)


@pytest.fixture
def app(llm):
    return create_app({"tiny": llm})


def create(app, **fields):
    return with_openai(app, lambda c: c.responses.create(**{"model": "tiny", "input": "Hi"} | fields))


def send(client, **fields):
    return client.post("/v1/responses", {"input": "Hi"} | fields)


def events_of(response):
    """(event name, payload) of each event of a stream that ended properly."""
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    parts = response.text.split("\n\n")[:-2]
    found = [part.split("\n") for part in parts]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in found]


def test_whole(app, llm):
    response = create(app)
    assert response.id.startswith("resp_")
    assert response.output_text == llm.answer
    assert (response.object, response.status, response.model, response.error) == ("response", "completed", "tiny", None)
    assert response.incomplete_details is None
    assert response.completed_at >= response.created_at
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert message.id.startswith("msg_")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (8, 8, 16)
    assert usage.input_tokens_details.cached_tokens == usage.output_tokens_details.reasoning_tokens == 0
    assert llm.calls[0]["request_id"] == response.id.replace("resp_", "resp-")
    assert llm.rendered[0][0] == [{"role": "user", "content": "Hi"}]


def test_the_response_tells_how_it_was_asked_for(app):
    asked = {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 5,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "truncation": "auto",
        "user": "ann",
        "prompt_cache_key": "p",
    }
    told = create(app, tools=[TOOL], reasoning={"effort": "low"}, **asked).model_dump()
    assert {name: told[name] for name in asked} == asked
    assert told["tools"][0]["name"] == "find"
    assert told["reasoning"]["effort"] == "low"
    assert told["text"]["format"] == {"type": "text"}
    assert told["service_tier"] == "default"


def test_every_sampling_field_reaches_the_engine(client, llm):
    fields = {
        "max_output_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_logprobs": 3,
        "include": ["message.output_text.logprobs"],
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "seed": 7,
        "top_k": 4,
        "min_p": 0.1,
        "priority": -5,
        "safety_identifier": "ann",
        "cache_salt": "s",
    }
    assert send(client, **fields).status_code == 200
    call = llm.calls[0]
    assert call["params"] == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        logprobs=3,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        top_k=4,
        min_p=0.1,
    )
    assert (call["priority"], call["user"], call["salt"]) == (-5, "ann", ":s")


def test_items_of_a_conversation_become_messages(app, monkeypatch):
    asks = asked(monkeypatch)
    items = [
        {"role": "developer", "content": "Use tools."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"q": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "find", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"role": "user", "content": "So?"},
    ]
    create(app, input=items, instructions="Be kind.", tools=[TOOL])
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "find", "arguments": "{}"}},
    ]
    assert asks[0].messages == [
        {"role": "system", "content": "Be kind.\n\nUse tools."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "user", "content": "So?"},
    ]


def test_an_answer_can_be_sent_back_as_it_is(app, monkeypatch):
    asks = asked(monkeypatch)
    scripted(monkeypatch, FULL)

    async def scenario(client):
        first = await client.responses.create(model="tiny", input="Hi", tools=[TOOL], store=False)
        output = [item.model_dump(exclude_none=True) for item in first.output]
        results = [{"type": "function_call_output", "call_id": f"call_{i}", "output": "ok"} for i in (1, 2)]
        await client.responses.create(model="tiny", input=[USER, *output, *results], tools=[TOOL])

    with_openai(app, scenario)
    answer = asks[1].messages[1]
    assert (answer["content"], answer["reasoning_content"]) == ("I look it up.", "Let me see.")
    assert [call["function"]["arguments"] for call in answer["tool_calls"]] == ['{"q": "ä"}', "{}"]


def test_thoughts_texts_and_calls_are_items(app, monkeypatch):
    scripted(monkeypatch, FULL)
    response = create(app, tools=[TOOL])
    thought, message, find, stop = response.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "Let me see.", [])
    assert message.content[0].text == response.output_text == "I look it up."
    assert (find.type, find.call_id, find.name, find.arguments) == ("function_call", "call_1", "find", '{"q": "ä"}')
    assert (stop.call_id, stop.arguments) == ("call_2", "{}")
    assert len({item.id for item in response.output}) == 4
    assert response.usage.output_tokens_details.reasoning_tokens == 2


@pytest.mark.parametrize("script", [None, FULL])
def test_a_stream_adds_up_to_the_whole(app, script, monkeypatch):
    if script:
        scripted(monkeypatch, script)

    async def scenario(client):
        async with client.responses.stream(model="tiny", input="Hi", tools=[TOOL]) as stream:
            types = [event.type async for event in stream]
            final = await stream.get_final_response()
            texts = [c.text for o in stream._state._output_items.values() if o.type == "message" for c in o.content]
        stored = await client.responses.retrieve(final.id)
        return types, final, texts, stored

    types, final, texts, stored = with_openai(app, scenario)
    assert types[:2] == ["response.created", "response.in_progress"]
    assert types[-1] == "response.completed"
    assert "".join(texts) == final.output_text
    assert [item.model_dump(exclude={"parsed_arguments"}) for item in final.output if item.type != "message"] == [
        item.model_dump() for item in stored.output if item.type != "message"
    ]
    whole = create(app, tools=[TOOL])
    forget = {"id": True, "content": {"__all__": {"parsed"}}, "parsed_arguments": True}
    told = [item.model_dump(exclude=forget) for item in final.output]
    assert told == [item.model_dump(exclude=forget) for item in whole.output]


def test_events_are_what_the_client_types_say(client, monkeypatch):
    scripted(monkeypatch, FULL)
    events = events_of(send(client, stream=True, tools=[TOOL]))
    for number, (name, payload) in enumerate(events):
        assert name == payload["type"]
        assert payload["sequence_number"] == number
        EVENTS.validate_python(payload)
    names = [name.removeprefix("response.") for name, _ in events]
    opened, closed = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    arguments = "function_call_arguments"
    assert names == [
        *("created", "in_progress"),
        *(*opened, "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", *closed),
        *(*opened, "output_text.delta", "output_text.delta", "output_text.done", *closed),
        *("output_item.added", f"{arguments}.delta", f"{arguments}.delta", f"{arguments}.done", "output_item.done"),
        *("output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done"),
        "completed",
    ]
    assert [e["output_index"] for n, e in events if n == "response.output_item.done"] == [0, 1, 2, 3]
    assert all(e["response"]["output"] == [] for _, e in events[:2])
    done = [e["item"] for n, e in events if n == "response.output_item.done"]
    assert done == events[-1][1]["response"]["output"]


def test_logprobs_are_those_of_the_text(client, llm, monkeypatch):
    scripted(monkeypatch, FULL)
    fields = {"top_logprobs": 1, "include": ["message.output_text.logprobs"], "tools": [TOOL]}
    output = send(client, **fields).json()["output"]
    entries = output[1]["content"][0]["logprobs"]
    assert bytes(b for e in entries for b in e["bytes"]) == llm.answer.encode()[3:5]
    assert [len(e["top_logprobs"]) for e in entries] == [1, 1]
    events = events_of(send(client, stream=True, **fields))
    told = [e["logprobs"] for n, e in events if n == "response.output_text.delta"]
    assert [entry for logprobs in told for entry in logprobs] == entries
    assert next(e["logprobs"] for n, e in events if n == "response.output_text.done") == entries


def test_logprobs_of_half_a_character_come_with_the_other_half(client, llm):
    events = events_of(send(client, stream=True, include=["message.output_text.logprobs"]))
    told = [len(e["logprobs"]) for n, e in events if n == "response.output_text.delta"]
    assert told == [1, 2, 1, 1, 1, 1, 1]


def test_too_short_an_answer_is_incomplete(app, llm, monkeypatch):
    llm.finish = FinishReason.LENGTH
    response = create(app, max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output[0].status, response.completed_at) == ("incomplete", None)


def test_an_incomplete_stream_says_so(client, llm):
    llm.finish = FinishReason.LENGTH
    name, payload = events_of(send(client, stream=True, max_output_tokens=3))[-1]
    assert (name, payload["response"]["status"]) == ("response.incomplete", "incomplete")
    EVENTS.validate_python(payload)


def test_an_answer_of_nothing_is_an_empty_message(client, monkeypatch):
    scripted(monkeypatch, [])
    assert send(client).json()["output"][0]["content"][0]["text"] == ""
    names = [name for name, _ in events_of(send(client, stream=True))]
    assert names[2:5] == ["response.output_item.added", "response.content_part.added", "response.output_text.done"]


def test_an_error_before_the_first_event_keeps_its_status(client, llm):
    llm.fail = ValueError("temperature is bad")
    assert send(client, stream=True).status_code == 400


def test_an_error_in_a_stream_is_a_failed_response(client, llm):
    llm.fail, llm.fail_after = RuntimeError("secret"), 2
    name, payload = events_of(send(client, stream=True))[-1]
    assert name == "response.failed"
    EVENTS.validate_python(payload)
    response = payload["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in json.dumps(payload)
    assert response["output"][0]["status"] == "incomplete"
    assert client.get(f"/v1/responses/{response['id']}").status_code == 404


# --- what a field does


def test_every_field_of_openais_client_is_known():
    from openai.types.responses import input_token_count_params as counting
    from openai.types.responses import response_create_params as creating
    from openai.types.responses.function_tool_param import FunctionToolParam
    from openai.types.shared_params.reasoning import Reasoning

    from tenfold.serve.protocol import responses as ours

    def check(theirs, model):
        names = {f.alias or name for name, f in model.model_fields.items()}
        assert set(theirs.__annotations__) - {"stream"} <= names
        for name in model.model_fields:
            assert model.treatment(name) in ("honoured", "ignored", "refused")

    check(creating.ResponseCreateParamsBase, ours.ResponsesRequest)
    check(creating.StreamOptions, ours.ResponsesStreamOptions)
    check(creating.PromptCacheOptions, ours.CacheOptions)
    check(counting.InputTokenCountParams, ours.InputTokensRequest)
    check(Reasoning, ours.ReasoningOptions)
    check(FunctionToolParam, ours.FunctionTool)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"background_options": {"completion_window": "2h"}}, "background_options"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"include": ["everything"]}, "include"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"background": True, "store": False}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"async": True}]}, "tools[0].async_"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tools": [TOOL], "tool_choice": ALLOWED | {"tools": [TOOL, TOOL]}}, "tool_choice.tools"),
        ({"tools": [{"type": "function"}] * 129}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"misspelt": 1}, "misspelt"),
    ],
)
def test_what_cannot_be_is_refused(client, fields, param):
    response = send(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["message"]


def test_ignored_fields_are_named(client):
    fields = {
        "prompt_cache_key": "x",
        "service_tier": "auto",
        "image": {},
        "max_tool_calls": 1,
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"},
    }
    response = send(client, **fields)
    assert response.status_code == 200
    named = "image, max_tool_calls, prompt_cache_key, reasoning.summary, service_tier, text.verbosity"
    assert response.headers["x-tenfold-ignored"] == named


def test_neutral_values_of_refused_fields_pass(client):
    fields = {"context_management": [], "background_options": {"completion_window": "soonest"}, "prompt": None}
    assert send(client, **fields, conversation=None, reasoning={"mode": "standard"}).status_code == 200


@pytest.mark.parametrize(
    ("reasoning", "told"),
    [
        ({"effort": "high"}, {"reasoning_effort": "high"}),
        ({"effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"context": "all_turns"}, {"preserve_thinking": True, "clear_thinking": False}),
    ],
)
def test_reasoning_is_told_to_the_template(client, llm, reasoning, told):
    assert send(client, reasoning=reasoning).status_code == 200
    assert told.items() <= llm.rendered[0][1].items()


@pytest.mark.parametrize(
    ("format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        ({"type": "json_schema", "name": "x", "schema": {"type": "array"}, "strict": True}, SCHEMA),
    ],
)
def test_formats_reach_the_engine(client, llm, format, grammar):
    assert send(client, text={"format": format}).status_code == 200
    assert llm.calls[0]["params"].grammar == grammar


def test_pydantic_models_are_parsed(app, llm, monkeypatch):
    class Found(BaseModel):
        n: int

    scripted(monkeypatch, [[Text('{"n": 3}')]])
    parsed = with_openai(app, lambda c: c.responses.parse(model="tiny", input="Hi", text_format=Found))
    assert parsed.output_parsed == Found(n=3)
    assert json.loads(llm.calls[0]["params"].grammar.source)["required"] == ["n"]


def test_tools_and_choices_reach_the_turn(client, monkeypatch):
    asks = asked(monkeypatch)
    other = TOOL | {"name": "other", "strict": True}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    send(client, tools=[TOOL, other], tool_choice={"type": "function", "name": "find"}, parallel_tool_calls=False)
    send(client, tools=[TOOL, other], tool_choice=allowed)
    named, listed = asks
    assert (named.choose.mode, named.choose.name, named.choose.parallel) == ("named", "find", False)
    assert [(tool.name, tool.strict) for tool in named.tools] == [("find", False), ("other", True)]
    assert (listed.choose.mode, [tool.name for tool in listed.tools]) == ("required", ["other"])


def test_truncation_leaves_out_as_few_old_turns_as_will_do(client, llm, monkeypatch):
    monkeypatch.setattr(type(llm), "max_model_len", 128)
    turns = [{"role": role, "content": f"{i}" * 10} for i in range(5) for role in ("user", "assistant")]
    items = [*turns, {"role": "user", "content": "last"}]
    refused = send(client, input=items, instructions="S")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert send(client, input=items, instructions="S", truncation="auto").status_code == 200
    kept = bytes(llm.calls[0]["prompt"]).decode()
    assert kept.startswith("<system>S<user>")
    assert kept.endswith("<user>last")
    oldest = int(kept[len("<system>S<user>")])
    assert oldest > 0
    assert len(kept) < llm.max_model_len <= len(kept) + len("<user><assistant>") + 20


def test_truncation_keeps_what_was_just_asked(client):
    response = send(client, input=[USER, {"role": "user", "content": "x" * 2000}], truncation="auto")
    assert response.json()["error"]["code"] == "context_length_exceeded"


# --- what is kept


def test_a_conversation_goes_on(app, llm):
    async def scenario(client):
        first = await client.responses.create(model="tiny", input="One", instructions="Be brief.")
        second = await client.responses.create(model="tiny", input="Two", previous_response_id=first.id)
        third = await client.responses.create(model="tiny", input="Three", previous_response_id=second.id)
        listed = await client.responses.input_items.list(third.id)
        return first, second, third, listed.data

    first, second, third, listed = with_openai(app, scenario)
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    answer = {"role": "assistant", "content": llm.answer}
    asked = [{"role": "user", "content": text} for text in ("One", "Two", "Three")]
    assert llm.rendered[2][0] == [asked[0], answer, asked[1], answer, asked[2]]
    assert [item.content[0].text for item in listed] == ["Three"]


def test_get_delete_and_what_is_not_there(app):
    async def scenario(client):
        made = await client.responses.create(model="tiny", input="Hi")
        assert (await client.responses.retrieve(made.id)).model_dump() == made.model_dump()
        await client.responses.delete(made.id)
        unkept = await client.responses.create(model="tiny", input="Hi", store=False)
        for id in (made.id, unkept.id, "resp_none"):
            for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
                with pytest.raises(openai.NotFoundError):
                    await call(id)
            with pytest.raises(openai.NotFoundError, match="store: false") as raised:
                await client.responses.create(model="tiny", input="Hi", previous_response_id=id)
            assert raised.value.code == "previous_response_not_found"

    with_openai(app, scenario)


def test_another_keys_response_is_not_there(llm):
    keys = ("a" * 20, "b" * 20)
    app = create_app({"tiny": llm}, ServeConfig(api_key=",".join(keys)))
    made = with_openai(app, lambda c: c.responses.create(model="tiny", input="Hi"), keys[0])
    assert with_openai(app, lambda c: c.responses.retrieve(made.id), keys[0]).id == made.id
    for call in (
        lambda c: c.responses.retrieve(made.id),
        lambda c: c.responses.delete(made.id),
        lambda c: c.responses.input_items.list(made.id),
        lambda c: c.responses.create(model="tiny", input="Hi", previous_response_id=made.id),
        lambda c: c.responses.create(model="tiny", input=[{"type": "item_reference", "id": made.output[0].id}, USER]),
    ):
        with pytest.raises(openai.NotFoundError):
            with_openai(app, call, keys[1])


def test_items_can_be_referred_to(app, llm):
    async def scenario(client):
        made = await client.responses.create(model="tiny", input="Hi")
        (asked,) = (await client.responses.input_items.list(made.id)).data
        references = [{"type": "item_reference", "id": asked.id}, {"id": made.output[0].id}]
        await client.responses.create(model="tiny", input=[*references, {"role": "user", "content": "More"}])

    with_openai(app, scenario)
    assert [message["content"] for message in llm.rendered[1][0]] == ["Hi", llm.answer, "More"]


def test_pages_of_input_items(client):
    id = send(client, input=[{"role": "user", "content": str(i)} for i in range(5)]).json()["id"]

    def page(**query):
        return client.get(f"/v1/responses/{id}/input_items", params=query)

    def texts(listed):
        return [item["content"][0]["text"] for item in listed["data"]]

    first = page(limit=2).json()
    assert (texts(first), first["has_more"]) == (["4", "3"], True)
    second = page(limit=3, after=first["last_id"]).json()
    assert (texts(second), second["has_more"]) == (["2", "1", "0"], False)
    assert texts(page(order="asc").json()) == ["0", "1", "2", "3", "4"]
    assert page(after=second["last_id"]).json()["data"] == []
    for query in ({"limit": 0}, {"limit": "x"}, {"limit": 101}, {"order": "up"}, {"after": "x"}):
        assert page(**query).status_code == 400


def test_with_no_room_to_keep_anything_nothing_is_kept(make_client):
    for settings in ({"max_stored_responses": 0}, {"stored_response_bytes": 100}):
        client = make_client(**settings)
        made = send(client).json()
        assert made["store"] is False
        assert client.get(f"/v1/responses/{made['id']}").status_code == 404


def test_input_tokens(app, llm):
    counted = with_openai(app, lambda c: c.responses.input_tokens.count(model="tiny", input="Hi", instructions="S"))
    assert counted.input_tokens == len("<system>S<user>Hi")
    assert llm.calls == []


def test_what_is_too_long_can_be_counted(app):
    counted = with_openai(app, lambda c: c.responses.input_tokens.count(model="tiny", input="x" * 5000))
    assert counted.input_tokens == len("<user>") + 5000


def test_compaction_is_refused(app):
    with pytest.raises(openai.BadRequestError, match="not compacted"):
        with_openai(app, lambda c: c.responses.compact(model="tiny", input="Hi"))


# --- in the background


def until(condition):
    async def wait():
        while not (found := await condition()):
            await asyncio.sleep(0)
        return found

    return asyncio.wait_for(wait(), 10)


def held(llm):
    """Let answers stop after their first token until the event is set."""
    llm.gate = asyncio.Event()
    return llm.gate


def test_background(app, llm):
    async def scenario(client):
        gate = held(llm)
        made = await client.responses.create(model="tiny", input="Hi", background=True)
        assert (made.status, made.background, made.output) == ("queued", True, [])
        await llm.started.wait()
        running = await client.responses.retrieve(made.id)
        assert (running.status, running.usage) == ("in_progress", None)
        with pytest.raises(openai.BadRequestError, match="still being made"):
            await client.responses.create(model="tiny", input="More", previous_response_id=made.id)
        gate.set()

        async def done():
            found = await client.responses.retrieve(made.id)
            return found if found.status != "in_progress" else None

        final = await until(done)
        assert (final.status, final.output_text, final.usage.output_tokens) == ("completed", llm.answer, 8)
        assert (await client.responses.cancel(made.id)).status == "completed"
        with pytest.raises(openai.BadRequestError, match="background and stream"):
            await client.responses.retrieve(made.id, stream=True)
        await client.responses.create(model="tiny", input="More", previous_response_id=made.id)

    with_openai(app, scenario)


def test_cancel(app, llm):
    async def scenario(client):
        held(llm)
        made = await client.responses.create(model="tiny", input="Hi", background=True)
        await llm.started.wait()
        cancelled = await client.responses.cancel(made.id)
        assert (cancelled.status, cancelled.output[0].status) == ("cancelled", "incomplete")
        assert llm.cancelled == [made.id.replace("resp_", "resp-")]
        assert (await client.responses.retrieve(made.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="no answer to go on from"):
            await client.responses.create(model="tiny", input="More", previous_response_id=made.id)

    with_openai(app, scenario)


def test_cancel_before_it_began(app, llm):
    async def scenario(client):
        made = await client.responses.create(model="tiny", input="Hi", background=True)
        assert (await client.responses.cancel(made.id)).status == "cancelled"

    with_openai(app, scenario)


def test_only_work_in_the_background_can_be_cancelled(app):
    async def scenario(client):
        made = await client.responses.create(model="tiny", input="Hi")
        with pytest.raises(openai.BadRequestError, match="in the background"):
            await client.responses.cancel(made.id)

    with_openai(app, scenario)


def test_deleting_ends_the_work(app, llm):
    async def scenario(client):
        held(llm)
        made = await client.responses.create(model="tiny", input="Hi", background=True)
        await llm.started.wait()
        await client.responses.delete(made.id)
        assert len(llm.cancelled) == 1
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)

    with_openai(app, scenario)


def test_a_failure_in_the_background_is_told_later(app, llm):
    llm.fail = RuntimeError("secret")

    async def scenario(client):
        made = await client.responses.create(model="tiny", input="Hi", background=True)

        async def done():
            found = await client.responses.retrieve(made.id)
            return found if found.status != "queued" else None

        failed = await until(done)
        assert (failed.status, failed.error.code) == ("failed", "server_error")
        assert "secret" not in failed.error.message

    with_openai(app, scenario)


def test_a_background_stream_can_be_read_again(app, llm):
    async def scenario(client):
        stream = await client.responses.create(model="tiny", input="Hi", background=True, stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
        assert events[-1].type == "response.completed"
        id = events[0].response.id
        again = [event async for event in await client.responses.retrieve(id, stream=True)]
        assert [event.model_dump() for event in again] == [event.model_dump() for event in events]
        later = [event async for event in await client.responses.retrieve(id, stream=True, starting_after=4)]
        assert [event.sequence_number for event in later] == list(range(5, len(events)))
        past = [event async for event in await client.responses.retrieve(id, stream=True, starting_after=999)]
        assert past == []

    with_openai(app, scenario)


def test_leaving_a_background_stream_does_not_end_the_work(app, llm):
    """Two read along; one is gone in the middle."""

    async def scenario(client):
        gate = held(llm)
        made = asyncio.ensure_future(client.responses.create(model="tiny", input="Hi", background=True, stream=True))
        await llm.started.wait()
        (stored,) = app.state.responses.running()
        reading = asyncio.ensure_future(client.responses.retrieve(stored.id, stream=True))
        await asyncio.sleep(0)
        made.cancel()
        gate.set()
        events = [event async for event in await reading]
        assert events[-1].response.output_text == llm.answer
        assert llm.cancelled == []

    with_openai(app, scenario)


def test_work_in_the_background_is_bounded(llm):
    app = create_app({"tiny": llm}, ServeConfig(max_background=2))

    async def scenario(client):
        gate = held(llm)
        made = [await client.responses.create(model="tiny", input="Hi", background=True) for _ in range(2)]
        with pytest.raises(openai.InternalServerError, match="max-background") as raised:
            await client.responses.create(model="tiny", input="Hi", background=True)
        assert raised.value.status_code == 503
        await client.responses.cancel(made[0].id)
        await client.responses.create(model="tiny", input="Hi", background=True)
        gate.set()

    with_openai(app, scenario)


def test_work_in_the_background_is_bounded_where_it_comes_all_at_once(llm):
    app = create_app({"tiny": llm}, ServeConfig(max_background=2))

    async def scenario(client):
        gate = held(llm)
        several = [client.responses.create(model="tiny", input="Hi", background=True) for _ in range(8)]
        found = await asyncio.gather(*several, return_exceptions=True)
        refused = [one for one in found if isinstance(one, Exception)]
        assert len(refused) == 6
        assert all(one.status_code == 503 and "max-background" in one.message for one in refused)
        assert len(app.state.responses.running()) == 2
        gate.set()

    with_openai(app, scenario)


def test_background_can_be_off(make_client):
    for settings in ({"max_background": 0}, {"max_stored_responses": 0}):
        error = send(make_client(**settings), background=True).json()["error"]
        assert error["param"] == "background"


def test_work_in_the_background_counts_against_its_key(llm):
    app = create_app({"tiny": llm}, ServeConfig(key_concurrency=1))

    async def scenario(client):
        held(llm)
        made = await client.responses.create(model="tiny", input="Hi", background=True)
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(model="tiny", input="Hi")
        await client.responses.cancel(made.id)
        llm.gate = None
        await client.responses.create(model="tiny", input="Hi")

    with_openai(app, scenario)


def test_calls_with_nothing_in_them(app, monkeypatch):
    scripted(monkeypatch, [[CallBegin(0, "c", "find")], [CallArguments(0, "")]])
    (call,) = create(app, tools=[TOOL]).output
    assert (call.name, call.arguments) == ("find", "")
