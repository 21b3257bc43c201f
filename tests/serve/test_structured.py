"""What answers are held to. Grammars that are put together are tried with llguidance itself, on a vocabulary of
bytes.
"""

import json
from types import SimpleNamespace

import pytest

from tenfold.engine.request import Grammar
from tenfold.serve.conversation import Tool
from tenfold.serve.parse.dialect import DIALECTS, replace
from tenfold.serve.parse.parser import Parser
from tenfold.serve.parse.pieces import CallArguments
from tenfold.serve.structured import Held

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": NAMED}, "json_schema", json.dumps(SCHEMA)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_object", ""),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "ü"]}}, "choice", '["a", "ü"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"guided_json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", '["a"]'),
        ({"guided_grammar": 'start: "a"', "response_format": {"type": "text"}}, "lark", 'start: "a"'),
    ],
)
def test_every_way_to_ask_for_a_format(client, llm, fields, kind, source):
    assert client.chat(**fields).status_code == 200
    assert llm.calls[0]["params"].grammar == Grammar(kind, source)
    assert llm.checked == [Grammar(kind, source)]


def test_no_format(client, llm):
    client.chat(response_format={"type": "text"}, guided_json=None)
    assert llm.calls[0]["params"].grammar is None


def named(**fields):
    return {"response_format": {"type": "json_schema", "json_schema": NAMED["json_schema"] | fields}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (named(name="a b"), "response_format.json_schema.name", "'a b'"),
        (named(name=None), "response_format.json_schema.name", "letters"),
        (named(strict="x"), "response_format.json_schema.strict", "true or false"),
        (named(schema=[]), "response_format", "object"),
        (named(schema={"description": "x" * 70_000}), "response_format", "--max-schema-bytes"),
        ({**named(), "guided_regex": "a"}, "guided_regex", "response_format"),
        ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "guided_choice", "guided_json"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "json, regex"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs", "xml"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "not empty"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "not be empty|none of them"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"guided_regex": "x" * 70_000}, "guided_regex", "--max-schema-bytes"),
    ],
)
def test_what_is_wrong_with_a_format_is_told(client, llm, fields, param, words):
    response = client.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert any(word in error["message"] for word in words.split("|"))
    assert llm.calls == []


def test_the_depth_of_a_schema_is_a_setting(make_client):
    client = make_client(max_schema_depth=3)
    deep = {"properties": {"a": {"properties": {"b": {}}}}}
    assert "3 levels" in client.chat(guided_json=deep).json()["error"]["message"]
    assert client.chat(guided_json={"properties": {"a": {"type": "string"}}}).status_code == 200


def test_a_grammar_that_the_engine_refuses(client, llm):
    llm.refused_grammar = "integer"
    error = client.chat(response_format=NAMED).json()["error"]
    assert (error["param"], error["message"]) == ("response_format", "The grammar has integer.")
    error = client.chat(guided_json=SCHEMA).json()["error"]
    assert error["param"] == "guided_json"


# Grammars of calls

SPECIALS = {"[TOOL_CALLS]": 256, "[ARGS]": 257, "<|tool_call|>": 258, "<|/tool_call|>": 259}
END = 260


@pytest.fixture(scope="module")
def matcher():
    llguidance = pytest.importorskip("llguidance")
    vocabulary = SimpleNamespace(
        tokens=[bytes([i]) for i in range(256)] + [b"<s%d>" % i for i in range(5)],
        special_token_ids=[*SPECIALS.values(), END],
        eos_token_id=END,
        bos_token_id=None,
        unk_token_id=None,
    )
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(vocabulary)))

    def make(grammar):
        found = llguidance.LLMatcher(tokenizer, grammar.source, log_level=0)
        assert not found.get_error()
        return found

    return make


class _Bytes:
    def __init__(self, vocabulary):
        self.__dict__ |= vars(vocabulary)

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


def accepts(matcher, text):
    """Whether an answer may be `text`, and end there."""
    ids, at = [], 0
    while at < len(text):
        special = next((s for s in SPECIALS if text.startswith(s, at)), None)
        ids += [SPECIALS[special]] if special else list(text[at].encode())
        at += len(special or "x")
    if matcher.validate_tokens(ids) < len(ids):
        return False
    matcher.consume_tokens(ids)
    return matcher.is_accepting()


WEATHER = Tool(
    "weather",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["c", "f"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
NOW = Tool("now", "", {"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = (WEATHER, NOW)
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>',
    "qwen-xml": "<tool_call>\n<function=weather>\n<parameter=city>\n\nOslo <b>\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n<parameter=unit>\nf\n</parameter>\n</function>\n</tool_call>",
    "llama": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}',
    "mistral-list": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]',
    "phi": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "json": '{"name": "weather", "arguments": {"city": "Oslo"}}',
}
TWICE = {
    "hermes": "{0}\n{0}",
    "qwen-xml": "{0}\n{0}",
    "mistral": "{0}{0}",
}


def test_every_dialect_that_can_be_held_is_tried():
    assert {name for name, d in DIALECTS.items() if d.writing} == CALLS.keys() | {"generic"}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_forced_are_those_the_parser_reads(matcher, name):
    dialect, call = DIALECTS[name], CALLS[name]
    grammar = Held(dialect, SPECIALS).must_call(TOOLS, parallel=True)
    assert accepts(matcher(grammar), call)
    assert not accepts(matcher(grammar), "Hello")
    assert not accepts(matcher(grammar), call.replace("weather", "wether"))
    assert not accepts(matcher(grammar), call.replace("city", "town"))
    parser = Parser(dialect, {tool.name: tool.parameters for tool in TOOLS})
    pieces = parser.feed(call) + parser.end()
    arguments = json.loads("".join(p.text for p in pieces if isinstance(p, CallArguments)))
    assert arguments["city"].strip(" <b>\n") == "Oslo"


@pytest.mark.parametrize("name", TWICE)
def test_several_calls_where_they_are_wanted(matcher, name):
    held, calls = Held(DIALECTS[name], SPECIALS), TWICE[name].format(CALLS[name])
    assert accepts(matcher(held.must_call(TOOLS, parallel=True)), calls)
    assert not accepts(matcher(held.must_call(TOOLS, parallel=False)), calls)


def test_several_calls_in_a_list(matcher):
    one = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    held = Held(DIALECTS["mistral-list"], SPECIALS)
    assert accepts(matcher(held.must_call(TOOLS, parallel=True)), f"[TOOL_CALLS] [{one}, {one}]")


def test_parameters_of_xml_are_typed(matcher):
    held, call = Held(DIALECTS["qwen-xml"], {}), CALLS["qwen-xml"]
    grammar = held.must_call(TOOLS, parallel=False)
    assert not accepts(matcher(grammar), call.replace("\n3\n", "\nthree\n"))
    assert not accepts(matcher(grammar), call.replace("\nf\n", "\nk\n"))
    assert accepts(matcher(grammar), "<tool_call>\n<function=now>\n</function>\n</tool_call>")
    assert not accepts(matcher(grammar), "<tool_call>\n<function=weather>\n</function>\n</tool_call>")


def test_loose_arguments_are_any_object(matcher):
    grammar = Held(DIALECTS["hermes"], {}).must_call(TOOLS, parallel=False, loose=True)
    assert accepts(matcher(grammar), '<tool_call>\n{"name": "weather", "arguments": {"x": [1]}}\n</tool_call>')


@pytest.mark.parametrize("name", ["hermes", "qwen-xml", "mistral", "mistral-list", "phi", "deepseek"])
def test_free_text_until_a_call_begins(matcher, name):
    call = CALLS[name]
    grammar = Held(DIALECTS[name], SPECIALS).may_call(TOOLS, parallel=True)
    assert accepts(matcher(grammar), "No call at all, {}.")
    assert accepts(matcher(grammar), f"Look: {call} And {call} done.")
    assert not accepts(matcher(grammar), f"Look: {call.replace('city', 'town')}")
    single = Held(DIALECTS[name], SPECIALS).may_call(TOOLS, parallel=False)
    assert accepts(matcher(single), f"Look: {call}")
    assert not accepts(matcher(single), f"Look: {call}{call}")


def test_calls_without_a_marker_cannot_be_held_in_free_text():
    assert Held(DIALECTS["llama"], {}).may_call(TOOLS, parallel=True) is None


FORMATS = [
    (Grammar("json_schema", json.dumps(SCHEMA)), '{"a": 1}', '{"b": 1}'),
    (Grammar("json_object"), '{"b": [1]}', "[1]"),
    (Grammar("choice", '["yes", "n/o"]'), "n/o", "maybe"),
    (Grammar("regex", r"[a-z]+/\d{2}\/"), "ab/12/", "ab-12/"),
    (Grammar("lark", '%llguidance {}\nstart: "x" NUMBER\nNUMBER: /[0-9]+/'), "x17", "y"),
]


@pytest.mark.parametrize(("grammar", "right", "wrong"), FORMATS)
def test_formats_with_reasoning_before_and_calls_beside(matcher, grammar, right, wrong):
    hermes = replace(DIALECTS["hermes"], think=("<think>", "</think>"))
    opened = Held(hermes, {}, "open").answer(grammar)
    assert accepts(matcher(opened), f"So so,\n1/2.</think>\n\n{right}")
    assert not accepts(matcher(opened), f"So so.</think>{wrong}")
    may = Held(hermes, {}, "may").answer(grammar)
    assert accepts(matcher(may), right)
    assert accepts(matcher(may), f"<think>\nSo.\n</think>\n{right}")
    assert not accepts(matcher(may), wrong)
    beside = Held(hermes, {}, "may").may_call(TOOLS, True, grammar)
    assert accepts(matcher(beside), right)
    assert accepts(matcher(beside), f"<think>x</think>{CALLS['hermes']}")
    assert not accepts(matcher(beside), wrong)
    assert Held(hermes, {}).answer(grammar) is grammar


def test_reasoning_between_special_tokens(matcher):
    think = replace(DIALECTS["mistral"], think=("<|tool_call|>", "<|/tool_call|>"))
    may = Held(think, SPECIALS, "may").must_call(TOOLS, parallel=False)
    assert accepts(matcher(may), f"<|tool_call|>So\nso.<|/tool_call|>{CALLS['mistral']}")
    assert accepts(matcher(may), CALLS["mistral"])
    opened = Held(think, SPECIALS, "open").must_call(TOOLS, parallel=False)
    assert accepts(matcher(opened), f"So so.<|/tool_call|>{CALLS['mistral']}")


def test_what_cannot_be_held_is_refused(client, llm):
    llm.text = SimpleNamespace(template="{{ tools }} tool_code", tokenizer=None)
    tool = {"type": "function", "function": {"name": "f"}}
    error = client.chat(tools=[tool], tool_choice="required").json()["error"]
    assert (error["param"], error["code"]) == ("tool_choice", "unsupported_parameter")
