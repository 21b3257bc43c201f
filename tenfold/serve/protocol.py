"""What goes over the wire: requests as OpenAI's API has them, the common extensions, and the responses.

Invariant: every request field says what becomes of it, `honoured`, `ignored` or `refused` with a reason;
`docs/api.md` is checked against these models. A name that is not here is refused, so a misspelt field never silently
does nothing.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tenfold.engine.request import SamplingParams
from tenfold.engine.template import SETTINGS
from tenfold.serve.errors import from_validation, invalid

MAX_PROMPTS = 64
MAX_MESSAGES = 2048
MOST = 2**31 - 1  # no count is larger


def honoured(default: Any, help: str, **rules: Any) -> Any:
    """A field that does what the API says."""
    return Field(default, description=help, json_schema_extra={"x-tenfold": "honoured"}, **rules)


def ignored(why: str) -> Any:
    """A field that is accepted and changes nothing; a response names the ignored fields of its request in
    `x-tenfold-ignored`.
    """
    return Field(None, description=why, json_schema_extra={"x-tenfold": "ignored"})


def refused(why: str, *neutral: Any) -> Any:
    """A field whose effect is not offered: any value but null and the `neutral` ones gets a 400 with the reason."""
    return Field(None, description=why, json_schema_extra={"x-tenfold": "refused", "x-tenfold-neutral": list(neutral)})


class Body(BaseModel):
    """Types are taken strictly ("5" is not 5) and NaN and infinity are not numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @classmethod
    def treatment(cls, name: str) -> str:
        """ "honoured", "ignored" or "refused"."""
        return str(_extra(cls, name)["x-tenfold"])

    def ignored(self) -> list[str]:
        """The fields of this request that change nothing."""
        return sorted(name for name in self.model_fields_set if self.treatment(name) == "ignored")

    def check_refused(self) -> None:
        """Raises ApiError (400) for the first field whose effect is not offered."""
        for name in sorted(self.model_fields_set):
            value = getattr(self, name)
            if (
                value is None
                or self.treatment(name) != "refused"
                or value in _extra(type(self), name)["x-tenfold-neutral"]
            ):
                continue
            raise invalid(
                f"{name} is not supported: {type(self).model_fields[name].description}", name, "unsupported_parameter"
            )


def _extra(model: type[BaseModel], name: str) -> dict[str, Any]:
    extra = model.model_fields[name].json_schema_extra
    assert isinstance(extra, dict), f"{name} does not say what becomes of it"
    return extra


B = TypeVar("B", bound=Body)


def parse(model: type[B], body: bytes) -> B:
    """The request in a body. Raises ApiError (400) naming the first wrong field."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    request.check_refused()
    return request


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


# Fields that the engine calls by the same name.
SAME = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "skip_special_tokens"),
)


class Sampling(Body):
    """The fields that chat and text completions share."""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    max_tokens: int | None = honoured(None, "longest answer in tokens", le=MOST)
    temperature: float | None = honoured(None, "0 (greedy) to 100; the model's own where absent, else 1")
    top_p: float | None = honoured(
        None, "keep the most likely tokens that together have this probability; above 0, up to 1"
    )
    n: int | None = honoured(None, "answers to one prompt, 1 to 16")
    stop: str | list[str] | None = honoured(None, "a string or up to 16 that end the answer and are not part of it")
    seed: int | None = honoured(None, "makes sampling reproducible, whatever else the server computes at the same time")
    stream: bool | None = honoured(None, "send the answer as server-sent events while it is made")
    stream_options: StreamOptions | None = honoured(
        None, "include_usage: a last event with the token counts; continuous_usage_stats: counts in every event"
    )
    presence_penalty: float | None = honoured(None, "-2 to 2, taken off the logits of tokens already in the answer")
    frequency_penalty: float | None = honoured(None, "-2 to 2, taken off as often as the token is in the answer")
    logit_bias: dict[int, float] | None = honoured(
        None, "token id to a number from -100 to 100 added to its logit; at most 1024"
    )
    user: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)
    top_k: int | None = honoured(None, "extension: keep this many most likely tokens; 0 keeps all", le=MOST)
    min_p: float | None = honoured(
        None, "extension: drop tokens less likely than this part of the likeliest one's probability"
    )
    repetition_penalty: float | None = honoured(
        None, "extension: above 0, up to 10; 1 is off; divides the logits of tokens seen"
    )
    min_tokens: int | None = honoured(None, "extension: no end before this many tokens", le=MOST)
    ignore_eos: bool | None = honoured(None, "extension: an end token does not end the answer")
    stop_token_ids: list[int] | None = honoured(None, "extension: tokens that end the answer")
    include_stop_str_in_output: bool | None = honoured(None, "extension: keep the stop string in the text")
    skip_special_tokens: bool | None = honoured(
        None, "extension: leave special tokens out of the text; true where absent"
    )
    priority: int | None = honoured(None, "extension: smaller runs first; 0 where absent", ge=-(2**31), lt=2**31)
    cache_salt: str | None = honoured(
        None, "extension: requests with different salts never share cached prefixes", max_length=512
    )

    def sampling(self, base: SamplingParams, **derived: Any) -> SamplingParams:
        """The engine's parameters: `base` with what was given, and `derived`, whose name or meaning differs between the
        endpoints. Not yet checked.
        """
        given = {name: value for name in SAME if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given["stop"] = (*stop, *(text for text in base.stop if text not in stop))
        given["stop_token_ids"] = tuple(self.stop_token_ids or ())
        given["include_stop"] = bool(self.include_stop_str_in_output)
        return replace(base, **given | {name: value for name, value in derived.items() if value is not None})


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


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]] = honoured(
        ..., f"a text, a list of token ids, or up to {MAX_PROMPTS} of either"
    )
    max_tokens: int | None = honoured(
        16, "longest answer in tokens; 16 where absent; 0 computes the prompt only", le=MOST
    )
    echo: bool | None = honoured(None, "begin the answer with the prompt; with logprobs, those of the prompt too")
    logprobs: int | None = honoured(
        None, "give the log-probability of each token and of this many likeliest ones, 0 to 20"
    )
    best_of: int | None = refused("of several answers only all are given; ask with n.", 1)
    suffix: str | None = refused("the models served continue text; they cannot fill a gap before a suffix.", "")

    @field_validator("prompt")
    @classmethod
    def few_prompts(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and not prompt:
            raise ValueError("is an empty list; give a text or at least one token")
        if isinstance(prompt, list) and not isinstance(prompt[0], int) and len(prompt) > MAX_PROMPTS:
            raise ValueError(f"has {len(prompt)} entries; allowed: up to {MAX_PROMPTS} in one request")
        return prompt

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given. Not yet checked. One token is made even where none is asked for, since the prompt
        has to be computed.
        """
        prompt_logprobs = self.logprobs if self.echo else None
        limit = 1 if self.max_tokens == 0 else None
        return self.sampling(base, max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)

    def payer(self) -> str:
        """Whose share of the machine the request counts against."""
        return self.user or ""


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "Usage":
        details = PromptTokensDetails(cached_tokens=cached)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )


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


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tenfold"
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]

    @classmethod
    def of(cls, cards: Iterable[ModelCard]) -> "ModelList":
        return cls(data=list(cards))


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
