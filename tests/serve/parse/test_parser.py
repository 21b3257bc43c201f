"""Recorded outputs mean the same however they are cut, and no text at all makes the parser raise."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.serve.parse import parser as module
from tenfold.serve.parse.dialect import DIALECTS, replace
from tenfold.serve.parse.parser import Parser
from tenfold.serve.parse.pieces import CallArguments, CallBegin, Reasoning, Text
from tests.serve.parse.outputs import BROKEN, HERMES, LLAMA, PYTHONIC, ROWS, TOOLS, XML

MARKERS = sorted({marker for d in DIALECTS.values() for marker in d.markers} | {"<think>", "</think>"})
SCRAPS = [
    *MARKERS,
    '{"name": "now", "arguments": {',
    '"name"',
    "}",
    "]",
    "[",
    ": ",
    '"',
    "\\",
    "\n",
    " ",
    "x",
    ">",
    "(",
]
SCRAPS += ["<parameter=text>", "</parameter>", "</function>", "now", "'", ";", ",", "é🌸"]


def read(parser, texts):
    """Text, reasoning and calls that a parser makes of texts."""
    text, reasoning, calls = "", "", []
    pieces = [piece for part in texts for piece in parser.feed(part)] + parser.end()
    for piece in pieces:
        match piece:
            case Text(more):
                assert more
                text += more
            case Reasoning(more):
                assert more
                reasoning += more
            case CallBegin(number, id, name):
                assert number == len(calls)
                assert id
                calls.append([name, ""])
            case CallArguments(number, more):
                assert number == len(calls) - 1  # calls come one after another
                calls[number][1] += more
    return text, reasoning, [tuple(call) for call in calls]


def cuts(text, seed):
    at = sorted(random.Random(seed).choices(range(len(text) + 1), k=8))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("name", ROWS)
def test_recorded_outputs(name):
    dialect, thinking, output, text, reasoning, calls = ROWS[name]
    for texts in ([output], list(output), *(cuts(output, seed) for seed in range(8))):
        got = read(Parser(dialect, TOOLS, thinking=thinking), texts)
        assert (got[0], got[1], [(n, json.loads(a)) for n, a in got[2]]) == (text, reasoning, calls), texts


@pytest.mark.parametrize("name", ROWS)
def test_every_single_cut(name):
    dialect, thinking, output = ROWS[name][:3]
    whole = read(Parser(dialect, TOOLS, thinking=thinking), [output])
    for i in range(len(output)):
        assert read(Parser(dialect, TOOLS, thinking=thinking), [output[:i], output[i:]]) == whole, output[:i]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_cut_off_or_broken_ends_with_what_is_known(name):
    dialect, output, text, calls = BROKEN[name]
    for texts in ([output], list(output)):
        assert read(Parser(dialect, TOOLS), texts) == (text, "", calls)


@pytest.mark.parametrize("name", ROWS)
def test_every_beginning_of_an_output_ends_well(name):
    dialect, thinking, output = ROWS[name][:3]
    for i in range(len(output)):
        read(Parser(dialect, TOOLS, thinking=thinking), [output[:i]])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(DIALECTS)),
    st.booleans(),
    st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=25),
    st.integers(0, 99),
)
def test_random_text_never_raises_and_cuts_do_not_matter(name, thinking, scraps, seed):
    dialect = replace(DIALECTS[name], think=("<think>", "</think>"))
    output = "".join(scraps)
    whole = read(Parser(dialect, TOOLS, thinking=thinking), [output])
    assert read(Parser(dialect, TOOLS, thinking=thinking), list(output)) == whole
    assert read(Parser(dialect, TOOLS, thinking=thinking), cuts(output, seed)) == whole


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(DIALECTS)), st.lists(st.text(max_size=6), max_size=12))
def test_text_without_markers_is_unchanged(name, texts):
    dialect = replace(DIALECTS[name], think=("<think>", "</think>"))
    output = "".join(texts)
    if any(marker in output for marker in MARKERS):
        return
    assert read(Parser(dialect, TOOLS), texts) == (output, "", [])


def test_arguments_come_as_they_are_made():
    parser = Parser(HERMES, TOOLS)
    assert parser.feed('<tool_call>\n{"name": "weather", "arg') == []
    begin, brace = parser.feed('uments": {')
    assert (begin.name, brace.text) == ("weather", "{")
    assert parser.feed('"city": "Os') == [CallArguments(0, '"city": "Os')]
    assert parser.feed('lo"}') == [CallArguments(0, 'lo"}')]
    assert parser.feed("}\n</tool_call>") + parser.end() == []


def test_string_values_of_xml_come_as_they_are_made():
    parser = Parser(XML, TOOLS)
    parser.feed("<tool_call>\n<function=note>\n<parameter=text>\n")
    assert parser.feed('one "two') == [CallArguments(0, 'one \\"two')]
    assert parser.feed(" three\n") == [CallArguments(0, " three")]  # the line break may belong to the tag


def test_plain_text_is_not_held_back():
    parser = Parser(HERMES, TOOLS)
    assert parser.feed("Hello") == [Text("Hello")]
    assert parser.feed(", you") == [Text(", you")]
    assert parser.feed(" <") == []
    assert parser.feed("3") == [Text(" <3")]


def test_json_that_is_no_call_streams_from_its_first_strange_key():
    parser = Parser(LLAMA, TOOLS)
    assert parser.feed('{"title": "x') == [Text('{"title"'), Text(': "x')]
    assert parser.feed(' y"') == [Text(' y"')]


def test_without_tools_calls_are_text():
    dialect, thinking, output = ROWS["hermes, thought first"][:3]
    text, reasoning, calls = read(Parser(dialect, thinking=thinking), [output])
    assert (reasoning, calls) == ("I need <b>data</b>.", [])
    assert text == output.partition("</think>\n\n")[2]


def test_only_the_first_call_where_one_is_wanted():
    dialect, _, output = ROWS["parallel"][:3]
    text, _, calls = read(Parser(dialect, TOOLS, one=True), list(output))
    assert (text, [name for name, _ in calls]) == ("Both.", ["weather"])


def test_special_tokens_other_than_markers_are_dropped():
    dropped = ["<|im_end|>", "<tool_call>"]
    output = 'a<|im_end|> b<tool_call>{"name": "note", "arguments": {"text": "<|im_end|>"}}</tool_call><|im_end|>'
    text, _, calls = read(Parser(HERMES, TOOLS, dropped=dropped), list(output))
    assert (text, calls) == ("a b", [("note", '{"text": "<|im_end|>"}')])


def test_ids_are_unique_and_in_the_form_the_template_wants():
    def ids(name):
        parser = Parser(DIALECTS[name], TOOLS)
        pieces = [
            p for _ in range(3) for p in parser.feed('[TOOL_CALLS]now[ARGS]{}<tool_call>{"name": "now"}</tool_call>')
        ]
        return [p.id for p in pieces if isinstance(p, CallBegin)]

    assert len(set(ids("hermes"))) == 3
    assert all(id.startswith("call_") for id in ids("hermes"))
    assert all(len(id) == 9 and id.isalnum() for id in ids("mistral"))


def test_work_does_not_grow_with_the_answer():
    """Counted in characters looked at, by feeding what is held longest: arguments without a name yet."""
    parser = Parser(HERMES, TOOLS)
    parser.feed('<tool_call>{"arguments": {"a": "')
    for _ in range(2000):
        parser.feed("xxxx")
        assert len(parser._buffer) < 100
    _, arguments = parser.feed('"}, "name": "note"}')
    assert len(arguments.text) == 8000 + len('{"a": ""}')


@pytest.mark.parametrize("name", DIALECTS)
def test_no_marker_begins_another(name):
    markers = set(DIALECTS[name].markers)
    clashes = [(a, b) for a in markers for b in markers if a != b and b.startswith(a)]
    assert [c for c in clashes if "`" not in c[0]] == []


@pytest.mark.parametrize(
    ("dialect", "output", "name", "arguments"),
    [
        (HERMES, '<tool_call>{"name": "a\\ud800b", "arguments": {}}</tool_call>', "a�b", {}),
        (
            HERMES,
            '<tool_call>{"name": "note", "arguments": "{\\"text\\": \\"\\ud800!\\"}"}</tool_call>',
            "note",
            {"text": "�!"},
        ),
        (PYTHONIC, "[note(text='\\udc00\\ud83c\\udf38')]", "note", {"text": "�🌸"}),
        (XML, "<tool_call><function=note><parameter=tags>['\\ud800']</parameter></function></tool_call>", "note", None),
    ],
)
def test_half_a_surrogate_pair_does_not_break_the_response(dialect, output, name, arguments):
    for texts in ([output], list(output)):
        _, _, calls = read(Parser(dialect, TOOLS), texts)
        assert calls[0][0] == name
        assert calls[0][1].encode()
        assert arguments is None or json.loads(calls[0][1]) == arguments


def test_the_types_of_a_tool_are_read_once(monkeypatch):
    read_types = []
    monkeypatch.setattr(module, "parameter_types", lambda schema: read_types.append(schema) or {})
    call = "<tool_call>\n<function=note>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call>\n"
    assert len(read(Parser(XML, TOOLS), [call * 3])[2]) == 3
    assert read_types == [TOOLS["note"]]
