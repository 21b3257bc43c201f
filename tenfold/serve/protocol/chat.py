"""POST /v1/chat/completions: its request and its response."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tenfold.engine.request import SamplingParams
from tenfold.engine.template import SETTINGS
from tenfold.serve import sight
from tenfold.serve.conversation import Choose, Tool
from tenfold.serve.errors import invalid
from tenfold.serve.protocol.body import MOST, honoured, ignored, refused
from tenfold.serve.protocol.sampling import Sampling, Usage
from tenfold.serve.settings import ServeConfig
from tenfold.serve.structured import check_allowed, checked_tool, read_tools

TEXT_ONLY = "the answer is text."


class Message(BaseModel):
    """One turn of a chat. Unknown keys are dropped: clients send back messages with whatever a server once put
    there.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """The message for a chat template: text parts joined by newlines, but where the user shows pictures;
        "developer" as "system", "function" as "tool".

        Raises ApiError for a part that is neither, a broken tool call, or a message without any content."""
        where = f"messages[{place}]"
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self._content(where)}
        if self.name is not None:
            message["name"] = self.name
        if self.role == "assistant":
            message |= self._answered(where)
        elif role == "tool":
            message["tool_call_id"] = self.tool_call_id or self.name or ""
        return message

    def _answered(self, where: str) -> dict[str, Any]:
        """What only an assistant says."""
        calls = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls or ())]
        if self.function_call is not None and not calls:
            function = _function(self.function_call, f"{where}.function_call")
            calls = [{"id": function["name"], "type": "function", "function": function}]  # as its result names it
        said: dict[str, Any] = {"tool_calls": calls} if calls else {}
        reasoning = self.reasoning_content or self.reasoning
        return said | ({"reasoning_content": reasoning} if reasoning else {})

    def _content(self, where: str) -> sight.Content:
        if self.content is None:
            if self.role == "assistant":
                return self.refusal or ""
            raise invalid(f"{where}.content is required for the role {self.role}.", f"{where}.content")
        if isinstance(self.content, str):
            return self.content
        pictures = self.role == "user"
        return sight.content([_part(part, f"{where}.content[{i}]", pictures) for i, part in enumerate(self.content)])


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    if call.get("type", "function") != "function":
        raise invalid(f"{where}.type is {str(call.get('type'))[:64]!r}; allowed: function.", f"{where}.type")
    return {"id": str(call.get("id") or ""), "type": "function", "function": _function(call.get("function"), where)}


def _function(function: Any, where: str) -> dict[str, Any]:
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, (str, dict, type(None))):
        raise invalid(f'{where} needs a function: {{"name": a text, "arguments": JSON as a text}}.', where)
    return {"name": name, "arguments": arguments or "{}"}


def _part(part: dict[str, Any], where: str, pictures: bool) -> sight.Part:
    """pictures: whether the message may have some. Their `detail` is as the model sees best, whatever is asked for."""
    kind = part.get("type")
    if kind == "image_url" and pictures:
        image = part.get("image_url")
        return sight.picture(image.get("url") if isinstance(image, dict) else image, f"{where}.image_url")
    if kind not in ("text", "refusal"):
        allowed = "'text', and of users 'image_url' where the model sees"
        raise invalid(
            f"{where} has the type {str(kind)[:64]!r}; allowed: {allowed}.",
            where,
            "unsupported_content",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise invalid(f"{where}.{kind} must be a string.", where, "invalid_type")
    return sight.text(text)


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: list[Message] = honoured(
        ...,
        "the conversation, up to --max-messages; content is text, and pictures (image_url) where the model sees",
        min_length=1,
    )
    max_completion_tokens: int | None = honoured(None, "the newer name of max_tokens", le=MOST)
    logprobs: bool | None = honoured(None, "give the log-probability of each token")
    top_logprobs: int | None = honoured(None, "and of up to 20 likeliest tokens at its place; needs logprobs")
    safety_identifier: str | None = honoured(None, "the newer name of user", max_length=512)
    chat_template_kwargs: dict[str, Any] | None = honoured(None, "extension: variables for the model's chat template")
    reasoning_effort: str | None = honoured(None, "given to the chat template, for models that read it", max_length=64)
    continue_final_message: bool | None = honoured(None, "extension: continue the last message instead of answering it")
    add_generation_prompt: bool | None = honoured(
        None, "extension: end the prompt with the start of an answer; true where absent"
    )
    tools: list[dict[str, Any]] | None = honoured(
        None, "functions the model may call, up to --max-tools; `strict` holds the arguments to the schema"
    )
    tool_choice: str | dict[str, Any] | None = honoured(
        None, "none, auto, required, a function to call, or a part of the tools as allowed_tools; auto where absent"
    )
    parallel_tool_calls: bool | None = honoured(None, "false: at most one call in an answer")
    functions: list[dict[str, Any]] | None = honoured(None, "the older form of tools; the answer has function_call")
    function_call: str | dict[str, Any] | None = honoured(None, "the older form of tool_choice")
    include_reasoning: bool | None = honoured(None, "extension: false leaves out reasoning_content; true where absent")
    reasoning_format: Literal["none", "auto", "deepseek"] | None = honoured(
        None, "extension: none leaves the reasoning in the content, as the model wrote it"
    )
    modalities: list[str] | None = refused(TEXT_ONLY, ["text"])
    audio: Any = refused(TEXT_ONLY)
    web_search_options: Any = refused("there is no web search in this server.")
    moderation: Any = refused("there is no moderation model in this server.")
    prediction: Any = ignored("a hint about speed only; the answer is the same without it.")
    metadata: Any = ignored("labels of stored answers; nothing is stored.")
    store: bool | None = ignored("nothing is stored.")
    service_tier: str | None = ignored("there is one tier; `priority` orders requests.")
    prompt_cache_key: str | None = ignored("prompts that start alike share the cache by themselves.")
    prompt_cache_options: Any = ignored("prompts that start alike share the cache by themselves.")
    prompt_cache_retention: Any = ignored("cached prompts stay until their memory is needed.")
    verbosity: str | None = ignored("the models served have no such control; ask for it in a message.")

    def params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given. Not yet checked. Raises ApiError for fields that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
        logprobs = self.top_logprobs or 0 if self.logprobs else None
        return self.sampling(base, max_tokens=self.max_completion_tokens, logprobs=logprobs)

    def template_settings(self) -> dict[str, Any]:
        """Keywords for the chat template. Raises ApiError for a variable that no template reads."""
        given = dict(self.chat_template_kwargs or {})
        if unknown := sorted(given.keys() - SETTINGS):
            message = f"chat_template_kwargs has {unknown[0][:64]!r}; allowed: {', '.join(sorted(SETTINGS))}."
            raise invalid(message, "chat_template_kwargs")
        for name in ("reasoning_effort", "continue_final_message", "add_generation_prompt"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        if self.reasoning_effort == "none":
            given.setdefault("enable_thinking", False)
        return given

    def plain_messages(self, settings: ServeConfig) -> list[dict[str, Any]]:
        """The conversation for a chat template. Raises ApiError (400)."""
        if len(self.messages) > settings.max_messages:
            message = f"messages has {len(self.messages)} entries; allowed: up to {settings.max_messages}"
            raise invalid(f"{message} (--max-messages).", "messages")
        return [message.plain(i) for i, message in enumerate(self.messages)]

    def reasoning(self) -> str:
        """What becomes of the reasoning: "split", "drop" or "keep"."""
        if self.reasoning_format == "none":
            return "keep"
        return "drop" if self.include_reasoning is False else "split"

    @property
    def legacy(self) -> bool:
        """Whether functions are spelt as they once were."""
        return bool(self.functions) and not self.tools

    def offered(self, settings: ServeConfig) -> tuple[tuple[Tool, ...], Choose]:
        """The tools, and whether they are to be called. Raises ApiError (400)."""
        if self.tools and self.functions:
            raise invalid("functions cannot be combined with tools; give tools only.", "functions")
        if self.legacy:
            tools = read_tools(self.functions or (), _tool, settings, "functions")
            choice, where = _modern(self.function_call), "function_call"
        else:
            tools = read_tools(self.tools or (), _declared, settings, "tools")
            choice, where = self.tool_choice, "tool_choice"
        parallel = self.parallel_tool_calls is not False and not self.legacy
        return _chosen(tools, choice, parallel, where)

    def payer(self) -> str:
        """Whose share of the machine the request counts against."""
        return self.safety_identifier or self.user or ""


def _declared(tool: dict[str, Any], settings: ServeConfig, where: str) -> Tool:
    if tool.get("type", "function") != "function":
        kind = str(tool.get("type"))[:64]
        raise invalid(f"{where}.type is {kind!r}; this server offers tools of type 'function' only.", f"{where}.type")
    return _tool(tool.get("function"), settings, f"{where}.function")


def _tool(function: Any, settings: ServeConfig, where: str) -> Tool:
    if not isinstance(function, dict):
        raise invalid(f'{where} must be an object: {{"name", "description", "parameters"}}.', where)
    get = function.get
    return checked_tool(get("name"), get("description"), get("parameters"), get("strict"), settings, where)


def _modern(choice: Any) -> Any:
    return {"type": "function", "function": choice} if isinstance(choice, dict) else choice


def _chosen(tools: tuple[Tool, ...], choice: Any, parallel: bool, where: str) -> tuple[tuple[Tool, ...], Choose]:
    if choice is None:
        choice = "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(tools, choice.get("allowed_tools"), parallel, where)
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        if choice == "required" and not tools:
            raise invalid(f"{where} is 'required', but there are no tools.", where)
        return tools, Choose(choice, parallel=parallel)
    name = _named(choice)
    if name is None:
        allowed = 'none, auto, required, or {"type": "function", "function": {"name": ...}}'
        raise invalid(f"{where} is {str(choice)[:64]!r}; allowed: {allowed}.", where)
    _check_known(name, tools, where)
    return tools, Choose("named", name, parallel=False)


def _allowed(tools: tuple[Tool, ...], allowed: Any, parallel: bool, where: str) -> tuple[tuple[Tool, ...], Choose]:
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if isinstance(listed, list):
        check_allowed(listed, tools, f"{where}.allowed_tools.tools")
    names = [_named(tool) for tool in listed] if isinstance(listed, list) else []
    if mode not in ("auto", "required") or not names or None in names:
        form = '{"mode": "auto" or "required", "tools": [{"type": "function", "function": {"name": ...}}]}'
        raise invalid(f"{where}.allowed_tools must be {form}.", where)
    for name in names:
        _check_known(name or "", tools, where)
    return tuple(tool for tool in tools if tool.name in names), Choose(mode, parallel=parallel)


def _named(choice: Any) -> str | None:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_known(name: str, tools: tuple[Tool, ...], where: str) -> None:
    if all(tool.name != name for tool in tools):
        known = ", ".join(tool.name for tool in tools) or "none"
        raise invalid(f"{where} names {name[:64]!r}, which is not among the tools: {known[:256]}.", where)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """tool_calls, function_call and reasoning_content are there only where the model made them."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class ChatUsage(Usage):
    completion_tokens_details: CompletionTokensDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ChatUsage
