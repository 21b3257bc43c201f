"""Items of /v1/responses: what clients send becomes items with ids, and items become messages for a chat template.

Invariant: what a response gave out can be sent back as it is; keys that mean nothing to a model are dropped.
"""

from collections.abc import Callable, Iterable
from typing import Any

from tenfold.serve import sight
from tenfold.serve.errors import ApiError, invalid

Item = dict[str, Any]
Finder = Callable[[str], Item | None]  # the item of an id, among those that were stored

TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}


def read_input(given: str | list[Item], answer: str, find: Finder) -> list[Item]:
    """A request's `input` as items, each with an id made of the hex digits `answer`, unless it came with one. Raises
    ApiError (400) that names the place of what cannot be understood.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise invalid("input is empty; give a text or at least one item.", "input")
    return [_read(item, f"input[{i}]", f"{answer}_i{i}", find) for i, item in enumerate(given)]


def _read(item: Item, where: str, mark: str, find: Finder) -> Item:
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference"
    if kind == "item_reference":
        return _referred(item, where, find)
    if not isinstance(kind, str) or kind not in READERS:
        message = (
            f"{where} has the type {str(kind)[:64]!r}; allowed: {', '.join(READERS)}, item_reference. This server has "
            "no tools of its own, so it has no items of such either."
        )
        raise invalid(message, where, "unsupported_content")
    read, prefix = READERS[kind]
    found = read(item, where)
    id = _string(item, "id", where, "")
    return {"id": id or f"{prefix}_{mark}", "type": kind} | found


def _referred(item: Item, where: str, find: Finder) -> Item:
    id = _string(item, "id", where)
    found = find(id)
    if found is None:
        raise ApiError(
            404,
            f"{where} refers to the item {id[:128]!r}, which is not stored here. Send the item itself.",
            param=where,
            code="item_not_found",
        )
    return found


def _message(item: Item, where: str) -> Item:
    role = _string(item, "role", where)
    if role not in ROLES:
        raise invalid(f"{where}.role is {role[:64]!r}; allowed: {', '.join(ROLES)}.", f"{where}.role")
    content = item.get("content")
    if role == "user" and isinstance(content, list):
        parts = [_input_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        return {"role": role, "status": "completed", "content": parts}
    text = _content(content, f"{where}.content")
    if role == "assistant":
        parts = [{"type": "output_text", "text": part, "annotations": []} for part in text]
    else:
        parts = [{"type": "input_text", "text": part} for part in text]
    return {"role": role, "status": "completed", "content": parts}


def _input_part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") != "input_image":
        return {"type": "input_text", "text": _part(part, where)}
    if part.get("image_url") is None:
        raise invalid(f"{where} needs image_url; files are not stored here, so there is none of any file_id.", where)
    detail = _string(part, "detail", where, "auto")
    return {"type": "input_image", "image_url": _string(part, "image_url", where), "detail": detail}


def _content(content: Any, where: str) -> list[str]:
    """The texts of a message."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise invalid(f"{where} must be a string or a list of parts.", where, "invalid_type")
    return [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        message = f"{where} has the type {str(kind)[:64]!r}; this model reads text only: {', '.join(TEXT_PARTS)}."
        raise invalid(message, where, "unsupported_content")
    return _string(part, TEXT_PARTS[kind], where)


def _call(item: Item, where: str) -> Item:
    names = ("call_id", "name", "arguments")
    return {name: _string(item, name, where) for name in names} | {"status": "completed"}


def _call_output(item: Item, where: str) -> Item:
    output = _content(item.get("output"), f"{where}.output")
    return {"call_id": _string(item, "call_id", where), "output": "\n".join(output), "status": "completed"}


def _reasoning(item: Item, where: str) -> Item:
    found: Item = {}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise invalid(f"{where}.{name} must be a list of parts.", f"{where}.{name}", "invalid_type")
        texts = [_string(part, "text", f"{where}.{name}[{i}]") for i, part in enumerate(parts)]
        found[name] = [{"type": kind, "text": text} for text in texts]
    return found


def _string(item: Item, name: str, where: str, default: str | None = None) -> str:
    value = item.get(name)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise invalid(f"{where}.{name} must be a string.", f"{where}.{name}", "invalid_type")
    return value


READERS: dict[str, tuple[Callable[[Item, str], Item], str]] = {
    "message": (_message, "msg"),
    "function_call": (_call, "fc"),
    "function_call_output": (_call_output, "fco"),
    "reasoning": (_reasoning, "rs"),
}


def messages(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """A conversation as chat templates read it. System messages at its beginning become one, since many templates know
    only one; what an assistant thought, said and called in one go is one message.
    """
    found: list[dict[str, Any]] = []
    if instructions:
        found.append({"role": "system", "content": instructions})
    for item in items:
        WRITERS[item["type"]](item, found)
    return found


def _write_message(item: Item, found: list[dict[str, Any]]) -> None:
    role = ROLES[item["role"]]
    if role == "user":
        found.append({"role": role, "content": sight.content([_shown(part) for part in item["content"]])})
        return
    text = "\n".join(part["text"] for part in item["content"])
    if role == "system" and len(found) == 1 and found[0]["role"] == "system":
        found[0]["content"] += "\n\n" + text
    elif role == "assistant":
        message = _assistant(found, lambda last: "tool_calls" not in last)
        message["content"] = "\n".join(filter(None, (message["content"], text)))
    else:
        found.append({"role": role, "content": text})


def _shown(part: dict[str, Any]) -> sight.Part:
    if part["type"] == "input_image":
        return sight.picture(part["image_url"], "input")
    return sight.text(part["text"])


def _write_reasoning(item: Item, found: list[dict[str, Any]]) -> None:
    text = "\n".join(part["text"] for part in item["content"] or item["summary"])
    if text:
        message = _assistant(found, lambda last: not last["content"] and "tool_calls" not in last)
        message["reasoning_content"] = "\n".join(filter(None, (message.get("reasoning_content"), text)))


def _write_call(item: Item, found: list[dict[str, Any]]) -> None:
    function = {"name": item["name"], "arguments": item["arguments"]}
    calls = _assistant(found, lambda last: True).setdefault("tool_calls", [])
    calls.append({"id": item["call_id"], "type": "function", "function": function})


def _write_output(item: Item, found: list[dict[str, Any]]) -> None:
    found.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})


def _assistant(found: list[dict[str, Any]], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The last message if it is the assistant's and takes more, else a new one."""
    if not (found and found[-1]["role"] == "assistant" and fits(found[-1])):
        found.append({"role": "assistant", "content": ""})
    return found[-1]


WRITERS: dict[str, Callable[[Item, list[dict[str, Any]]], None]] = {
    "message": _write_message,
    "reasoning": _write_reasoning,
    "function_call": _write_call,
    "function_call_output": _write_output,
}


def without_oldest(conversation: list[dict[str, Any]], turns: int) -> list[dict[str, Any]]:
    """The conversation without its first `turns` turns; a turn begins with the user's message. System messages stay."""
    begins = turn_starts(conversation)
    first = begins[turns]
    return [message for i, message in enumerate(conversation) if i >= first or message["role"] == "system"]


def turn_starts(conversation: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(conversation) if message["role"] == "user"]
