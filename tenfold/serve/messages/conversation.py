"""A request of /v1/messages as an `Ask`: content blocks become messages for a chat template.

Invariant: what a message gave out can be sent back as it is; keys that mean nothing to a model are dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tenfold.engine.request import Grammar, SamplingParams
from tenfold.serve import sight
from tenfold.serve.errors import invalid
from tenfold.serve.protocol.messages import RENAMED, Blocks, ClientTool, ConversationFields, InputMessage
from tenfold.serve.protocol.nested import check_type, read
from tenfold.serve.service import Served
from tenfold.serve.settings import ServeConfig
from tenfold.serve.structured import checked_tool, read_tools, schema_grammar
from tenfold.serve.turn import Ask, Choose, Tool

Message = dict[str, Any]

TEXT_ONLY = "This model reads text only."
MODES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}


def ask_of(body: ConversationFields, served: Served, params: SamplingParams) -> Ask:
    """Raises ApiError (400) for content and tools that cannot be."""
    body.check_nested()
    if len(body.messages) > served.settings.max_messages:
        most = served.settings.max_messages
        raise invalid(f"messages has {len(body.messages)} entries; allowed: up to {most} (--max-messages).", "messages")
    tools = read_tools(body.tools or (), _tool, served.settings, "tools")
    conversation = read_messages(body.system, body.messages)
    template = body.template_settings()
    if conversation[-1]["role"] == "assistant":
        _check_prefill(conversation[-1])
        template["continue_final_message"] = True
    return Ask(
        conversation,
        params,
        tools=tools,
        choose=_choose(body, [tool.name for tool in tools]),
        grammar=_format(body, served.settings),
        template=template,
        where="messages",
        fields=type(body).model_fields,
        renamed=RENAMED,
        held_by="output_config.format",
    )


def _check_prefill(last: Message) -> None:
    if "tool_calls" in last:
        raise invalid("messages ends with a tool_use; send its tool_result too.", "messages")
    if not last["content"]:
        raise invalid("messages ends with an assistant message without text; leave it out.", "messages")


def _tool(given: dict[str, Any], settings: ServeConfig, path: str) -> Tool:
    if given.get("type") is not None:
        check_type(given, path, ("custom",), "This server has no tools of its own; describe yours with input_schema.")
    tool = read(ClientTool, given, path)
    schema_grammar(tool.input_schema, settings, f"{path}.input_schema")
    return checked_tool(tool.name, tool.description, tool.input_schema, tool.strict, settings, path)


def _format(body: ConversationFields, settings: ServeConfig) -> Grammar | None:
    """What `output_config.format` holds the answer to."""
    if body.output_config is None or body.output_config.format is None:
        return None
    given = body.output_config.format
    check_type(given, "output_config.format", ("json_schema",), "")
    return schema_grammar(given.get("schema"), settings, "output_config.format.schema")


def _choose(body: ConversationFields, names: Sequence[str]) -> Choose:
    given = body.tool_choice
    if given is None:
        return Choose()
    if given.type in ("any", "tool") and not names:
        raise invalid(f"tool_choice is {given.type!r}, but there are no tools to call.", "tool_choice")
    if given.type == "tool" and given.name not in names:
        raise invalid(f"tool_choice.name is {given.name!r}, which is not in tools.", "tool_choice.name")
    name = given.name or "" if given.type == "tool" else ""
    return Choose(MODES[given.type], name, not given.disable_parallel_tool_use)


def read_messages(system: str | Blocks | None, given: Sequence[InputMessage]) -> list[Message]:
    """A conversation as chat templates read it. What one side says in several messages is one message. Raises ApiError
    (400) that names the place of what cannot be understood.
    """
    found: list[Message] = []
    if system:
        found.append({"role": "system", "content": _plain(system, "system")})
    for i, message in enumerate(given):
        content = message.content
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for j, block in enumerate(blocks):
            _read(message.role, block, f"messages[{i}].content[{j}]", found)
        if not blocks:
            raise invalid(f"messages[{i}].content is empty; give a text or at least one block.", f"messages[{i}]")
    if not found or found[-1]["role"] == "system":
        raise invalid("messages has nothing to answer; end with a message of the user.", "messages")
    return found


def _read(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    readers = READERS[role]
    kind = check_type(block, where, readers, TEXT_ONLY)
    readers[kind](role, block, where, found)


def _text(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    text = _string(block, "text", where)
    _add(role, sight.text(text), found)


def _image(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    source = block.get("source")
    kind = check_type(source if isinstance(source, dict) else {}, f"{where}.source", ("base64", "url"), "")
    assert isinstance(source, dict)
    if kind == "url":
        url = _string(source, "url", f"{where}.source")
    else:
        url = f"data:;base64,{_string(source, 'data', f'{where}.source')}"
    _add(role, sight.picture(url, where), found)


def _add(role: str, part: sight.Part, found: list[Message]) -> None:
    last = found[-1] if found else None
    if last and last["role"] == role and "tool_calls" not in last:
        last["content"] = sight.joined(last["content"], part)
    else:
        found.append({"role": role, "content": sight.content([part])})


def _thinking(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    text = _string(block, "thinking", where)
    if text:
        message = _assistant(found, lambda last: not last["content"] and "tool_calls" not in last)
        message["reasoning_content"] = "\n".join(filter(None, (message.get("reasoning_content"), text)))


def _hidden(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    """Thinking that only another server could read."""


def _tool_use(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.input must be an object.", f"{where}.input", "invalid_type")
    function = {"name": _string(block, "name", where), "arguments": arguments}
    calls = _assistant(found, lambda last: True).setdefault("tool_calls", [])
    calls.append({"id": _string(block, "id", where), "type": "function", "function": function})


def _tool_result(role: str, block: dict[str, Any], where: str, found: list[Message]) -> None:
    text = _plain(block.get("content") or "", f"{where}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    found.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": text})


def _assistant(found: list[Message], fits: Callable[[Message], bool]) -> Message:
    """The last message if it is the assistant's and takes more, else a new one."""
    if not (found and found[-1]["role"] == "assistant" and fits(found[-1])):
        found.append({"role": "assistant", "content": ""})
    return found[-1]


def _plain(content: Any, where: str) -> str:
    """The text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid(f"{where} must be a string or a list of blocks.", where, "invalid_type")
    for i, block in enumerate(content):
        check_type(block, f"{where}[{i}]", ("text",), TEXT_ONLY)
    return "\n".join(_string(block, "text", f"{where}[{i}]") for i, block in enumerate(content))


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name} must be a string.", f"{where}.{name}", "invalid_type")
    return value


Reader = Callable[[str, dict[str, Any], str, list[Message]], None]
READERS: dict[str, dict[str, Reader]] = {
    "user": {"text": _text, "image": _image, "tool_result": _tool_result},
    "system": {"text": _text},
    "assistant": {"text": _text, "thinking": _thinking, "redacted_thinking": _hidden, "tool_use": _tool_use},
}
