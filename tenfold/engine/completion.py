"""What a finished request looks like to a user of the Python API, and `Collector`, which builds it from outputs."""

import time
from dataclasses import dataclass

from tenfold.engine.request import Logprob, Output, Request


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a request's n answers.

    finish_reason: "stop", "length" or "abort". stop: the stop string or token id that ended it, if one did.
    logprobs: one entry for each token where the parameters ask for them, else None.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stop: str | int | None = None
    logprobs: tuple[Logprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens: of the prompt, of all answers, and those of the prompt that the prefix cache had."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. ttft: from the request to its first token. tpot: between tokens after that (of the longest answer;
    None for a single token). total: from the request to its end.
    """

    ttft: float
    tpot: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. prompt: its text, None if it was given as tokens."""

    id: str
    prompt: str | None
    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    timing: Timing
    prompt_logprobs: tuple[Logprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The first choice's tokens."""
        return self.choices[0].tokens


class Collector:
    """Outputs of one request, in the order of their arrival."""

    def __init__(self, request: Request, prompt: str | None) -> None:
        n = request.params.n
        self._request = request
        self._prompt = prompt
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[Logprob]] = [[] for _ in range(n)]
        self._last: list[Output | None] = [None] * n
        self._cached = 0
        self._prompt_logprobs: tuple[Logprob | None, ...] | None = None
        self._first_time: float | None = None
        self._last_time = request.arrival
        self.embedding: tuple[float, ...] | None = None
        self.missing = n

    def add(self, output: Output) -> None:
        """Takes the next output. `missing` then says how many answers are not finished."""
        index = output.index
        self._last_time = time.monotonic()
        if output.tokens:
            if self._first_time is None:
                self._first_time = self._last_time
            self._tokens[index].extend(output.tokens)
        self._texts[index].append(output.text)
        self._logprobs[index].extend(output.logprobs)
        self._cached = max(self._cached, output.cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.embedding is not None:
            self.embedding = output.embedding
        if output.finish is not None:
            self._last[index] = output
            self.missing -= 1

    def completion(self) -> Completion:
        """The whole, once nothing is missing."""
        request = self._request
        return Completion(
            request.id,
            self._prompt,
            request.prompt,
            tuple(self._choice(i, last) for i, last in enumerate(self._last) if last is not None),
            Usage(len(request.prompt), sum(map(len, self._tokens)), self._cached),
            self._timing(),
            self._prompt_logprobs,
        )

    def _choice(self, index: int, last: Output) -> Choice:
        assert last.finish is not None
        logprobs = tuple(self._logprobs[index]) if self._request.params.wants_logprobs else None
        text = "".join(self._texts[index])
        return Choice(index, text, tuple(self._tokens[index]), last.finish.value, last.stop, logprobs)

    def _timing(self) -> Timing:
        start, first = self._request.arrival, self._first_time if self._first_time is not None else self._last_time
        longest = max(map(len, self._tokens))
        tpot = (self._last_time - first) / (longest - 1) if longest > 1 else None
        return Timing(first - start, tpot, self._last_time - start)
