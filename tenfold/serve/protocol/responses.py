"""POST /v1/responses and its kin: requests as OpenAI's clients send them, and the response as they read it.

Items and events are built by hand (`serve/responses/`); the models here describe them.
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from tenfold.engine.request import SamplingParams
from tenfold.engine.template import SETTINGS
from tenfold.serve.errors import invalid
from tenfold.serve.protocol.body import (
    MOST,
    Body,
    Terms,
    honoured,
    ignored,
    refused,
    seconds_per_token,
    seconds_to_first,
)
from tenfold.serve.protocol.nested import check_refused

Items = list[dict[str, Any]]

CACHES = "prompts that start alike share the cache by themselves."
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    *(LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results"),
    *("web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url"),
    "code_interpreter_call.outputs",
)
REFUSED_ASYNC: dict[str, Any] = {"x-tenfold": "refused", "x-tenfold-neutral": [False]}
# What a template is told for `reasoning.context`.
CONTEXT: dict[str, dict[str, Any]] = {
    "auto": {},
    "current_turn": {"preserve_thinking": False, "clear_thinking": True},
    "all_turns": {"preserve_thinking": True, "clear_thinking": False},
}


class CacheOptions(Body):
    prewarm: bool | None = refused("a prompt is computed when its answer is made.", False)
    mode: str | None = ignored(CACHES)
    ttl: str | None = ignored("cached prompts stay until their memory is needed.")
    comparison_response_id: str | None = ignored("usage.input_tokens_details tells what was found in the cache.")


class ResponsesStreamOptions(Body):
    include_obfuscation: bool | None = ignored("events are never padded.")


class ReasoningOptions(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = honoured(
        None, "given to the chat template, for models that read it; none asks it for no reasoning"
    )
    context: Literal["auto", "current_turn", "all_turns"] | None = honoured(
        None, "whether the template shows the model its reasoning of earlier turns, for templates that can"
    )
    summary: Literal["auto", "concise", "detailed"] | None = ignored("the reasoning itself is given, not a summary.")
    generate_summary: Literal["auto", "concise", "detailed"] | None = ignored("as summary.")
    mode: str | None = refused("there is one way of reasoning.", "standard")

    def template_settings(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort: dict[str, Any] = {"reasoning_effort": self.effort} if self.effort else {}
        if self.effort == "none":
            effort["enable_thinking"] = False
        return effort | CONTEXT[self.context or "auto"]


class TextOptions(Body):
    format: dict[str, Any] | None = honoured(None, "text, json_object or json_schema")
    verbosity: str | None = ignored("the models served have no such control; ask for it in a message.")


class FormatOptions(Body):
    type: Literal["json_schema"] = honoured(..., "json_schema")
    name: str = honoured(..., "what the schema is called")
    schema_: dict[str, Any] = Field(
        alias="schema", description="a JSON schema of the answer", json_schema_extra={"x-tenfold": "honoured"}
    )
    strict: bool | None = ignored("an answer is always held to the schema.")
    description: str | None = ignored("the model is not told of the schema; say in instructions what to write.")


class FunctionTool(Body):
    type: Literal["function"] = honoured(..., "function")
    name: str = honoured(..., "what the model calls it by", min_length=1, max_length=128)
    description: str | None = honoured(None, "what the model is told of it")
    parameters: dict[str, Any] | None = honoured(None, "a JSON schema of its arguments")
    strict: bool | None = honoured(None, "hold the arguments to the schema; false where absent")
    allowed_callers: list[str] | None = refused("only the model itself calls tools.", [], ["direct"])
    defer_loading: bool | None = refused("there is no search for tools.", False)
    async_: bool | None = Field(
        None, alias="async", description="an answer ends with its calls.", json_schema_extra=REFUSED_ASYNC
    )
    output_schema: Any = ignored("what the tool returns is given to the model as it is.")


class AskFields(Body):
    """What /v1/responses and /v1/responses/input_tokens share: everything that ends up in the prompt."""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    instructions: str | None = honoured(None, "the system message; that of an earlier response is not carried over")
    previous_response_id: str | None = honoured(
        None, "a stored response whose conversation goes on", min_length=1, max_length=128
    )
    tools: Items | None = honoured(None, "functions the model may call; tools of other types are refused")
    tool_choice: str | dict[str, Any] | None = honoured(
        None, "auto, none, required, a function, or allowed_tools of functions"
    )
    parallel_tool_calls: bool | None = honoured(None, "several calls in one answer; true where absent")
    text: TextOptions | None = honoured(None, "format: what the answer is held to")
    reasoning: ReasoningOptions | None = honoured(None, "effort and context, for templates that read them")
    truncation: Literal["auto", "disabled"] | None = honoured(
        None, "auto: where the conversation is too long, its oldest turns are left out; disabled: a 400"
    )
    conversation: Any = refused("conversations are not stored here; use previous_response_id.")

    def check_nested(self) -> None:
        """Raises ApiError (400) for what is refused inside a field."""
        for name in sorted(self.model_fields_set):
            if isinstance(nested := getattr(self, name), Body):
                check_refused(nested, name)

    def template_settings(self) -> dict[str, Any]:
        """Variables for the chat template."""
        return self.reasoning.template_settings() if self.reasoning else {}

    def ignored(self) -> list[str]:
        nested = [(name, getattr(self, name)) for name in self.model_fields_set]
        inner = [f"{name}.{field}" for name, body in nested if isinstance(body, Body) for field in body.ignored()]
        return sorted(super().ignored() + inner)


class InputTokensRequest(AskFields):
    """POST /v1/responses/input_tokens"""

    input: str | Items | None = honoured(None, "as in /v1/responses")
    personality: str | None = ignored("the models served have no such control; ask for it in instructions.")


class ResponsesRequest(AskFields):
    """POST /v1/responses"""

    input: str | Items = honoured(..., "a text, or items: messages, reasoning, function calls and their outputs")
    max_output_tokens: int | None = honoured(None, "longest answer in tokens, reasoning counted", le=MOST)
    temperature: float | None = honoured(None, "0 (greedy) to 100; the model's own where absent, else 1")
    top_p: float | None = honoured(
        None, "keep the most likely tokens that together have this probability; above 0, up to 1"
    )
    top_logprobs: int | None = honoured(None, "log-probabilities of so many likeliest tokens at each place, up to 20")
    include: list[str] | None = honoured(
        None, f"{LOGPROBS}: the log-probability of each token of the text; the others ask for what is never left out"
    )
    stream: bool | None = honoured(None, "send the answer as server-sent events while it is made")
    stream_options: ResponsesStreamOptions | None = honoured(None, "nothing in it changes anything here")
    store: bool | None = honoured(
        None, "keep the answer for a while, for previous_response_id and GET; true where absent"
    )
    background: bool | None = honoured(
        None, "answer at once and go on working; read the answer with GET, end it with /cancel"
    )
    metadata: dict[str, str] | None = honoured(None, "up to 16 labels, given back with the response")
    user: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)
    safety_identifier: str | None = honoured(None, "the newer name of user", max_length=512)
    presence_penalty: float | None = honoured(None, "extension: as in chat completions")
    frequency_penalty: float | None = honoured(None, "extension: as in chat completions")
    seed: int | None = honoured(None, "extension: as in chat completions")
    top_k: int | None = honoured(None, "extension: as in chat completions", le=MOST)
    min_p: float | None = honoured(None, "extension: as in chat completions")
    chat_template_kwargs: dict[str, Any] | None = honoured(None, "extension: variables for the model's chat template")
    priority: int | None = honoured(None, "extension: smaller runs first; 0 where absent", ge=-(2**31), lt=2**31)
    cache_salt: str | None = honoured(
        None, "extension: requests with different salts never share cached prefixes", max_length=512
    )
    ttft: float | None = seconds_to_first()
    tpot: float | None = seconds_per_token()
    background_options: Any = refused("work in the background starts at once.", {}, {"completion_window": "soonest"})
    context_management: list[Any] | None = refused("conversations are not compacted; use truncation.", [])
    moderation: Any = refused("there is no moderation model in this server.")
    prompt: Any = refused("prompt templates are not stored here; send instructions and input.")
    client_metadata: Any = ignored("what some clients tell about themselves.")
    access_programs: Any = ignored("there are no such programs here.")
    image: Any = ignored("pictures are shown as the model sees best.")
    max_tool_calls: int | None = ignored("it counts calls of built-in tools; there are none.")
    prompt_cache_key: str | None = ignored(CACHES)
    prompt_cache_options: CacheOptions | None = ignored(CACHES)
    prompt_cache_retention: Any = ignored("cached prompts stay until their memory is needed.")
    service_tier: str | None = ignored("there is one tier; `priority` orders requests.")

    @field_validator("metadata")
    @classmethod
    def small_metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if metadata and (len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items())):
            raise ValueError("allowed: up to 16 labels with names of up to 64 characters and values of up to 512")
        return metadata

    @field_validator("include")
    @classmethod
    def known_includes(cls, include: list[str] | None) -> list[str] | None:
        if unknown := [name for name in include or () if name not in INCLUDABLE]:
            raise ValueError(f"has {unknown[0][:64]!r}; allowed: {', '.join(INCLUDABLE)}")
        return include

    def check_together(self) -> None:
        """Raises ApiError (400) for fields that contradict each other."""
        self.check_nested()
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream to be true.", "stream_options")
        if self.background and self.store is False:
            raise invalid("background needs store to be true: nobody could read the answer otherwise.", "background")

    def params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given. Not yet checked."""
        same = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p")
        given = {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        if self.top_logprobs or LOGPROBS in (self.include or ()):
            given["logprobs"] = self.top_logprobs or 0
        return replace(base, **given)

    def template_settings(self) -> dict[str, Any]:
        """Variables for the chat template. Raises ApiError for one that no template reads."""
        given = self.chat_template_kwargs or {}
        if unknown := sorted(given.keys() - SETTINGS):
            message = f"chat_template_kwargs has {unknown[0][:64]!r}; allowed: {', '.join(sorted(SETTINGS))}."
            raise invalid(message, "chat_template_kwargs")
        return given | super().template_settings()

    def terms(self) -> Terms:
        """On what terms it runs."""
        return Terms(
            self.priority or 0,
            self.safety_identifier or self.user or "",
            self.cache_salt or "",
            self.ttft or 0.0,
            self.tpot or 0.0,
        )


# Engine names of parameters to the request's.
RENAMED = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseBody(BaseModel):
    """What becomes of a request, and what its answer consists of so far."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: Items
    usage: ResponseUsage | None


class ItemList(BaseModel):
    object: Literal["list"]
    data: Items
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int
