"""Conversations with tools, made into what a model's chat template reads.

Invariant: a template that reads tools gets them as it was written for; for one that does not, tools, calls and results
are told as plain text, so that every model can be offered tools and every history can be gone on with.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.serve.parse.dialect import HERMES, Dialect, Writing

Message = dict[str, Any]

DESCRIPTION = """You can call functions. Here they are, one JSON object each:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments as JSON between tags, one pair of tags for each call:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
What it returns is told to you between <tool_response> tags. Call no function where none is needed."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. parameters: a JSON schema. strict: arguments are held to it."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False

    def spelt(self) -> dict[str, Any]:
        """As OpenAI and chat templates spell it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Choose:
    """Whether tools are called. mode: "auto", "none", "required" or "named" (`name`). parallel: several."""

    mode: str = "auto"
    name: str = ""
    parallel: bool = True


def shaped(
    messages: Sequence[Message], offered: Sequence[Tool], dialect: Dialect
) -> tuple[list[Message], dict[str, Any]]:
    """The messages, and further keywords for the template."""
    tools = [tool.spelt() for tool in offered]
    shaped = [dict(message) for message in messages]
    if dialect.id_length:
        shaped = [_short_ids(message, dialect.id_length) for message in shaped]
    if dialect.described:
        shaped = _told(shaped)
        return (_with_system(shaped, _description(tools)) if tools else shaped), {}
    if tools and dialect.in_system:
        return _with_tools_field(shaped, tools), {}
    return shaped, {"tools": tools} if tools else {}


def written(writing: Writing, name: str) -> str:
    """How a call of `name` begins; the name is JSON where JSON stands around it."""
    return writing.opening % (json.dumps(name, ensure_ascii=False) if '"name": %s' in writing.opening else name)


def _description(tools: Sequence[Mapping[str, Any]]) -> str:
    return DESCRIPTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0].get("role") == "system":
        first = messages[0]
        return [first | {"content": f"{first['content']}\n\n{text}" if first["content"] else text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _with_tools_field(messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    field = {"tools": json.dumps([tool["function"] for tool in tools], ensure_ascii=False)}
    if messages and messages[0].get("role") == "system":
        return [messages[0] | field, *messages[1:]]
    return [{"role": "system", "content": "", **field}, *messages]


def _told(messages: list[Message]) -> list[Message]:
    """Calls and results as text; results that follow each other become one message of the user."""
    told: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if told and told[-1].get("results"):
                told[-1]["content"] += f"\n{text}"
            else:
                told.append({"role": "user", "content": text, "results": True})
        else:
            told.append(_calls_told(message))
    return [{key: value for key, value in message.items() if key != "results"} for message in told]


def _calls_told(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    assert HERMES.writing is not None
    lines = [message["content"]] if message.get("content") else []
    for call in calls:
        function = call["function"]
        arguments = function.get("arguments") or "{}"
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        lines.append(written(HERMES.writing, function["name"]) + text + HERMES.writing.closing)
    return {"role": message["role"], "content": "\n".join(lines)}


def _short_ids(message: Message, length: int) -> Message:
    """Ids in the one form that the template accepts; others keep belonging together."""
    if message.get("tool_calls"):
        calls = [call | {"id": _short(call.get("id"), length)} for call in message["tool_calls"]]
        message = message | {"tool_calls": calls}
    if "tool_call_id" in message:
        message = message | {"tool_call_id": _short(message["tool_call_id"], length)}
    return message


def _short(id: Any, length: int) -> str:
    text = str(id)
    if len(text) == length and text.isalnum():
        return text
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:length]
