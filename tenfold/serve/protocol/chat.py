"""POST /v1/chat/completions: its request and its response."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tenfold.engine.request import SamplingParams
from tenfold.engine.template import SETTINGS
from tenfold.serve.errors import invalid
from tenfold.serve.protocol.body import MOST, honoured, ignored, refused
from tenfold.serve.protocol.sampling import Sampling, Usage

MAX_MESSAGES = 2048
NO_TOOLS = "tool calls are not parsed yet, so a tool could never be called."
TEXT_ONLY = "the answer is text."


class Message(BaseModel):
    """One turn of a chat. Unknown keys are dropped: clients send back messages with whatever a server once put
    there.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """The message for a chat template: text parts joined by newlines, "developer" as "system", "function" as
        "tool".

        Raises ApiError for a part that is not text, or a message without any content."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self._text(place)}
        for key in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        return message

    def _text(self, place: int) -> str:
        if self.content is None:
            if self.role == "assistant":
                return ""
            raise invalid(
                f"messages[{place}].content is required for the role {self.role}.", f"messages[{place}].content"
            )
        if isinstance(self.content, str):
            return self.content
        return "\n".join(_part_text(part, f"messages[{place}].content[{i}]") for i, part in enumerate(self.content))


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise invalid(
            f"{where} has the type {str(kind)[:64]!r}; this model reads parts of type 'text' only.",
            where,
            "unsupported_content",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise invalid(f"{where}.{kind} must be a string.", where, "invalid_type")
    return text


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: list[Message] = honoured(..., "the conversation; content is text", min_length=1, max_length=MAX_MESSAGES)
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
    tools: list[Any] | None = refused(NO_TOOLS, [])
    tool_choice: Any = refused(NO_TOOLS, "none", "auto")
    functions: list[Any] | None = refused(NO_TOOLS, [])
    function_call: Any = refused(NO_TOOLS, "none", "auto")
    response_format: dict[str, Any] | None = refused("answers cannot be held to a format yet.", {"type": "text"})
    modalities: list[str] | None = refused(TEXT_ONLY, ["text"])
    audio: Any = refused(TEXT_ONLY)
    web_search_options: Any = refused("there is no web search in this server.")
    moderation: Any = refused("there is no moderation model in this server.")
    parallel_tool_calls: bool | None = ignored("there are no tool calls to make in parallel.")
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
        return given

    def payer(self) -> str:
        """Whose share of the machine the request counts against."""
        return self.safety_identifier or self.user or ""


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
