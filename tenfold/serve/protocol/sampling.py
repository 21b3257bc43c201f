"""The fields that text is sampled by, shared by chat and text completions, their caps, and the token counts of an
answer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from tenfold.engine.request import SamplingParams, shown
from tenfold.serve.protocol.body import MOST, Body, Terms, honoured, seconds_per_token, seconds_to_first
from tenfold.serve.settings import ServeConfig


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


TOKEN = "^[0-9]{1,9}$"  # how a token is spelt where JSON wants a string
# Fields that the engine calls by the same name.
SAME = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "skip_special_tokens"),
)


# Engine parameter, the setting that caps it, what is allowed, and the test for it. The engine's own bounds are wider.
CAPS: tuple[tuple[str, str, str, Callable[[SamplingParams, int], bool]], ...] = (
    ("n", "max_n", "1 to {}", lambda p, most: 1 <= p.n <= most),
    ("logprobs", "max_logprobs", "0 to {}, or none", lambda p, most: p.logprobs is None or 0 <= p.logprobs <= most),
    (
        "prompt_logprobs",
        "max_logprobs",
        "0 to {}, or none",
        lambda p, most: p.prompt_logprobs is None or 0 <= p.prompt_logprobs <= most,
    ),
    ("stop", "max_stop", "up to {} non-empty strings", lambda p, most: len(p.stop) <= most and all(p.stop)),
)


def check_caps(params: SamplingParams, settings: ServeConfig) -> None:
    """Raises ValueError, beginning with the parameter, for more than this server allows."""
    for name, cap, allowed, holds in CAPS:
        most = getattr(settings, cap)
        if not holds(params, most):
            given = shown(getattr(params, name))
            raise ValueError(f"{name} is {given}; allowed: {allowed.format(most)} (--{cap.replace('_', '-')}).")


class Sampling(Body):
    """The fields that chat and text completions share."""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    max_tokens: int | None = honoured(None, "longest answer in tokens", le=MOST, shows={"minimum": 1})
    temperature: float | None = honoured(
        None, "0 (greedy) to 100; the model's own where absent, else 1", shows={"minimum": 0, "maximum": 100}
    )
    top_p: float | None = honoured(
        None,
        "keep the most likely tokens that together have this probability; above 0, up to 1",
        shows={"exclusiveMinimum": 0, "maximum": 1},
    )
    n: int | None = honoured(None, "answers to one prompt, from 1 to --max-n (16)", shows={"minimum": 1})
    stop: str | list[str] | None = honoured(
        None,
        "a string, or up to --max-stop (16), of 4096 characters in all, which end the answer and are no part of it",
    )
    seed: int | None = honoured(
        None,
        "makes sampling reproducible, whatever else the server computes at the same time",
        shows={"minimum": -(2**63), "maximum": 2**63 - 1},
    )
    stream: bool | None = honoured(None, "send the answer as server-sent events while it is made")
    stream_options: StreamOptions | None = honoured(
        None, "include_usage: a last event with the token counts; continuous_usage_stats: counts in every event"
    )
    presence_penalty: float | None = honoured(
        None, "-2 to 2, taken off the logits of tokens already in the answer", shows={"minimum": -2, "maximum": 2}
    )
    frequency_penalty: float | None = honoured(
        None, "-2 to 2, taken off as often as the token is in the answer", shows={"minimum": -2, "maximum": 2}
    )
    logit_bias: dict[int, float] | None = honoured(
        None,
        "token id to a number from -100 to 100 added to its logit; at most 1024",
        shows={"maxProperties": 1024, "propertyNames": {"pattern": TOKEN}},
    )
    user: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)
    top_k: int | None = honoured(
        None, "extension: keep this many most likely tokens; 0 keeps all", le=MOST, shows={"minimum": 0}
    )
    min_p: float | None = honoured(
        None,
        "extension: drop tokens less likely than this part of the likeliest one's probability",
        shows={"minimum": 0, "maximum": 1},
    )
    repetition_penalty: float | None = honoured(
        None,
        "extension: 0.01 to 10; 1 is off; divides the logits of tokens seen",
        shows={"minimum": 0.01, "maximum": 10},
    )
    min_tokens: int | None = honoured(None, "extension: no end before this many tokens", le=MOST, shows={"minimum": 0})
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
    ttft: float | None = seconds_to_first()
    tpot: float | None = seconds_per_token()

    response_format: dict[str, Any] | None = honoured(
        None, "text, json_object, or json_schema: the answer is held to it, strict or not"
    )
    structured_outputs: dict[str, Any] | None = honoured(
        None,
        "extension: hold the answer to one of json, json_object, regex, choice, grammar (Lark); instead of"
        " response_format",
    )
    guided_json: dict[str, Any] | str | None = honoured(None, "extension: the older form of structured_outputs.json")
    guided_regex: str | None = honoured(None, "extension: the older form of structured_outputs.regex")
    guided_choice: list[str] | None = honoured(None, "extension: the older form of structured_outputs.choice")
    guided_grammar: str | None = honoured(None, "extension: the older form of structured_outputs.grammar")

    def terms(self) -> Terms:
        """On what terms it runs."""
        return Terms(self.priority or 0, self.payer(), self.cache_salt or "", self.ttft or 0.0, self.tpot or 0.0)

    def payer(self) -> str:
        """For whom it is, as far as the client says."""
        return self.user or ""

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
