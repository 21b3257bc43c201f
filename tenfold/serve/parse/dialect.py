"""How model families write reasoning and tool calls: one `Dialect`, a row of data, for each way.

Invariant: no marker of a dialect is the beginning of another of its markers, so what a text means does not depend on
where it is cut. `dialect_for` reads the chat template, because a template is written for one model and says what that
model was trained to write; the family decides only where a template shows no marker.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum


class Form(StrEnum):
    """What a call looks like inside its markers."""

    JSON = "json"  # {"name": ..., "arguments": {...}}, or a list of these
    NAMED = "named"  # name, a marker, {...}
    XML = "xml"  # <function=name><parameter=key>value</parameter></function>
    PYTHON = "python"  # [name(key=value), ...]


@dataclass(frozen=True, slots=True)
class Writing:
    """The exact text of calls, for grammars and for conversations told in plain text. `opening` has a %s for the name;
    between it and `closing` stand the arguments as JSON. between: None where the model makes one call at a time.
    """

    opening: str
    closing: str = ""
    between: str | None = None
    first: str = ""
    last: str = ""


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way of writing.

    think: markers around reasoning. begin: markers, after each of which calls follow in one of `forms`. end: markers
    that may follow calls. around: markers that mean nothing by themselves. after_name: markers between a name and its
    arguments (NAMED); aside: one of them whose following word is not the name. bare: a call may begin an answer without
    a marker. trim: white space before a call is not part of the text. drafts: a call within reasoning is only thought
    about; where False, it ends the reasoning. id_length: of call ids, 0 for OpenAI's form. in_system: the template
    wants the tools as a field of the system message. described: the template knows no tools, so they are described in
    a system message. why: how this dialect was chosen.
    """

    name: str
    forms: tuple[Form, ...]
    writing: Writing | None
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    after_name: tuple[str, ...] = ()
    aside: str = ""
    bare: bool = False
    trim: bool = True
    drafts: bool = True
    id_length: int = 0
    in_system: bool = False
    described: bool = False
    think: tuple[str, str] | None = None
    why: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker, which the text has to show for the parser to find it."""
        return (*(self.think or ()), *self.begin, *self.end, *self.around, *self.after_name)


HERMES = Dialect(
    "hermes",
    (Form.JSON,),
    Writing('<tool_call>\n{"name": %s, "arguments": ', "}\n</tool_call>", "\n"),
    begin=("<tool_call>",),
    end=("</tool_call>",),
)
GENERIC = replace(HERMES, name="generic", described=True)
QWEN_XML = Dialect(
    "qwen-xml",
    (Form.XML, Form.JSON),
    Writing("<tool_call>\n<function=%s>\n", "</function>\n</tool_call>", "\n"),
    begin=("<tool_call>", "<function="),
    end=("</tool_call>",),
    drafts=False,
)
LLAMA = Dialect(
    "llama",
    (Form.JSON,),
    Writing('{"name": %s, "parameters": ', "}"),
    begin=("<|python_tag|>",),
    end=("<|eom_id|>",),
    bare=True,
    trim=False,
)
MISTRAL = Dialect(
    "mistral",
    (Form.JSON, Form.NAMED),
    Writing("[TOOL_CALLS]%s[ARGS]", "", ""),
    begin=("[TOOL_CALLS]",),
    after_name=("[ARGS]", "[CALL_ID]"),
    aside="[CALL_ID]",
    trim=False,
    id_length=9,
)
MISTRAL_LIST = replace(
    MISTRAL,
    name="mistral-list",
    writing=Writing('{"name": %s, "arguments": ', "}", ", ", "[TOOL_CALLS] [", "]"),
)
PHI = Dialect(
    "phi",
    (Form.JSON,),
    Writing('{"name": %s, "arguments": ', "}", ", ", "<|tool_call|>[", "]<|/tool_call|>"),
    begin=("<|tool_call|>", "<|tool_calls|>", "functools"),
    end=("<|/tool_call|>", "<|/tool_calls|>"),
    in_system=True,
)
DEEPSEEK = Dialect(
    "deepseek",
    (Form.NAMED,),
    Writing(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    begin=("<｜tool▁call▁begin｜>",),
    end=("```", "<｜tool▁call▁end｜>"),
    around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    after_name=("<｜tool▁sep｜>", "```json"),
)
DEEPSEEK_V31 = replace(
    DEEPSEEK,
    name="deepseek-v3.1",
    writing=Writing(
        "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
)
PYTHONIC = Dialect(
    "pythonic",
    (Form.PYTHON,),
    None,
    begin=("<|python_start|>", "```tool_code"),
    end=("<|python_end|>", "```"),
    bare=True,
)
PLAIN_JSON = Dialect("json", (Form.JSON,), Writing('{"name": %s, "arguments": ', "}"), bare=True)

DIALECTS = {
    d.name: d
    for d in (
        *(HERMES, GENERIC, QWEN_XML, LLAMA, MISTRAL, MISTRAL_LIST, PHI),
        *(DEEPSEEK, DEEPSEEK_V31, PYTHONIC, PLAIN_JSON),
    )
}

# What a template that offers tools shows, all of the markers of a row; the first row that fits counts.
SHOWN: tuple[tuple[tuple[str, ...], Dialect], ...] = (
    (("<function=", "<parameter="), QWEN_XML),
    (("<tool_call>",), HERMES),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK_V31),
    (("<|python_start|>",), PYTHONIC),
    (("tool_code",), PYTHONIC),
    (("<|python_tag|>",), LLAMA),
    (("ipython",), LLAMA),
    (("<|tool_call|>",), PHI),
    (("<|tool|>",), PHI),
)
FAMILIES = {  # as `Facts.family` names them
    "Llama": LLAMA,
    "Mistral": MISTRAL,
    "Phi3": PHI,
    "Qwen2": HERMES,
    "Qwen3": HERMES,
}
THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
TOOLS = re.compile(r"\btools\b")


def dialect_for(family: str, template: str, vocabulary: Collection[str] = ()) -> Dialect:
    """The dialect of a model.

    family: the class of its model. template: the source of its chat template, "" where it has none. vocabulary: its
    added tokens.
    """
    tools, why = _tools(family, template)
    for markers in THINK:
        if markers[1] in template or markers[1] in vocabulary:
            where = "the template" if markers[1] in template else "the vocabulary"
            return replace(tools, think=markers, why=f"{why}; {where} has {markers[1]}")
    return replace(tools, why=why)


def _tools(family: str, template: str) -> tuple[Dialect, str]:
    if not TOOLS.search(template):
        return GENERIC, "the chat template does not read tools"
    for markers, dialect in SHOWN:
        if all(marker in template for marker in markers):
            return dialect, f"the chat template has {' and '.join(markers)}"
    if family in FAMILIES:
        return FAMILIES[family], f"the chat template reads tools, and the model is a {family}"
    return PLAIN_JSON, "the chat template reads tools but shows no marker"
