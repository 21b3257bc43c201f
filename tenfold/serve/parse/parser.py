"""The streaming parser: the text of an answer in, pieces out, whatever the dialect.

Invariants: pieces do not depend on where the text was cut; nothing is given out twice; no text ever raises; each feed
costs time in proportion to what is new. What only looks like a call is given out as text, unchanged. A call that was
begun stays: of one that is cut off, the arguments so far have been told and are left open, never made up.

The parser is one generator that runs as far as the text goes and waits where it ends, so each form of call reads like
the grammar it has.
"""

import json
import re
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from tenfold.serve.parse.dialect import Dialect, Form
from tenfold.serve.parse.pieces import CallArguments, CallBegin, Piece, Reasoning, Text
from tenfold.serve.parse.values import parameter_types, python_calls, typed_value

Steps = Generator[None, None, Any]

SPACE = re.compile(r"\s*")
WORD = re.compile(r"[^\s<>\[\]{}()\"'`|｜]*")  # of names; brackets and marker characters end one
IN_STRING = re.compile(r'["\\]')
OUTSIDE = re.compile(r'["{}\[\]<`]')  # what ends or nests a value, or cannot be JSON
SCALAR = re.compile(r"[^\s,\]}]*")
IN_PYTHON = re.compile(r"[\"'()\[\]{}]")
CALL_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})  # of a call that has no marker
VALUE_ENDS = ("</parameter>", "<parameter=", "</function>")
AFTER_VALUE = ("<parameter=", "</function>", "</tool_call>")
AFTER_FUNCTION = ("</tool_call>", "<tool_call>", "<function=")
MAX_SPACE = 64  # between tags
NONE: list[Piece] = []


class Markers:
    """Finds strings in a text that arrives in parts."""

    def __init__(self, markers: Sequence[str]) -> None:
        known = sorted({m for m in markers if m}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, known)) if known else r"(?!)")
        self.starts = re.compile(f"[{re.escape(''.join(sorted({m[0] for m in known})))}]" if known else r"(?!)")
        self._prefixes = frozenset(m[:i] for m in known for i in range(1, len(m)))
        self._longest = max(map(len, known), default=1) - 1

    def held(self, text: str, start: int) -> int:
        """From where `text` could be the beginning of a marker that goes on in the next part."""
        for at in range(max(start, len(text) - self._longest), len(text)):
            if text[at:] in self._prefixes:
                return at
        return len(text)


VALUE_MARKERS = Markers([before + end for before in ("\n", "") for end in VALUE_ENDS])


class Parser:
    """Takes one answer apart.

    tools: name to JSON schema of the parameters, of the tools that were offered; without any, calls are text.
    thinking: the prompt has opened the reasoning already. one: give out the first call only. dropped: texts of special
    tokens that are not to be seen.
    """

    def __init__(
        self,
        dialect: Dialect,
        tools: Mapping[str, Any] | None = None,
        *,
        thinking: bool = False,
        one: bool = False,
        dropped: Sequence[str] = (),
    ) -> None:
        self.dialect = dialect
        self.tools = tools or {}
        self.one = one
        self.calls = 0  # calls begun
        self.reasoning = thinking  # whether the text is reasoning now
        self._out: list[Piece] = []
        self._buffer = ""
        self._at = 0  # how much of the buffer was read
        self._ended = False
        self._spaces: list[str] = []  # white space that is text only if text follows
        self._lead = thinking  # white space is passed over until text comes
        self._said = False  # whether any text was given out
        self._raw: list[str] | None = None  # what was read of something that may turn out to be text
        self._raw_from = 0
        self._begun = False  # whether the call that is being read was given out
        self._types: dict[str, dict[str, frozenset[str]]] = {}  # of the parameters, by tool
        self._waiting: Markers | None = None  # between markers, with nothing held back
        stray = [marker for marker in dialect.end if marker.strip("`")]  # a fence may be text like any other
        begin = (*dialect.begin, *stray, *dialect.around) if self.tools else ()
        ends = dialect.begin if self.tools and not dialect.drafts else ()
        self._dropped = frozenset(dropped) - set(dialect.markers)
        self._in_text = Markers([*(dialect.think or ()), *begin, *self._dropped])
        self._in_reasoning = Markers([*(dialect.think or ()), *ends, *self._dropped])
        self._steps = self._answer()

    def feed(self, text: str) -> list[Piece]:
        """What more text brings."""
        if not text:
            return NONE
        waiting = self._waiting
        if waiting is not None and not text[-1].isspace() and not waiting.starts.search(text):
            return [Reasoning(text)] if self.reasoning else [Text(text)]
        return self._go(text)

    def end(self) -> list[Piece]:
        """What was held back. The text is over."""
        self._ended = True
        return self._go("")

    def _go(self, text: str) -> list[Piece]:
        if self._raw is not None:
            self._raw.append(self._buffer[self._raw_from : self._at])
            self._raw_from = 0
        self._buffer = self._buffer[self._at :] + text
        self._at = 0
        self._waiting = None
        next(self._steps, None)
        out, self._out = self._out, []
        return out

    # What is given out

    def _give(self, text: str) -> None:
        """Text or reasoning, its white space held back as long as it may turn out to mean nothing."""
        if self._lead:
            text = text.lstrip()
        if not text:
            return
        space = ""
        if self.dialect.trim or self.reasoning or (not self._said and text.isspace()):
            shown = text.rstrip()
            if not shown:
                self._spaces.append(text)
                return
            space, text = text[len(shown) :], shown
        self._lead = False
        self._said = True
        text = "".join(self._spaces) + text
        self._spaces = [space] if space else []
        self._out.append(Reasoning(text) if self.reasoning else Text(text))

    def _begin(self, name: str) -> None:
        self._begun = True
        self._raw = None
        self.calls += 1
        if not self._muted:
            self._out.append(CallBegin(self.calls - 1, self._id(), _whole(name)))

    def _argue(self, text: str) -> None:
        if text and not self._muted:
            self._out.append(CallArguments(self.calls - 1, _whole(text)))

    @property
    def _muted(self) -> bool:
        return self.one and self.calls > 1

    def _id(self) -> str:
        length = self.dialect.id_length
        return secrets.token_hex(length)[:length] if length else f"call_{secrets.token_hex(12)}"

    # The answer as a whole

    def _answer(self) -> Steps:
        if self.reasoning:
            yield from self._reason()
        while True:
            if self.dialect.bare and self.tools and not self._said:
                yield from self._bare()
            marker = yield from self._until(self._in_text)
            if not marker:
                break
            if self.dialect.think and marker == self.dialect.think[0] and not self._said and not self.calls:
                self._spaces.clear()
                yield from self._reason()
            elif self.tools and marker in self.dialect.begin:
                yield from self._section(marker)
            elif not self._meaningless(marker):
                self._give(marker)
        if self._spaces and not self.calls and not self._lead:
            self._out.append(Text("".join(self._spaces)))

    def _meaningless(self, marker: str) -> bool:
        known = marker in self.dialect.around or marker in self._dropped
        return known or (marker in self.dialect.end and self.calls > 0)

    def _until(self, markers: Markers) -> Steps:
        """Gives out text up to the next marker, which it returns; "" at the end."""
        while True:
            found = markers.pattern.search(self._buffer, self._at)
            if found:
                self._give(self._buffer[self._at : found.start()])
                self._at = found.end()
                return found.group()
            rest = len(self._buffer) if self._ended else markers.held(self._buffer, self._at)
            self._give(self._buffer[self._at : rest])
            self._at = rest
            if self._ended:
                return ""
            if rest == len(self._buffer) and not self._spaces and self._said and not self._lead:
                self._waiting = markers
            yield

    def _reason(self) -> Steps:
        assert self.dialect.think is not None
        opening = self.dialect.think[0]
        self.reasoning = self._lead = True
        said = self._said
        while True:
            marker = yield from self._until(self._in_reasoning)
            if marker in self.dialect.begin:
                yield from self._section(marker)
                if not self.reasoning:
                    break
            elif marker in self._dropped or (marker == opening and self._lead):
                continue  # some models open again what the prompt has opened
            elif marker == opening:
                self._give(marker)
            else:
                break
        self._spaces.clear()
        self.reasoning = False
        self._lead = True
        self._said = said

    # Calls

    def _bare(self) -> Steps:
        """Calls at the start of an answer, without a marker."""
        opening = "[" if Form.PYTHON in self.dialect.forms else "{"
        self._try("")
        while (yield from self._peek()) == opening:
            if not (yield from self._call(self.dialect.forms[0], bare=True)):
                self._untry()
                return
            self._try("")
            if (yield from self._peek()) == ";":
                self._at += 1
        self._untry()

    def _section(self, marker: str) -> Steps:
        """The calls after a marker, and the marker that ends them."""
        self._try(marker)
        form = yield from self._form(marker)
        if form is None or not (yield from self._call(form, marker=marker)):
            if self._ended and form is None and not (yield from self._peek()) and not marker.isalnum():
                self._raw = None  # nothing but a marker
                self._spaces.clear()
            elif not self._begun:
                self._untry()
            elif self.dialect.end:
                yield from self._skip_to_end()
            self._begun = False
            return
        if self.reasoning:
            self._spaces.clear()
            self.reasoning = self._said = False
        yield from self._close(form)
        self._begun = False

    def _form(self, marker: str) -> Steps:
        """In which of the dialect's forms a call goes on; None for none of them."""
        forms = self.dialect.forms
        if marker == "<function=":
            return Form.XML
        c = yield from self._peek()
        if c in ("{", "[") and Form.JSON in forms:
            return Form.JSON
        if c == "<" and Form.XML in forms:
            return Form.XML
        if Form.PYTHON in forms and c:
            return Form.PYTHON
        return Form.NAMED if Form.NAMED in forms and c and WORD.match(c).end() else None  # type: ignore[union-attr]

    def _call(self, form: Form, marker: str = "", bare: bool = False) -> Steps:
        """One call, or a list of them; whether all of it was read."""
        self._begun = False
        if form is Form.JSON:
            return (yield from self._json(bare))
        if form is Form.XML:
            return (yield from self._xml(marker))
        if form is Form.PYTHON:
            return (yield from self._python(bare))
        return (yield from self._named())

    def _close(self, form: Form) -> Steps:
        """What follows a call: more of them, or the end of the section."""
        while True:
            self._try("")
            c = yield from self._peek()
            if (yield from self._literal(self.dialect.end)):
                self._raw = None
            elif form is Form.JSON and c in ("{", "[") and self.dialect.end:
                if not (yield from self._call(form)):
                    if self._begun:
                        yield from self._skip_to_end()
                    self._untry()
                    return
            elif c in ("}", "]", ",", ";"):  # one bracket too many is a common slip
                self._at += 1
                self._raw = None
            else:
                self._untry()
                return

    def _skip_to_end(self) -> Steps:
        """Passes over what is left of a call that turned out broken."""
        markers = Markers((*self.dialect.end, *self.dialect.begin))
        while True:
            found = markers.pattern.search(self._buffer, self._at)
            if found:
                self._at = found.end() if found.group() in self.dialect.end else found.start()
                return
            self._at = len(self._buffer) if self._ended else markers.held(self._buffer, self._at)
            if self._ended:
                return
            yield

    def _try(self, marker: str) -> None:
        """From here on, `_untry` makes text of what was read."""
        self._raw = [marker] if marker else []
        self._raw_from = self._at

    def _untry(self) -> None:
        if self._raw is not None:
            text = "".join(self._raw) + self._buffer[self._raw_from : self._at]
            self._raw = None
            self._give(text)

    # The forms

    def _json(self, bare: bool) -> Steps:
        if self._buffer[self._at] == "{":
            return (yield from self._object(bare))
        self._at += 1
        while True:
            c = yield from self._peek()
            if c == "]":
                self._at += 1
                return self._begun
            if c == "," and self._begun:
                self._at += 1
            elif c != "{" or not (yield from self._object(bare)):
                return False

    def _object(self, bare: bool) -> Steps:
        """{"name": ..., "arguments": ...}, in any order; whether it was a whole call."""
        name: str | None = None
        held: list[str] | None = None  # arguments that came before the name
        begun = False
        self._at += 1
        while (c := (yield from self._peek())) != "}":
            if c == ",":
                self._at += 1
                continue
            key = (yield from self._string()) if c == '"' else None
            if key is None or (bare and key not in CALL_KEYS) or (yield from self._peek()) != ":":
                return False
            self._at += 1
            c = yield from self._peek()
            if key == "name" and name is None and c == '"':
                name = yield from self._string()
                if not name or (bare and name not in self.tools):
                    return False
            elif key in ("arguments", "parameters") and not begun and held is None:
                if c not in ("{", '"', "n", "["):
                    return False
                begun = name is not None
                if begun:
                    self._begin(name or "")
                else:
                    held = []
                if not (yield from self._arguments(c, self._argue if held is None else held.append)):
                    return False
            elif not (yield from self._value(_ignore)):
                return False
        self._at += 1
        if name is None or (bare and not begun and held is None):
            return False
        if not begun:
            self._begin(name)
            self._argue("".join(held) if held else "{}")
        return True

    def _arguments(self, first: str, take: Callable[[str], None]) -> Steps:
        """The value of "arguments": an object as it comes; a string with an object in it, or null, as an object."""
        if first == "{":
            return (yield from self._value(take))
        parts: list[str] = []
        whole = yield from self._value(parts.append)
        if whole:
            take(_as_object("".join(parts)))
        return whole

    def _named(self) -> Steps:
        name = yield from self._word()
        while True:
            marker = yield from self._marker(self.dialect.after_name)
            if (yield from self._peek()) == "{":
                break
            word = (yield from self._word()) if marker else ""
            if not word:
                return False
            if marker != self.dialect.aside:
                name = word
        if not name:
            return False
        self._begin(name)
        return (yield from self._value(self._argue))

    def _marker(self, markers: Sequence[str]) -> Steps:
        yield from self._peek()
        return (yield from self._literal(markers))

    def _xml(self, marker: str) -> Steps:
        if marker != "<function=" and not (yield from self._marker(("<function=",))):
            return False
        name = yield from self._tag()
        if not name:
            return False
        if name not in self._types:
            self._types[name] = parameter_types(self.tools.get(name))
        types = self._types[name]
        self._begin(name)
        separator = "{"
        while True:
            found = yield from self._marker(("<parameter=", "</function>", "</tool_call>"))
            if found != "<parameter=":
                break
            key = yield from self._tag()
            if not key:
                return False
            self._argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            if not (yield from self._parameter(types.get(key, frozenset({"string"})))):
                return False
        if not found:
            return False
        if found == "</tool_call>":
            self._at -= len(found)
        self._argue("{}" if separator == "{" else "}")
        return True

    def _tag(self) -> Steps:
        """The rest of a tag up to its ">"; "" for what is no tag."""
        while True:
            end = self._buffer.find(">", self._at)
            name = self._buffer[self._at : end if end != -1 else len(self._buffer)]
            if "\n" in name or "<" in name or len(name) > 256:
                return ""
            if end != -1:
                self._at = end + 1
                return name.strip()
            if self._ended:
                return ""
            yield

    def _parameter(self, types: frozenset[str]) -> Steps:
        """A value in the words of its own; whether it has an end."""
        if types == {"string"}:
            self._argue('"')
            whole = yield from self._raw_value(lambda text: self._argue(json.dumps(text, ensure_ascii=False)[1:-1]))
            if whole:
                self._argue('"')
            return whole
        parts: list[str] = []
        whole = yield from self._raw_value(parts.append)
        if whole:
            self._argue(typed_value("".join(parts), types))
        return whole

    def _raw_value(self, take: Callable[[str], None]) -> Steps:
        """The text up to the tag that ends a value, without the line breaks next to the tags. A tag within a value is
        told from the end by what follows it.
        """
        if (yield from self._char()) == "\n":
            self._at += 1
            lines = True
        else:
            lines = False
        while True:
            found = VALUE_MARKERS.pattern.search(self._buffer, self._at)
            if found:
                take(self._buffer[self._at : found.start()])
                self._at = found.start()
                size = len(found.group())
                if (yield from self._ends_value(found.group(), lines)):
                    return True
                take(self._buffer[self._at : self._at + size])
                self._at += size
                continue
            rest = len(self._buffer) if self._ended else VALUE_MARKERS.held(self._buffer, self._at)
            take(self._buffer[self._at : rest])
            self._at = rest
            if self._ended:
                return False
            yield

    def _ends_value(self, marker: str, lines: bool) -> Steps:
        """Whether the marker that stands next ends the value; passes over it if it closes the parameter."""
        tag = marker.removeprefix("\n")
        if lines and tag != "</parameter>" and marker == tag:
            return False
        if tag == "<parameter=":
            return True
        follows = AFTER_VALUE if tag == "</parameter>" else AFTER_FUNCTION
        offset = len(marker)
        while True:
            space = SPACE.match(self._buffer, self._at + offset)
            assert space is not None
            rest = self._buffer[space.end() : space.end() + 16]
            if rest and any(rest.startswith(f) for f in follows):
                break
            if rest and not any(f.startswith(rest) for f in follows):
                return False
            if self._ended or space.end() - space.start() > MAX_SPACE:
                break
            yield
        if tag == "</parameter>":
            self._at += offset
        return True

    def _python(self, bare: bool) -> Steps:
        """Calls in Python's own words, read whole before they are understood."""
        parts: list[str] = []
        if not (yield from self._balanced(parts)):
            return False
        found = python_calls("".join(parts))
        if not found or (bare and any(name not in self.tools for name, _ in found)):
            return False
        for name, arguments in found:
            self._begin(name)
            self._argue(arguments)
        return True

    def _balanced(self, parts: list[str]) -> Steps:
        """Gathers text up to where its outermost bracket closes; False at the end of the text."""
        depth, quote = 0, ""
        while True:
            i, end = self._at, len(self._buffer)
            while i < end:
                c = self._buffer[i]
                i += 1
                if quote:
                    if c == "\\" and i == end and not self._ended:
                        i -= 1
                        break
                    i += c == "\\"
                    quote = "" if c == quote else quote
                elif c in "\"'":
                    quote = c
                elif c in "([{":
                    depth += 1
                elif c in ")]}":
                    depth -= 1
                    if depth <= 0:
                        parts.append(self._buffer[self._at : i])
                        self._at = i
                        return True
                elif depth == 0 and c == "`":
                    return False
            i = min(i, end)
            parts.append(self._buffer[self._at : i])
            self._at = i
            if self._ended:
                return False
            yield

    # JSON and words, as they come

    def _value(self, take: Callable[[str], None]) -> Steps:
        """Passes on one JSON value as it comes; False if there is none or it has no end."""
        c = yield from self._peek()
        if c == '"' or (c and c in "{["):
            return (yield from self._nested(take))
        scalar = ""
        while True:
            found = SCALAR.match(self._buffer, self._at)
            assert found is not None
            scalar += found.group()
            self._at = found.end()
            if len(scalar) > 512:
                return False
            if self._at < len(self._buffer) or self._ended:
                take(scalar)
                return bool(scalar) and self._at < len(self._buffer)
            yield

    def _nested(self, take: Callable[[str], None]) -> Steps:
        """A string, list or object, verbatim."""
        depth, inside = 0, False
        while True:
            buffer, i = self._buffer, self._at
            while True:
                found = (IN_STRING if inside else OUTSIDE).search(buffer, i)
                if found is None:
                    i = len(buffer)
                    break
                c = found.group()
                i = found.end()
                if c == "\\":
                    if i == len(buffer):  # what it escapes is yet to come
                        i -= not self._ended
                        break
                    i += 1
                elif c == '"':
                    inside = not inside
                elif c in "<`":
                    take(buffer[self._at : i - 1])
                    self._at = i - 1
                    return False
                else:
                    depth += 1 if c in "{[" else -1
                if depth == 0 and not inside:
                    take(buffer[self._at : i])
                    self._at = i
                    return True
            take(buffer[self._at : i])
            self._at = i
            if self._ended:
                return False
            yield

    def _string(self) -> Steps:
        """A JSON string's content; None for one that is broken."""
        parts: list[str] = []
        if not (yield from self._nested(parts.append)):
            return None
        try:
            return json.loads("".join(parts), strict=False)
        except ValueError:
            return None

    def _word(self) -> Steps:
        word = ""
        while True:
            found = WORD.match(self._buffer, self._at)
            assert found is not None
            word += found.group()
            self._at = found.end()
            if len(word) > 256:
                return ""
            if self._at < len(self._buffer) or self._ended:
                return word
            yield

    def _char(self) -> Steps:
        """The next character; "" at the end."""
        while self._at == len(self._buffer):
            if self._ended:
                return ""
            yield
        return self._buffer[self._at]

    def _peek(self) -> Steps:
        """The next character that is no white space, which is passed over; "" at the end."""
        while True:
            space = SPACE.match(self._buffer, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            yield

    def _literal(self, options: Sequence[str]) -> Steps:
        """The option that stands here, which is passed over; "" for none."""
        longest = max(map(len, options), default=0)
        while options:
            rest = self._buffer[self._at : self._at + longest]
            for option in options:
                if rest.startswith(option):
                    self._at += len(option)
                    return option
            if self._ended or not any(option.startswith(rest) for option in options):
                return ""
            yield
        return ""


def _ignore(text: str) -> None:
    pass


def _whole(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair that stands alone: models escape them, UTF-8 cannot hold
    them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _as_object(value: str) -> str:
    """Arguments that were not written as an object, as one where that is what they mean."""
    if value == "null":
        return "{}"
    try:
        inner = json.loads(value, strict=False)
        return inner if isinstance(inner, str) and isinstance(json.loads(inner), dict) else value
    except (ValueError, RecursionError):
        return value
