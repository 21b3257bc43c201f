"""POST /v1/messages and /v1/messages/count_tokens: requests as Anthropic's clients send them, and the message as they
read it.
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tenfold.engine.request import SamplingParams
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

Blocks = list[dict[str, Any]]

CACHES = "prompts that start alike share the cache by themselves."
ONE_TIER = "there is one tier; `priority` orders requests."
NO_FALLBACK = "there is no other model to fall back to."
NO_SERVERS = "this server calls no other servers."
NO_COMPACTION = "conversations are not shortened here."
# What a template is told for `thinking`. Where absent, and for adaptive, the model's own way stands.
THINKING: dict[str, dict[str, Any]] = {
    "enabled": {"enable_thinking": True, "thinking": True},
    "disabled": {"enable_thinking": False, "thinking": False},
}


class InputMessage(BaseModel):
    """One turn of a conversation. Unknown keys are dropped, as those a client adds to what it received."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class ThinkingOptions(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = honoured(
        ..., "enabled or disabled: told to the chat template, for models that can do both; else as the model does"
    )
    display: Literal["summarized", "omitted"] | None = honoured(
        None, "omitted: thinking blocks come without their text; summarized: with all of it"
    )
    budget_tokens: int | None = ignored("a model thinks as long as it does; max_tokens bounds it.")


class OutputOptions(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = honoured(
        None, "given to the chat template, for models that read it"
    )
    format: dict[str, Any] | None = honoured(None, "json_schema: what the answer is held to")
    task_budget: Any = refused("answers are not planned by a budget; use max_tokens.")


class MetadataOptions(Body):
    user_id: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"] = honoured(..., "whether tools are called")
    name: str | None = honoured(None, "of the tool, with type tool", max_length=128)
    disable_parallel_tool_use: bool | None = honoured(None, "at most one call")


class ClientTool(Body):
    type: Literal["custom"] | None = honoured(None, "custom")
    name: str = honoured(..., "what the model calls it by", min_length=1, max_length=128)
    description: str | None = honoured(None, "what the model is told of it")
    input_schema: dict[str, Any] = honoured(..., "a JSON schema of its input")
    strict: bool | None = honoured(None, "hold the input to the schema; false where absent")
    allowed_callers: list[str] | None = refused("only the model itself calls tools.", [], ["direct"])
    defer_loading: bool | None = refused("there is no search for tools.", False)
    cache_control: Any = ignored(CACHES)
    eager_input_streaming: bool | None = ignored("input is streamed as it is made.")
    input_examples: Any = ignored("chat templates have no place for them; put them into the description.")


class ConversationFields(Body):
    """What /v1/messages and its count_tokens share: everything that ends up in the prompt."""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    messages: list[InputMessage] = honoured(
        ..., "the conversation; where its last message is the assistant's, the answer goes on from it", min_length=1
    )
    system: str | Blocks | None = honoured(None, "the system message: a text or text blocks")
    tools: Blocks | None = honoured(None, "tools the model may call; tools that Anthropic's servers run are refused")
    tool_choice: ToolChoice | None = honoured(None, "auto, any, tool or none; disable_parallel_tool_use")
    thinking: ThinkingOptions | None = honoured(None, "whether a model that can do both thinks first")
    output_config: OutputOptions | None = honoured(None, "effort, and a format that the answer is held to")
    mcp_servers: list[Any] | None = refused(NO_SERVERS, [])
    context_management: Any = ignored("a prompt has all messages; the chat template leaves out what it does not show.")
    compaction: Any = refused(NO_COMPACTION)
    billing_policy: Any = ignored("nothing is billed.")
    cache_control: Any = ignored(CACHES)
    speed: str | None = ignored(ONE_TIER)
    user_profile_id: str | None = ignored("there are no such profiles here.")
    workspace_id: str | None = ignored("there are no workspaces here.")

    def check_nested(self) -> None:
        """Raises ApiError (400) for what is refused inside a field."""
        for name in self.model_fields_set:
            if isinstance(nested := getattr(self, name), Body):
                check_refused(nested, name)

    def ignored(self) -> list[str]:
        nested = [(name, getattr(self, name)) for name in self.model_fields_set]
        inner = [f"{name}.{field}" for name, body in nested if isinstance(body, Body) for field in body.ignored()]
        return sorted(super().ignored() + inner)

    def template_settings(self) -> dict[str, Any]:
        """Variables for the chat template."""
        settings = dict(THINKING.get(self.thinking.type, {})) if self.thinking else {}
        if self.output_config and self.output_config.effort:
            settings["reasoning_effort"] = self.output_config.effort
        return settings


class CountTokensRequest(ConversationFields):
    """POST /v1/messages/count_tokens"""


class MessagesRequest(ConversationFields):
    """POST /v1/messages"""

    max_tokens: int = honoured(..., "longest answer in tokens, thinking counted", le=MOST)
    stop_sequences: list[str] | None = honoured(
        None, "up to --max-stop (16) strings, of 4096 characters in all, that end the answer and are not part of it"
    )
    stream: bool | None = honoured(None, "send the answer as server-sent events while it is made")
    temperature: float | None = honoured(None, "0 (greedy) to 100; the model's own where absent, else 1")
    top_p: float | None = honoured(
        None, "keep the most likely tokens that together have this probability; above 0, up to 1"
    )
    top_k: int | None = honoured(None, "keep this many most likely tokens; 0 keeps all", le=MOST)
    metadata: MetadataOptions | None = honoured(None, "user_id: whose share of the machine this counts against")
    priority: int | None = honoured(None, "extension: smaller runs first; 0 where absent", ge=-(2**31), lt=2**31)
    cache_salt: str | None = honoured(
        None, "extension: requests with different salts never share cached prefixes", max_length=512
    )
    ttft: float | None = seconds_to_first()
    tpot: float | None = seconds_per_token()
    container: Any = refused("there are no containers here.")
    thread: Any = refused("conversations are not stored here; send all messages.")
    fallbacks: Any = refused(NO_FALLBACK, [])
    fallback_credit_token: Any = ignored(NO_FALLBACK)
    diagnostics: Any = ignored("usage.cache_read_input_tokens tells what was found in the cache.")
    inference_geo: str | None = ignored("the model runs where this server is.")
    service_tier: str | None = ignored(ONE_TIER)

    def params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given. Not yet checked."""
        same = ("max_tokens", "temperature", "top_p", "top_k")
        given = {name: value for name in same if (value := getattr(self, name)) is not None}
        stop = tuple(self.stop_sequences or ())
        given["stop"] = (*stop, *(text for text in base.stop if text not in stop))
        return replace(base, **given)

    def terms(self) -> Terms:
        """On what terms it runs."""
        user = (self.metadata and self.metadata.user_id) or ""
        return Terms(self.priority or 0, user, self.cache_salt or "", self.ttft or 0.0, self.tpot or 0.0)


# Engine names of parameters to the request's.
RENAMED = {"stop": "stop_sequences"}


class MessageUsage(BaseModel):
    """Tokens of the prompt are the sum of input_tokens and both counts of the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]
    service_tier: Literal["standard"]


class MessageBody(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: Blocks
    stop_reason: Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class TokensCount(BaseModel):
    input_tokens: int


class MessagesError(BaseModel):
    type: Literal["error"]
    error: dict[str, str]
    request_id: str
