"""What models write, and what is to be read from it. Each row: dialect, whether the prompt opened the reasoning, the
output, and the text, reasoning and calls in it. The outputs follow the models' published chat templates.
"""

from typing import Any

from tenfold.serve.parse.dialect import DIALECTS, Dialect, replace

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
NOTE = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "pinned": {"type": ["boolean", "null"]},
        "extra": {"$ref": "#/$defs/extra"},
    },
    "$defs": {"extra": {"type": "object"}},
}
TOOLS = {"weather": WEATHER, "note": NOTE, "now": {}}

THINK = ("<think>", "</think>")
BRACKETS = ("[THINK]", "[/THINK]")


def dialect(name: str, think: tuple[str, str] | None = None) -> Dialect:
    return replace(DIALECTS[name], think=think)


HERMES = dialect("hermes", THINK)
XML = dialect("qwen-xml", THINK)
LLAMA = dialect("llama")
MISTRAL = dialect("mistral", BRACKETS)
PHI = dialect("phi")
DEEPSEEK = dialect("deepseek", THINK)
V31 = dialect("deepseek-v3.1", THINK)
PYTHONIC = dialect("pythonic")
JSON = dialect("json")

Row = tuple[Dialect, bool, str, str, str, list[tuple[str, Any]]]

OSLO = ("weather", {"city": "Oslo"})
ROWS: dict[str, Row] = {
    "hermes": (
        HERMES,
        False,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "",
        "",
        [OSLO],
    ),
    "hermes, thought first": (
        HERMES,
        False,
        '<think>\nI need <b>data</b>.\n\n</think>\n\nLet me look.\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Oslo"}}\n</tool_call>',
        "Let me look.",
        "I need <b>data</b>.",
        [OSLO],
    ),
    "the prompt opened the reasoning": (HERMES, True, "Hm.\n</think>\n\nYes.", "Yes.", "Hm.", []),
    "opened twice": (HERMES, True, "<think>\nHm.</think>Yes.", "Yes.", "Hm.", []),
    "no reasoning at all": (HERMES, False, "Yes: a <think> tag </think>.", "Yes: a <think> tag </think>.", "", []),
    "empty reasoning": (HERMES, False, "<think>\n\n</think>\n\nYes.\n", "Yes.\n", "", []),
    "cut off in the reasoning": (HERMES, True, "Let me see, 3 </thin", "", "Let me see, 3 </thin", []),
    "a call in the reasoning is a draft": (
        HERMES,
        False,
        '<think>Maybe <tool_call>{"name": "now"}</tool_call>?</think>No.',
        "No.",
        'Maybe <tool_call>{"name": "now"}</tool_call>?',
        [],
    ),
    "parallel": (
        HERMES,
        False,
        'Both.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "note", "arguments": {"text": "x", "tags": ["a", "{b}"]}}\n</tool_call>',
        "Both.",
        "",
        [OSLO, ("note", {"text": "x", "tags": ["a", "{b}"]})],
    ),
    "text between and after": (
        HERMES,
        False,
        'a<tool_call>{"name": "now", "arguments": {}}</tool_call> b <tool_call>{"name": "now"}</tool_call>\nc',
        "a b \nc",
        "",
        [("now", {}), ("now", {})],
    ),
    "two in one pair of markers": (
        HERMES,
        False,
        '<tool_call>\n{"name": "now", "arguments": {}}\n{"name": "weather", "arguments": '
        '{"city": "Oslo"}}\n</tool_call>',
        "",
        "",
        [("now", {}), OSLO],
    ),
    "a list": (
        HERMES,
        False,
        '<tool_call>[{"name": "now"}, {"name": "weather", "arguments": {"city": "Oslo"}}]</tool_call>',
        "",
        "",
        [("now", {}), OSLO],
    ),
    "markers, brackets and escapes in strings": (
        HERMES,
        False,
        r'<tool_call>{"name": "note", "arguments": {"text": "</tool_call> }] \" \\ ü 🌸\n", "n": [[{}], 1e-5]}}'
        "</tool_call>",
        "",
        "",
        [("note", {"text": '</tool_call> }] " \\ ü 🌸\n', "n": [[{}], 1e-5]})],
    ),
    "arguments first": (
        HERMES,
        False,
        '<tool_call>{"arguments": {"city": "Oslo", "name": "x"}, "id": 7, "name": "weather"}</tool_call>',
        "",
        "",
        [("weather", {"city": "Oslo", "name": "x"})],
    ),
    "arguments as a string": (
        HERMES,
        False,
        r'<tool_call>{"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}</tool_call>',
        "",
        "",
        [OSLO],
    ),
    "no arguments": (HERMES, False, '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", "", [("now", {})]),
    "one brace too many": (
        HERMES,
        False,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}}\n</tool_call>ok',
        "ok",
        "",
        [OSLO],
    ),
    "one brace too few": (
        HERMES,
        False,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}\n</tool_call>ok',
        "ok",
        "",
        [OSLO],
    ),
    "not a call": (
        HERMES,
        False,
        "<tool_call>not JSON</tool_call> <tool_call>{}</tool_call>",
        "<tool_call>not JSON</tool_call> <tool_call>{}</tool_call>",
        "",
        [],
    ),
    "nothing but a marker": (HERMES, False, "Well.\n<tool_call>\n", "Well.", "", []),
    "almost markers": (HERMES, False, "a <tool_ca b < c <tool <<tool_cal", "a <tool_ca b < c <tool <<tool_cal", "", []),
    "qwen xml": (
        XML,
        True,
        "Hm.\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        "",
        "Hm.",
        [("weather", {"city": "Oslo", "days": 3})],
    ),
    "qwen xml, values of every kind": (
        XML,
        False,
        '<tool_call>\n<function=note>\n<parameter=text>\n  a "b" \\ </parameter> or <parameter=x>\n\n</parameter>\n'
        "<parameter=tags>\n['x', \"y\"]\n</parameter>\n<parameter=pinned>\nTrue\n</parameter>\n<parameter=extra>\n"
        '{"a": [1]}\n</parameter>\n<parameter=unknown>\n5\n</parameter>\n</function>\n</tool_call>\nDone.',
        "\nDone.",
        "",
        [
            (
                "note",
                {
                    "text": '  a "b" \\ </parameter> or <parameter=x>\n',
                    "tags": ["x", "y"],
                    "pinned": True,
                    "extra": {"a": [1]},
                    "unknown": "5",
                },
            )
        ],
    ),
    "qwen xml on one line": (
        XML,
        False,
        "a<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>b",
        "ab",
        "",
        [OSLO],
    ),
    "qwen xml without markers": (
        XML,
        False,
        "Now.\n\n<function=now>\n</function>\n</tool_call>",
        "Now.",
        "",
        [("now", {})],
    ),
    "qwen xml, tags forgotten": (
        XML,
        False,
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n<parameter=days>\n3\n</function>\n</tool_call>",
        "",
        "",
        [("weather", {"city": "Oslo", "days": 3})],
    ),
    "qwen xml, the reasoning was never closed": (
        XML,
        True,
        "I look.\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "",
        "I look.",
        [("now", {})],
    ),
    "llama": (LLAMA, False, '{"name": "weather", "parameters": {"city": "Oslo"}}', "", "", [OSLO]),
    "llama, tagged": (
        LLAMA,
        False,
        'Look. <|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}',
        "Look. ",
        "",
        [OSLO],
    ),
    "llama, two": (
        LLAMA,
        False,
        '{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "Oslo"}}',
        "",
        "",
        [("now", {}), OSLO],
    ),
    "llama, JSON that is no call": (
        LLAMA,
        False,
        '{"name": "Ann", "age": 3}, {"a": {}}',
        '{"name": "Ann", "age": 3}, {"a": {}}',
        "",
        [],
    ),
    "llama, a name nobody offered": (
        LLAMA,
        False,
        '{"name": "Ann", "parameters": {}}',
        '{"name": "Ann", "parameters": {}}',
        "",
        [],
    ),
    "mistral": (
        MISTRAL,
        False,
        '[THINK]So [TOOL_CALLS].[/THINK]Look.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}',
        "Look.",
        "So [TOOL_CALLS].",
        [OSLO, ("now", {})],
    ),
    "mistral with ids": (
        MISTRAL,
        False,
        '[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{"a": 1}',
        "",
        "",
        [("now", {"a": 1})],
    ),
    "mistral's list": (
        MISTRAL,
        False,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]',
        "",
        "",
        [OSLO, ("now", {})],
    ),
    "mistral, no call": (MISTRAL, False, "[TOOL_CALLS] no call", "[TOOL_CALLS] no call", "", []),
    "phi": (
        PHI,
        False,
        '<|tool_call|>[{"type": "function", "name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>',
        "",
        "",
        [OSLO],
    ),
    "phi's other word": (
        PHI,
        False,
        'functools[{"name": "now", "arguments": {}}] and import functools',
        " and import functools",
        "",
        [("now", {})],
    ),
    "deepseek": (
        DEEPSEEK,
        False,
        "<think>Hm</think>Look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>note\n```json\n'
        '{"text": "```json\\n{}"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "Look.",
        "Hm",
        [OSLO, ("note", {"text": "```json\n{}"})],
    ),
    "deepseek v3.1": (
        V31,
        False,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "",
        [OSLO, ("now", {})],
    ),
    "python": (
        PYTHONIC,
        False,
        "[weather(city='Oslo\\'s', days=-3), note(tags=['a'], pinned=None), now()]",
        "",
        "",
        [("weather", {"city": "Oslo's", "days": -3}), ("note", {"tags": ["a"], "pinned": None}), ("now", {})],
    ),
    "python in a fence": (
        PYTHONIC,
        False,
        "Look.\n```tool_code\nprint(weather(city='Oslo'))\n```\n",
        "Look.",
        "",
        [OSLO],
    ),
    "a list that is no call": (PYTHONIC, False, "[1, 2] and [a]", "[1, 2] and [a]", "", []),
    "plain JSON": (JSON, False, '\n{"name": "weather", "arguments": {"city": "Oslo"}}\n', "", "", [OSLO]),
}

# Cut off or broken after a call was begun: text, calls with their arguments as far as they go.
BROKEN: dict[str, tuple[Dialect, str, str, list[tuple[str, str]]]] = {
    "hermes": (
        HERMES,
        'a <tool_call>{"name": "weather", "arguments": {"city": "Os',
        "a",
        [("weather", '{"city": "Os')],
    ),
    "in an escape": (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\', "", [("f", '{"a": "\\')]),
    "before the arguments": (HERMES, '<tool_call>{"name": "weather", "ar', '<tool_call>{"name": "weather", "ar', []),
    "arguments that are no JSON": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {a: <b>}}</tool_call> ok',
        " ok",
        [("f", "{a: ")],
    ),
    "xml": (
        XML,
        "<tool_call>\n<function=note>\n<parameter=text>\nrm -rf /",
        "",
        [("note", '{"text": "rm -rf /')],
    ),
    "xml without an end": (
        XML,
        "<tool_call><function=now>oops</tool_call> ok",
        " ok",
        [("now", "")],
    ),
    "mistral": (MISTRAL, "[TOOL_CALLS]now[ARGS]{", "", [("now", "{")]),
    "python": (PYTHONIC, "[weather(city='Os", "[weather(city='Os", []),
}
