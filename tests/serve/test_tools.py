"""Tools and reasoning over HTTP, as OpenAI's own client sees them."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from pydantic import BaseModel

from tenfold.engine.request import FinishReason
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig

HERMES = "{% if tools %}<tool_call>{% endif %}"
THINKING = HERMES + "{{ x.split('</think>') }}"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TWO = f'Both.\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'


class Added:
    def __init__(self, content, special):
        self.content, self.special = content, special


def writes(llm, template, answer, **added):
    """Let the fake be a model with a template and added tokens, name=(id, special), that gives an answer."""
    tokens = {id: Added(name, special) for name, (id, special) in added.items()}
    llm.text = SimpleNamespace(template=template, tokenizer=SimpleNamespace(get_added_tokens_decoder=lambda: tokens))
    llm.answer = answer


def ask(llm, work, **settings):
    """Run `work(client)` against an app around the fake."""

    async def run():
        transport = httpx.ASGITransport(create_app({"tiny": llm}, ServeConfig(**settings)))
        http = httpx.AsyncClient(transport=transport, base_url="http://localhost/v1")
        async with AsyncOpenAI(api_key="x", base_url="http://localhost/v1", http_client=http, max_retries=0) as client:
            return await work(client)

    return asyncio.run(run())


USER = [{"role": "user", "content": "Hi"}]


def test_a_call(client, llm):
    writes(llm, HERMES, TWO)
    response = client.chat(tools=[WEATHER, NOW])
    choice = response.json()["choices"][0]
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(id.startswith("call_") for id in ids)
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Both.",
            "refusal": None,
            "tool_calls": [
                {"id": ids[0], "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
                {"id": ids[1], "type": "function", "function": {"name": "now", "arguments": "{}"}},
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }
    _, settings = llm.rendered[0]
    nothing = {"type": "object", "properties": {}}
    assert settings["tools"] == [
        WEATHER,
        {"type": "function", "function": {"name": "now", "description": "", "parameters": nothing}},
    ]


def test_a_streamed_call_comes_in_parts(client, llm, read_events):
    writes(llm, HERMES, CALL)
    deltas = [e["choices"][0] for e in read_events(client.chat(tools=[WEATHER], stream=True))]
    first = deltas[0]["delta"]
    assert (first["role"], first["content"]) == ("assistant", None)
    (begin,) = first["tool_calls"]
    assert (begin["index"], begin["type"], begin["function"]["name"]) == (0, "function", "weather")
    parts = [d["delta"]["tool_calls"][0] for d in deltas[1:] if "tool_calls" in d["delta"]]
    assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in parts)
    assert len(parts) > 5
    arguments = begin["function"]["arguments"] + "".join(p["function"]["arguments"] for p in parts)
    assert json.loads(arguments) == {"city": "Zürich"}
    assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["tool_calls"]


@pytest.mark.parametrize("n", [1, 2])
def test_openai_puts_streamed_calls_together(llm, n):
    writes(llm, HERMES, TWO)

    async def work(client):
        whole = await client.chat.completions.create(model="tiny", messages=USER, tools=[WEATHER, NOW], n=n)
        async with client.chat.completions.stream(model="tiny", messages=USER, tools=[WEATHER, NOW], n=n) as stream:
            kinds = [event.type async for event in stream]
            return whole, await stream.get_final_completion(), kinds

    whole, streamed, kinds = ask(llm, work)
    for a, b in zip(whole.choices, streamed.choices, strict=True):
        assert a.finish_reason == b.finish_reason == "tool_calls"
        assert b.message.content == a.message.content
        calls = [[(c.function.name, c.function.arguments) for c in m.message.tool_calls] for m in (a, b)]
        assert calls[0] == calls[1] == [("weather", '{"city": "Zürich"}'), ("now", "{}")]
    assert kinds.count("tool_calls.function.arguments.done") == 2 * n
    assert kinds.count("tool_calls.function.arguments.delta") >= 5


def test_openai_parses_the_arguments_of_strict_tools(llm):
    writes(llm, HERMES, CALL)
    strict = {**WEATHER, "function": WEATHER["function"] | {"strict": True}}

    async def work(client):
        return await client.chat.completions.parse(model="tiny", messages=USER, tools=[strict])

    parsed = ask(llm, work)
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == {"city": "Zürich"}


def test_openai_parses_structured_answers(llm):
    class Person(BaseModel):
        name: str
        age: int

    llm.answer = '{"name": "Ann", "age": 3}'

    async def work(client):
        whole = await client.chat.completions.parse(model="tiny", messages=USER, response_format=Person)
        async with client.chat.completions.stream(model="tiny", messages=USER, response_format=Person) as stream:
            return whole, await stream.get_final_completion()

    for completion in ask(llm, work):
        assert completion.choices[0].message.parsed == Person(name="Ann", age=3)
    grammar = llm.calls[0]["params"].grammar
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.source)["required"] == ["name", "age"]


def test_no_calls_where_none_are_wanted(client, llm):
    writes(llm, HERMES, CALL)
    choice = client.chat(tools=[WEATHER], tool_choice="none").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert llm.rendered[0][1] == {}


def test_one_call_at_a_time(client, llm):
    writes(llm, HERMES, TWO)
    message = client.chat(tools=[WEATHER, NOW], parallel_tool_calls=False).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


def test_a_call_that_is_cut_off_keeps_what_is_known(client, llm):
    writes(llm, HERMES, CALL[:58])
    llm.finish = FinishReason.LENGTH
    choice = client.chat(tools=[WEATHER], max_tokens=58).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Zü'}


def test_auto_is_free_unless_a_tool_is_strict(client, llm):
    writes(llm, HERMES, "Hi.")
    client.chat(tools=[WEATHER])
    assert llm.calls[0]["params"].grammar is None
    client.chat(tools=[{**WEATHER, "function": WEATHER["function"] | {"strict": True}}])
    grammar = llm.calls[1]["params"].grammar
    assert grammar.kind == "lark"
    assert "[lazy]" in grammar.source
    assert grammar in llm.checked


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_held_by_a_grammar(client, llm, choice):
    writes(llm, HERMES, CALL)
    answer = client.chat(tools=[WEATHER, NOW], tool_choice=choice).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    source = llm.calls[0]["params"].grammar.source
    assert '\\"weather\\"' in source
    assert ('\\"now\\"' in source) == (choice == "required")


def test_a_part_of_the_tools_may_be_allowed(client, llm):
    writes(llm, HERMES, CALL)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    client.chat(tools=[WEATHER, NOW], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert [tool["function"]["name"] for tool in llm.rendered[0][1]["tools"]] == ["now"]
    assert "weather" not in llm.calls[0]["params"].grammar.source


def test_a_schema_that_cannot_be_held_to(client, llm):
    writes(llm, HERMES, CALL)
    llm.refused_grammar = '"city"'
    assert client.chat(tools=[WEATHER], tool_choice="required").status_code == 200  # any object, then
    strict = {**WEATHER, "function": WEATHER["function"] | {"strict": True}}
    for choice in ("required", "auto"):
        error = client.chat(tools=[strict], tool_choice=choice).json()["error"]
        assert (error["param"], error["message"]) == ("tools", 'The grammar has "city".')


def test_functions_as_they_once_were(client, llm, read_events):
    writes(llm, HERMES, TWO)
    fields = {"functions": [WEATHER["function"], NOW["function"]], "function_call": "auto"}
    choice = client.chat(**fields).json()["choices"][0]
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"city": "Zürich"}'}
    assert choice["finish_reason"] == "function_call"
    events = read_events(client.chat(**fields, stream=True))
    parts = [e["choices"][0]["delta"].get("function_call", {}) for e in events]
    assert "".join(part.get("arguments", "") for part in parts) == '{"city": "Zürich"}'
    assert events[-1]["choices"][0]["finish_reason"] == "function_call"
    client.chat(**fields | {"function_call": {"name": "now"}})
    assert '\\"now\\"' in llm.calls[-1]["params"].grammar.source


HISTORY = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
]


def test_a_history_of_calls_goes_back_through_the_template(client, llm):
    writes(llm, HERMES, "Hi.")
    assert client.chat(messages=HISTORY, tools=[WEATHER]).status_code == 200
    _, assistant, *results = llm.rendered[0][0]
    assert assistant["reasoning_content"] == "Hm."
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == ['{"city": "Oslo"}', "{}"]
    assert results == [
        {"role": "tool", "content": "cold", "tool_call_id": "call_1"},
        {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
    ]


def test_a_template_without_tools_is_told_of_them_in_words(client, llm):
    writes(llm, "{{ messages }}", CALL)
    llm.max_model_len = 4096
    message = client.chat(messages=HISTORY, tools=[WEATHER]).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "weather"
    messages, settings = llm.rendered[0]
    assert settings == {}
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert '{"name": "weather", "description": "The weather."' in messages[0]["content"]
    assert messages[2]["content"] == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    assert messages[3]["content"] == (
        "<tool_response>\ncold\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    )


def test_mistrals_template_gets_ids_of_its_own_form(client, llm):
    writes(llm, "{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]", '[TOOL_CALLS]now[ARGS]{"a": 1}')
    message = client.chat(messages=HISTORY, tools=[NOW]).json()["choices"][0]["message"]
    assert len(message["tool_calls"][0]["id"]) == 9
    _, assistant, one, two = llm.rendered[0][0]
    ids = [call["id"] for call in assistant["tool_calls"]]
    assert ids == [one["tool_call_id"], two["tool_call_id"]]
    assert all(len(id) == 9 and id.isalnum() for id in ids)


def test_markers_that_are_special_tokens_are_seen_and_others_dropped(client, llm):
    added = {"[TOOL_CALLS]": (5, True), "[ARGS]": (6, True), "<pad>": (7, True), "<word>": (8, False)}
    writes(llm, "{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]", "a<pad> <word>[TOOL_CALLS]now[ARGS]{}<pad>", **added)
    message = client.chat(tools=[NOW], tool_choice="required").json()["choices"][0]["message"]
    assert message["content"] == "a <word>"
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    params = llm.calls[0]["params"]
    assert params.skip_special_tokens is False
    assert '<[5]> "now" <[6]>' in params.grammar.source
    client.chat()
    assert llm.calls[1]["params"].skip_special_tokens is True


REASONED = "<think>\nSo so.\n</think>\n\nYes."


def test_reasoning_is_told_apart(client, llm, read_events):
    writes(llm, THINKING, REASONED)
    body = client.chat().json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("So so.", "Yes.")
    thought = len(">\nSo so.\n</think>")  # a marker is known by its last token; in a real vocabulary it has but one
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    deltas = [e["choices"][0]["delta"] for e in read_events(client.chat(stream=True))]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "So so."
    assert "".join(d.get("content") or "" for d in deltas) == "Yes."


def test_reasoning_can_be_left_out_or_left_in(client, llm):
    writes(llm, THINKING, REASONED)
    dropped = client.chat(include_reasoning=False).json()["choices"][0]["message"]
    assert dropped == {"role": "assistant", "content": "Yes.", "refusal": None}
    kept = client.chat(reasoning_format="none").json()["choices"][0]["message"]
    assert kept == {"role": "assistant", "content": REASONED, "refusal": None}


def test_a_prompt_that_opens_the_reasoning(client, llm):
    writes(llm, THINKING, "So so.</think>Yes.")
    llm.chat_prompt = lambda messages, **kwargs: list(b"Hi<think>\n")
    message = client.chat().json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("So so.", "Yes.")


def test_a_format_holds_the_answer_and_not_the_reasoning(client, llm):
    writes(llm, THINKING, REASONED)
    client.chat(response_format={"type": "json_object"})
    grammar = llm.calls[0]["params"].grammar
    assert grammar.kind == "lark"
    assert "start: (thought)?" in grammar.source


def test_plain_answers_go_through_no_parser(client, llm, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a parser for a plain answer")

    monkeypatch.setattr("tenfold.serve.turn.Parser", fail)
    assert client.chat().json()["choices"][0]["message"]["content"] == llm.answer


def function(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


DEEP = {"type": "object"}
for _ in range(18):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def allowed(count):
    tools = {"mode": "auto", "tools": [function()] * count}
    return {"type": "allowed_tools", "allowed_tools": tools}


WRONG = [
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "function"),
    ({"tools": [function(name="")]}, "tools[0].function.name", "64 letters"),
    ({"tools": [function(name="a b")]}, "tools[0].function.name", "'a b'"),
    ({"tools": [function(name=5)]}, "tools[0].function.name", "letters"),
    ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "JSON schema"),
    ({"tools": [function(parameters=DEEP)]}, "tools[0].function.parameters", "--max-schema-depth"),
    ({"tools": [function(parameters={"a": "x" * 70_000})]}, "tools[0].function.parameters", "--max-schema-bytes"),
    ({"tools": [function(strict="yes")]}, "tools[0].function.strict", "true or false"),
    ({"tools": [function(description=1)]}, "tools[0].function.description", "text"),
    ({"tools": [function(), function()]}, "tools", "'f'"),
    ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools", "--max-tools"),
    ({"tools": [function(name="")] * 129}, "tools", "--max-tools"),
    ({"functions": [{}] * 129}, "functions", "--max-tools"),
    ({"tools": [function()], "functions": [{"name": "g"}]}, "functions", "tools only"),
    ({"tools": [function()], "tool_choice": "maybe"}, "tool_choice", "auto"),
    ({"tools": [function()], "tool_choice": function(name="g")}, "tool_choice", "'g'"),
    ({"tools": [function()], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice", "function"),
    ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
    ({"tools": [function()], "tool_choice": allowed(2)}, "tool_choice.allowed_tools.tools", "up to 1"),
    ({"functions": [{"name": "g"}], "function_call": {"name": "h"}}, "function_call", "'h'"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]", "arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "messages[0].tool_calls[0].type", "f"),
    ({"reasoning_format": "maybe"}, "reasoning_format", "'none'"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_what_is_wrong_with_tools_is_told(client, llm, fields, param, words):
    response = client.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert llm.calls == []


KEYS = ["type", "function", "name", "parameters", "properties", "required", "enum", "$ref", "anyOf", "strict", "a"]
LEAVES = st.sampled_from([None, True, 0, -1.5, "", "function", "object", "string", "f", "#/$defs/a", '<[5]>\n"%s'])
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
SCHEMA = st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(st.sampled_from(KEYS), JSON)})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["tools", "tool_choice", "functions", "function_call", "response_format", "structured_outputs"]),
    JSON,
    SCHEMA,
    st.sampled_from([HERMES, HERMES + "<function=<parameter=", "{{ tools }}[TOOL_CALLS]", "{{ tools }}ipython"]),
)
def test_nothing_sent_makes_the_server_fail(client, llm, name, value, schema, template):
    writes(llm, template, "Hi.")
    client.app.state.service.models["tiny"].manner = None
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    fields = {"tools": tools, "tool_choice": "required"} | {name: value}
    assert client.chat(**fields).status_code in (200, 400)
