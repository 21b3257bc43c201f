"""What an answer is held to: response_format and its like made into a `Grammar`, and the grammars of tool calls.

Invariant: what a client asks to have held is held or refused with 400; nothing is quietly given up. Tool calls are
grammars in llguidance's Lark dialect that put JSON schemas between the markers of the model's dialect.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.engine.grammar import KINDS
from tenfold.engine.request import Grammar
from tenfold.engine.schema import JSON_OPTIONS, json_schema
from tenfold.serve.conversation import Tool, written
from tenfold.serve.errors import ApiError, invalid
from tenfold.serve.parse.dialect import Dialect, Form
from tenfold.serve.parse.values import parameter_types
from tenfold.serve.settings import ServeConfig

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FORMATS = ("json", "json_object", "regex", "choice", "grammar")  # as vLLM calls them
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
FIELDS = ("response_format", "structured_outputs", *GUIDED)
ANY_OBJECT = {"type": "object"}
# JSON in calls is spaced as models were trained to write it.
SPACING = {key: value for key, value in JSON_OPTIONS.items() if key != "whitespace_pattern"} | {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


def asked_format(fields: Mapping[str, Any], settings: ServeConfig) -> tuple[Grammar | None, str]:
    """The grammar that a request asks for, and the field it does so in.

    fields: those of FIELDS that were given, by name. Raises ApiError (400) for several, unknown or oversized ones.
    """
    given = {name: value for name in FIELDS if (value := fields.get(name)) is not None}
    if given.get("response_format") == {"type": "text"}:
        del given["response_format"]
    if len(given) > 1:
        first, second = list(given)[:2]
        raise invalid(f"{second} cannot be combined with {first}; give one of them.", second)
    for name, value in given.items():
        if name == "response_format":
            return response_format(value, settings, name), name
        if name == "structured_outputs":
            return _structured_outputs(value, settings, name), name
        return _of_kind(GUIDED[name], value, settings, name), name
    return None, "response_format"


def response_format(value: Any, settings: ServeConfig, where: str) -> Grammar | None:
    """The grammar of {"type": "text" | "json_object" | "json_schema", ...}. Raises ApiError (400)."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    if kind != "json_schema":
        raise invalid(f"{where}.type is {_short(kind)}; allowed: text, json_object, json_schema.", f"{where}.type")
    wrapped = value.get("json_schema")
    if not isinstance(wrapped, dict):
        raise invalid(f'{where}.json_schema is required: {{"name": ..., "schema": ...}}.', f"{where}.json_schema")
    check_name(wrapped.get("name"), f"{where}.json_schema.name")
    strict = wrapped.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{where}.json_schema.strict must be true or false.", f"{where}.json_schema.strict")
    schema = wrapped.get("schema")
    if schema is None:
        return Grammar("json_object")
    return schema_grammar(schema, settings, f"{where}.json_schema.schema", where)


def schema_grammar(schema: Any, settings: ServeConfig, where: str, param: str = "") -> Grammar:
    """Raises ApiError (400) for what is no JSON schema or a larger one than this server takes. param: the field that
    errors name, `where` if empty.
    """
    if not isinstance(schema, dict):
        raise invalid(f"{where} must be a JSON schema, which is an object.", param or where)
    source = json.dumps(schema, ensure_ascii=False)
    _check_size(source, settings, where, param or where)
    if _deeper(schema, settings.max_schema_depth):
        most = settings.max_schema_depth
        raise invalid(f"{where} is nested deeper than {most} levels (--max-schema-depth).", param or where)
    return Grammar("json_schema", source)


def check_name(name: Any, where: str) -> None:
    """Raises ApiError (400) for a name OpenAI would not take."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid(f"{where} is {_short(name)}; allowed: 1 to 64 letters, digits, underscores and hyphens.", where)


def checked_tool(name: Any, description: Any, parameters: Any, strict: Any, settings: ServeConfig, where: str) -> Tool:
    """A tool from a client's words. where: the field that holds it. Raises ApiError (400)."""
    check_name(name, f"{where}.name")
    if not isinstance(description, (str, type(None))):
        raise invalid(f"{where}.description must be a text.", f"{where}.description", "invalid_type")
    if not isinstance(strict, (bool, type(None))):
        raise invalid(f"{where}.strict must be true or false.", f"{where}.strict", "invalid_type")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    schema_grammar(parameters, settings, f"{where}.parameters")
    return Tool(name, description or "", parameters, bool(strict))


def read_tools(
    given: Sequence[dict[str, Any]],
    read: Callable[[dict[str, Any], ServeConfig, str], Tool],
    settings: ServeConfig,
    where: str,
) -> tuple[Tool, ...]:
    """Tools from a client's words, each by `read`. Raises ApiError (400), also for more tools than the server takes
    and for two of one name.
    """
    if len(given) > settings.max_tools:  # before work is done for each
        raise invalid(f"{where} has {len(given)} entries; allowed: up to {settings.max_tools} (--max-tools).", where)
    tools: dict[str, Tool] = {}
    for i, one in enumerate(given):
        tool = read(one, settings, f"{where}[{i}]")
        if tool.name in tools:
            raise invalid(f"{where} has two tools of the name {tool.name!r}; give each its own.", where)
        tools[tool.name] = tool
    return tuple(tools.values())


def check_allowed(listed: Sequence[Any], tools: Sequence[Any], where: str) -> None:
    """Raises ApiError (400) for a part of the tools that is larger than all of them."""
    if len(listed) > len(tools):
        raise invalid(f"{where} has {len(listed)} entries; allowed: up to {len(tools)}, each tool once.", where)


def _structured_outputs(value: Any, settings: ServeConfig, where: str) -> Grammar:
    if not isinstance(value, dict):
        raise invalid(f"{where} must be an object with one of {', '.join(FORMATS)}.", where)
    given = {kind: v for kind, v in value.items() if v is not None and v is not False}
    if len(given) != 1 or next(iter(given)) not in FORMATS:
        names = ", ".join(str(kind)[:32] for kind in given) or "nothing"
        raise invalid(f"{where} has {names}; allowed: exactly one of {', '.join(FORMATS)}.", where)
    ((kind, v),) = given.items()
    return _of_kind(kind, v, settings, f"{where}.{kind}")


def _of_kind(kind: str, value: Any, settings: ServeConfig, where: str) -> Grammar:
    if kind == "json_object":
        return Grammar("json_object")
    if kind == "json":
        return schema_grammar(_schema(value, where), settings, where)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise invalid(f"{where} must be a list of texts, none of them empty.", where)
        source = json.dumps(value, ensure_ascii=False)
    else:
        if not isinstance(value, str) or not value:
            raise invalid(f"{where} must be a text that is not empty.", where)
        source = value
    _check_size(source, settings, where, where)
    return Grammar({"grammar": "lark"}.get(kind, kind), source)


def _schema(value: Any, where: str) -> Any:
    """vLLM's clients may send a schema as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise invalid(f"{where} is a text that is not JSON; give a JSON schema.", where) from None


def _check_size(source: str, settings: ServeConfig, where: str, param: str) -> None:
    size, most = len(source.encode(errors="surrogatepass")), settings.max_schema_bytes
    if size > most:
        raise invalid(f"{where} has {size} bytes; allowed: up to {most} (--max-schema-bytes).", param)


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep. Not recursive: the depth is a client's."""
    level = [value]
    for _ in range(most + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, (dict, list))]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Grammars that are put together


@dataclass(frozen=True, slots=True)
class Held:
    """How an answer is held.

    specials: special tokens' texts to their ids; texts of other tokens are written as text. thinking: "open" where the
    prompt opened the reasoning, "may" where the model may, "" where it will not.
    """

    dialect: Dialect
    specials: Mapping[str, int]
    thinking: str = ""

    def answer(self, grammar: Grammar) -> Grammar:
        """`grammar` for what comes after the reasoning."""
        if not self.thinking:
            return grammar
        return self._grammar([_embedded(grammar)], [])

    def must_call(self, tools: Sequence[Tool], parallel: bool, loose: bool = False) -> Grammar:
        """Nothing but calls. loose: arguments may be any object, for schemas that cannot be held to."""
        rules = _Rules(self, tools, loose)
        return self._grammar([rules.section(parallel)], rules.lines)

    def may_call(self, tools: Sequence[Tool], parallel: bool, grammar: Grammar | None = None) -> Grammar | None:
        """Text with calls in it, or an answer by `grammar` or calls; None where no marker tells a call from text."""
        rules = _Rules(self, tools, loose=False)
        if grammar is not None:
            return self._grammar([_embedded(grammar), rules.section(parallel)], rules.lines)
        trigger, rest = rules.triggered(parallel)
        if not trigger:
            return None
        special = self.specials.get(trigger)
        lines = [*rules.lines, "TEXT: /(.|\\n)*/"]
        if special is None:
            lines.append(f"trigger[lazy]: TEXT {_quoted(trigger)}")
            call = f"trigger {rest}"
        else:
            call = f"TEXT <[{special}]> {rest}"
        body = f"({call})* TEXT" if parallel else f"({call}) | TEXT"
        return self._grammar([body], lines)

    def _grammar(self, bodies: Sequence[str], lines: Sequence[str]) -> Grammar:
        names = " | ".join(f"body_{i}" for i in range(len(bodies)))
        head = {"": f"start: {names}", "may": f"start: (thought)? ({names})", "open": f"start: thought ({names})"}
        rules = [f"body_{i}: {body}" for i, body in enumerate(bodies)]
        source = ["%llguidance {}", head[self.thinking], *rules, *lines, *self._thought()]
        return Grammar("lark", "\n".join(source) + "\n")

    def _thought(self) -> list[str]:
        if not self.thinking:
            return []
        assert self.dialect.think is not None
        opening, closing = self.dialect.think
        lines = ["space: /[ \\n]{0,4}/"]
        if closing in self.specials:
            begin = f"<[{self.specials[opening]}]> " if self.thinking == "may" and opening in self.specials else ""
            return [*lines, f"thought: {begin}THOUGHT <[{self.specials[closing]}]> space", "THOUGHT: /(.|\\n)*/"]
        begin = rf"\s*{_pattern(opening)}" if self.thinking == "may" else ""
        return [*lines, "thought: thinking space", rf"thinking[lazy]: /{begin}(.|\n)*{_pattern(closing)}/"]


class _Rules:
    """The rules of calls to some tools."""

    def __init__(self, held: Held, tools: Sequence[Tool], loose: bool) -> None:
        if held.dialect.writing is None:
            raise ApiError(
                400,
                f"This model writes calls in a way ({held.dialect.name}) that cannot be held to a grammar; "
                'use tool_choice "auto" and tools without strict.',
                param="tool_choice",
                code="unsupported_parameter",
            )
        self.held = held
        self.writing = held.dialect.writing
        self.lines: list[str] = []
        xml = Form.XML in held.dialect.forms
        for i, tool in enumerate(tools):
            schema: Mapping[str, Any] = ANY_OBJECT if loose else tool.parameters
            self.lines.append(f"arguments_{i}: {self._parameters(i, schema) if xml else _arguments(schema)}")
        self.openings = [written(self.writing, tool.name) for tool in tools]

    def section(self, parallel: bool) -> str:
        """One call, or several that follow each other, with what stands around all of them."""
        return f"{self._text(self.writing.first)} {self._calls(self.openings, parallel)}".strip()

    def triggered(self, parallel: bool) -> tuple[str, str]:
        """The marker that every section begins with, "" for none, and the rest of a section."""
        dialect = self.held.dialect
        whole = self.writing.first or self.openings[0]
        marker = next((m for m in (*dialect.around, *dialect.begin) if whole.startswith(m)), "")
        if self.writing.first:
            rest = self._text(self.writing.first.removeprefix(marker))
            return marker, f"{rest} {self._calls(self.openings, parallel)}".strip()
        return marker, self._calls([o.removeprefix(marker) for o in self.openings], parallel=False)

    def _calls(self, openings: Sequence[str], parallel: bool) -> str:
        closing = self._text(self.writing.closing)
        each = [f"({self._text(o)} arguments_{i} {closing})" for i, o in enumerate(openings)]
        call = f"({' | '.join(each)})"
        between = self.writing.between
        more = f" ({self._text(between)} {call})*" if parallel and between is not None else ""
        return f"{call}{more} {self._text(self.writing.last)}".strip()

    def _text(self, text: str) -> str:
        """Text as a grammar writes it, special tokens in it by their ids."""
        specials = [marker for marker in self.held.dialect.markers if marker in self.held.specials]
        if not specials:
            return _quoted(text) if text else ""
        parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
        return " ".join(
            f"<[{self.held.specials[part]}]>" if part in specials else _quoted(part) for part in parts if part
        )

    def _parameters(self, tool: int, schema: Mapping[str, Any]) -> str:
        """Parameters of the XML form, in the schema's order."""
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return '""'
        types = parameter_types(schema)
        required = schema.get("required") if isinstance(schema.get("required"), list) else []
        names = []
        for i, (key, part) in enumerate(properties.items()):
            rule = f"parameter_{tool}_{i}"
            value = self._xml_value(rule, part, schema, "string" in types[key])
            self.lines.append(f"{rule}: {_quoted(f'<parameter={key}>' + chr(10))} {value}")
            names.append(rule if key in (required or ()) else f"({rule})?")
        return " ".join(names) or '""'

    def _xml_value(self, rule: str, part: Any, schema: Mapping[str, Any], text: bool) -> str:
        ending = "\n</parameter>\n"
        choices = part.get("enum") if isinstance(part, dict) else None
        if text and isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices):
            return f"({' | '.join(map(_quoted, choices))}) {_quoted(ending)}"
        if text:
            self.lines.append(rf"{rule}_text[lazy]: /(.|\n)*\n<\/parameter>\n/")
            return f"{rule}_text"
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return f"{_arguments({**definitions, **part})} {_quoted(ending)}"


def _embedded(grammar: Grammar) -> str:
    """A grammar as part of another. Raises ValueError for one that cannot be used."""
    made = KINDS[grammar.kind](grammar.source)
    whole = json.loads(made)["grammars"][0] if made.startswith('{"grammars"') else {"lark_grammar": made}
    if whole.get("json_schema") is not None:
        return "%json " + json.dumps(whole["json_schema"], ensure_ascii=False)
    return "%lark {\n" + re.sub(r"^\s*%llguidance\s*\{[^}]*\}", "", whole["lark_grammar"]) + "\n}"


def _arguments(schema: Mapping[str, Any]) -> str:
    """JSON by a schema, as part of a grammar. Raises ValueError for a schema that cannot be used."""
    checked = json.loads(json_schema(json.dumps(schema)))
    return "%json " + json.dumps({**checked, "x-guidance": SPACING}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
