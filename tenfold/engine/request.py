"""The vocabulary of the engine: what a user asks (`Request`), how to sample (`SamplingParams`), what comes back
(`Output`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from tenfold.models.picture import Picture


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, a stop token or a stop string, or the grammar is complete
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # cancelled by the user, or past its deadline
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer is held to. kind: "json_schema" (source: the schema as JSON), "json_object" (source unused),
    "regex", "choice" (source: a JSON list of strings) or "lark" (source: a grammar in llguidance's Lark dialect).

    End tokens are sampled only where the grammar is complete, and end the answer even with ignore_eos; min_tokens and
    ignore_eos put them off as long as the grammar can go on. Stop strings and stop tokens still cut an answer short.
    """

    kind: str
    source: str = ""


MOST_ASKED = 4096  # ids in logprob_token_ids
MOST_STOP = 4096  # characters of all stop strings


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
    grammar: Grammar | None = None
    logprob_token_ids: tuple[int, ...] = ()  # whose log-probabilities come with every token of the answer

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token of the answer comes with a Logprob; logprob_token_ids without logprobs mean logprobs=0."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    def check(self, vocab_size: int | None = None) -> None:
        for name, allowed, holds in RULES:
            if not holds(self):
                raise ValueError(f"{name} is {shown(getattr(self, name))}; allowed: {allowed}.")
        if vocab_size is None:
            return
        for name in ("logit_bias", "stop_token_ids", "logprob_token_ids"):
            wrong = [token for token in getattr(self, name) if not 0 <= token < vocab_size]
            if wrong:
                raise ValueError(f"{name} has token id {wrong[0]!r}; allowed: 0 to {vocab_size - 1}.")


def shown(value: object) -> str:
    """A value as an error tells it: the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def within(value: float, low: float, high: float) -> bool:
    """Whether value is a number from low to high; NaN is not."""
    return isinstance(value, int | float) and low <= value <= high


# Field, what it may be, and the test for it.
RULES: tuple[tuple[str, str, Callable[[SamplingParams], bool]], ...] = (
    (
        "max_tokens",
        "a whole number from 1, or none for the rest of the context",
        lambda p: p.max_tokens is None or p.max_tokens >= 1,
    ),
    ("min_tokens", "0 to max_tokens", lambda p: 0 <= p.min_tokens <= (p.max_tokens or p.min_tokens)),
    ("temperature", "a number from 0 (greedy) to 100", lambda p: within(p.temperature, 0, 100)),
    ("top_k", "a whole number; 0 keeps all tokens", lambda p: p.top_k >= 0),
    ("top_p", "a number above 0, up to 1", lambda p: within(p.top_p, 0, 1) and p.top_p > 0),
    ("min_p", "a number from 0 to 1", lambda p: within(p.min_p, 0, 1)),
    (
        "repetition_penalty",
        "a number from 0.01 to 10; 1 is off",
        lambda p: within(p.repetition_penalty, 0.01, 10),
    ),
    ("presence_penalty", "a number from -2 to 2", lambda p: within(p.presence_penalty, -2, 2)),
    ("frequency_penalty", "a number from -2 to 2", lambda p: within(p.frequency_penalty, -2, 2)),
    (
        "logit_bias",
        "at most 1024 tokens, each with a number from -100 to 100",
        lambda p: len(p.logit_bias) <= 1024 and all(within(v, -100, 100) for v in p.logit_bias.values()),
    ),
    ("n", "1 to 128", lambda p: 1 <= p.n <= 128),
    ("logprobs", "0 to 100, or none", lambda p: p.logprobs is None or 0 <= p.logprobs <= 100),
    ("prompt_logprobs", "0 to 100, or none", lambda p: p.prompt_logprobs is None or 0 <= p.prompt_logprobs <= 100),
    ("logprob_token_ids", f"up to {MOST_ASKED} token ids", lambda p: len(p.logprob_token_ids) <= MOST_ASKED),
    (
        "stop",
        f"up to 128 non-empty strings, of {MOST_STOP} characters in all",
        lambda p: len(p.stop) <= 128 and all(p.stop) and sum(map(len, p.stop)) <= MOST_STOP,
    ),
    ("seed", "a 64-bit whole number, or none", lambda p: p.seed is None or -(2**63) <= p.seed < 2**63),
)


LONGEST_AIM = 3600.0  # seconds that a request may aim at


def check_targets(ttft: float, tpot: float) -> None:
    """Raises ValueError for what a `Request` cannot aim at."""
    for name, value in (("ttft", ttft), ("tpot", tpot)):
        if not within(value, 0, LONGEST_AIM):
            raise ValueError(f"{name} is {value!r}; allowed: seconds from 0 (the engine's) to {LONGEST_AIM:g}.")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. A request with `params.n > 1` becomes n sequences that share the prompt's pages.

    priority: smaller runs first. user: whose share of tokens this is counted against. salt: requests with different
    salts never share prefix pages. deadline: `time.monotonic()` seconds after which it ends with finish reason
    "abort". pool: instead of generating, return the pooled final hidden state ("mean" or "last"). ttft, tpot: seconds
    to the first token and per token after it to aim at, where the schedule is "phases"; 0: the engine's. pictures: in
    the order of their tokens in the prompt.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    priority: int = 0
    user: str = ""
    salt: str = ""
    deadline: float | None = None
    pool: str | None = None
    ttft: float = 0.0
    tpot: float = 0.0
    pictures: tuple[Picture, ...] = ()
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Pictured:
    """A prompt with its pictures, which stand in it in their order."""

    tokens: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


class QueueFull(ValueError):
    """The engine has as many requests waiting as it may. retry_after: seconds after which another try is worthwhile."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability, and the most likely tokens at its place, best first. asked: those of
    `logprob_token_ids`, in their order. All are the model's own, before penalties, temperature and grammar.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    asked: tuple[float, ...] = ()


class Output(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step brought for one sequence (`index` of `n`) of a request. The last has a finish reason.

    There is one for every token, so it is of the kind that is cheapest to make and to send to another process.

    tokens: new token ids. text: new text, whole characters only, stop strings already withheld (filled by the text
    layer).
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
    queue_seconds: float = 0.0  # from arrival to the first step with it; set on the first output
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first output
    embedding: tuple[float, ...] | None = None

    def joins(self, other: "Output") -> bool:
        """Whether `other`, which came next, can be told together with this one."""
        return self.finish is None and other.index == self.index and other.request_id == self.request_id

    def joined(self, other: "Output") -> "Output":
        """This one and the next as one."""
        return msgspec.structs.replace(
            other,
            tokens=self.tokens + other.tokens,
            text=self.text + other.text,
            logprobs=self.logprobs + other.logprobs,
            prompt_logprobs=self.prompt_logprobs if other.prompt_logprobs is None else other.prompt_logprobs,
            queue_seconds=self.queue_seconds or other.queue_seconds,
            cached_tokens=self.cached_tokens or other.cached_tokens,
        )
