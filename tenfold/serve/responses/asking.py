"""A request of /v1/responses as an `Ask`: its conversation, tools, and what holds the answer to a format."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from tenfold.engine.request import Grammar, SamplingParams
from tenfold.serve.errors import ApiError, invalid
from tenfold.serve.protocol.body import Terms
from tenfold.serve.protocol.nested import check_type, read
from tenfold.serve.protocol.responses import RENAMED, AskFields, FormatOptions, FunctionTool, Items
from tenfold.serve.responses.items import messages, turn_starts, without_oldest
from tenfold.serve.service import Served
from tenfold.serve.settings import ServeConfig
from tenfold.serve.structured import (
    check_allowed,
    check_name,
    checked_tool,
    read_tools,
    response_format,
    schema_grammar,
)
from tenfold.serve.turn import Ask, Choose, Tool, Turn, open_turn

NO_BUILT_IN = "This server has no tools of its own; functions are called by whoever sent the request."
MODES = ("auto", "none", "required")


def ask_of(body: AskFields, served: Served, items: Items, params: SamplingParams) -> Ask:
    """Raises ApiError (400) for tools and formats that cannot be."""
    tools = read_tools(body.tools or [], _tool, served.settings, "tools")
    choose, allowed = _choose(body, [tool.name for tool in tools])
    conversation = messages(body.instructions, items)
    if not conversation:
        raise invalid("input has nothing to answer; give a text or a message.", "input")
    return Ask(
        conversation,
        params,
        tools=tuple(tool for tool in tools if tool.name in allowed),
        choose=choose,
        grammar=_format(body, served.settings),
        template=body.template_settings(),
        where="input",
        fields=type(body).model_fields,
        renamed=RENAMED,
        held_by="text.format",
    )


def _tool(given: dict[str, Any], settings: ServeConfig, path: str) -> Tool:
    check_type(given, path, ("function",), NO_BUILT_IN)
    tool = read(FunctionTool, given, path)
    return checked_tool(tool.name, tool.description, tool.parameters, tool.strict, settings, path)


def _format(body: AskFields, settings: ServeConfig) -> Grammar | None:
    """What `text.format` holds the answer to."""
    given = body.text and body.text.format
    if not given:
        return None
    if check_type(given, "text.format", ("text", "json_object", "json_schema"), "") != "json_schema":
        return response_format(given, settings, "text.format")
    wanted = read(FormatOptions, given, "text.format")
    check_name(wanted.name, "text.format.name")
    return schema_grammar(wanted.schema_, settings, "text.format.schema")


def _choose(body: AskFields, names: Sequence[str]) -> tuple[Choose, Sequence[str]]:
    """Whether tools are called, and which of them may be."""
    parallel = body.parallel_tool_calls is not False
    given = "auto" if body.tool_choice is None else body.tool_choice
    if isinstance(given, str):
        return Choose(_mode(given, "tool_choice", MODES, names), parallel=parallel), names
    if check_type(given, "tool_choice", ("function", "allowed_tools"), NO_BUILT_IN) == "function":
        return Choose("named", _known(given, "tool_choice", names), parallel), names
    mode = _mode(given.get("mode"), "tool_choice.mode", ("auto", "required"), names)
    allowed = given.get("tools")
    if isinstance(allowed, list):
        check_allowed(allowed, names, "tool_choice.tools")
    if not isinstance(allowed, list) or not allowed or not all(isinstance(tool, dict) for tool in allowed):
        raise invalid("tool_choice.tools must be a list of functions.", "tool_choice.tools", "invalid_type")
    places = [(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(allowed)]
    for tool, path in places:
        check_type(tool, path, ("function",), NO_BUILT_IN)
    return Choose(mode, parallel=parallel), [_known(tool, path, names) for tool, path in places]


def _mode(mode: Any, path: str, allowed: Sequence[str], names: Sequence[str]) -> str:
    if not isinstance(mode, str) or mode not in allowed:
        raise invalid(f"{path} is {str(mode)[:64]!r}; allowed: {', '.join(allowed)}.", path)
    if mode == "required" and not names:
        raise invalid(f"{path} is 'required', but there are no tools to call.", path)
    return mode


def _known(tool: dict[str, Any], path: str, names: Sequence[str]) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or name not in names:
        raise invalid(f"{path}.name is {str(name)[:64]!r}, which is not in tools.", f"{path}.name")
    return name


async def open_fitting(http: Request, served: Served, ask: Ask, prefix: str, terms: Terms, auto: bool) -> Turn:
    """A turn for `ask`. auto: where the conversation is too long, without as few of its oldest turns as will do. Raises
    ApiError (400).
    """
    try:
        return await open_turn(http, served, ask, prefix, terms)
    except ApiError as error:
        most = len(turn_starts(ask.messages)) - 1
        if not auto or error.code != "context_length_exceeded" or most < 1:
            raise
    turn = await open_turn(http, served, shortened(ask, most), prefix, terms)
    low, high = 1, most  # leaving out `high` turns fits
    while low < high:
        middle = (low + high) // 2
        try:
            turn = await open_turn(http, served, shortened(ask, middle), prefix, terms)
            high = middle
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    return turn


def shortened(ask: Ask, turns: int) -> Ask:
    return replace(ask, messages=without_oldest(ask.messages, turns))
