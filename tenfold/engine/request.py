"""The vocabulary of the engine: what a user asks (`Request`), how to sample (`SamplingParams`), what comes back (`Output`)."""

import math
import time
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(str, Enum):
    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # cancelled by the user, or past its deadline
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into tokens. Field names and meanings are those of the OpenAI API and of vLLM.

    Raises ValueError from `check()` with the field, what was given and what is allowed.
    """

    max_tokens: int | None = None  # None: until the context ends
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None  # None: none; k: the sampled token and the k best
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # keep the stop string in the text
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def check(self, vocab_size: int | None = None) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}.")

        def finite(x: float) -> bool:
            return isinstance(x, (int, float)) and math.isfinite(x)

        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "a whole number from 1, or none for the rest of the context")
        need(self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens), "min_tokens", "0 to max_tokens")
        need(finite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "a number from 0 (greedy) to 100")
        need(self.top_k >= 0, "top_k", "a whole number; 0 keeps all tokens")
        need(finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0, up to 1")
        need(finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number from 0 to 1")
        need(finite(self.repetition_penalty) and 0 < self.repetition_penalty <= 10, "repetition_penalty", "a number above 0, up to 10; 1 is off")
        need(finite(self.presence_penalty) and -2 <= self.presence_penalty <= 2, "presence_penalty", "a number from -2 to 2")
        need(finite(self.frequency_penalty) and -2 <= self.frequency_penalty <= 2, "frequency_penalty", "a number from -2 to 2")
        need(all(finite(v) and -100 <= v <= 100 for v in self.logit_bias.values()), "logit_bias", "values from -100 to 100")
        need(len(self.logit_bias) <= 1024, "logit_bias", "at most 1024 tokens")
        need(1 <= self.n <= 16, "n", "1 to 16")
        need(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "0 to 20")
        need(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "0 to 20")
        need(len(self.stop) <= 16 and all(self.stop), "stop", "up to 16 non-empty strings")
        need(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit whole number")
        if vocab_size is not None:
            need(all(0 <= t < vocab_size for t in self.logit_bias), "logit_bias", f"token ids from 0 to {vocab_size - 1}")
            need(all(0 <= t < vocab_size for t in self.stop_token_ids), "stop_token_ids", f"token ids from 0 to {vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. A request with `params.n > 1` becomes n sequences that share the prompt's pages.

    priority: smaller runs first. user: whose share of tokens this is counted against. salt: requests with different salts never
    share prefix pages. deadline: `time.monotonic()` seconds after which it ends with finish reason "abort". pool: instead of generating, return the pooled
    final hidden state ("mean" or "last").
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    priority: int = 0
    user: str = ""
    salt: str = ""
    deadline: float | None = None
    pool: str | None = None
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability, and the most likely tokens at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought for one sequence (`index` of `n`) of a request. The last has a finish reason.

    tokens: new token ids. text: new text, whole characters only, stop strings already withheld (filled by the text layer).
    """

    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    finish: FinishReason | None = None
    stop: str | int | None = None  # the stop string or token that ended it
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first output
    embedding: tuple[float, ...] | None = None
