"""Engines under one interface for paired runs: Tenfold here, those it is compared with in `peers/`.

Each answers `generate(prompts, tokens)`: the greedy continuation of every prompt, as one batch. Every engine is driven
at its best; what an engine cannot tell apart (its first token from the rest) it leaves to the difference of two runs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from tenfold.base.config import EngineConfig, fits
from tenfold.base.table import entry

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is built for: `batch` sequences of up to `context` tokens, prompt and answer together.

    threads: of a CPU. kv_tokens: tokens of KV cache for all sequences together (0: batch * context). settings: fields
    of EngineConfig for Tenfold, keyword arguments of the peer's own constructor otherwise.
    """

    model: str
    threads: int = 0
    batch: int = 1
    context: int = 4096
    device: str = "cpu"
    kv_tokens: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        """Tokens of KV cache."""
        return self.kv_tokens or self.batch * self.context


@dataclass(frozen=True, slots=True)
class Job:
    """A request that comes `due` seconds after a run began, and wants so many tokens."""

    due: float
    prompt: Sequence[int]
    tokens: int


@dataclass(slots=True)
class Answer:
    """One request. Times in seconds since the run began: due when it should arrive, then one for each piece that came;
    sizes: tokens of each piece. error: why it has no proper end.
    """

    due: float
    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    @property
    def ttft(self) -> float:
        """Milliseconds."""
        return 1e3 * (self.times[0] - self.due)

    @property
    def tpot(self) -> float | None:
        """Milliseconds a token after the first piece; None where there was only one."""
        rest = self.tokens - self.sizes[0]
        return 1e3 * (self.times[-1] - self.times[0]) / rest if rest else None

    @property
    def gaps(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:])]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of wall clock until every prompt had its first token (prefill) and of the rest (decode), and the tokens.

    An engine that does not say when its first token came has all of its time in `prefill`.
    """

    prefill: float
    decode: float
    tokens: list[list[int]]

    @property
    def total(self) -> float:
        return self.prefill + self.decode


class Engine(Protocol):
    """capacity: tokens its KV cache holds, None where it grows as needed."""

    capacity: int | None

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        """tokens: of every answer, or one number for each."""
        ...


class Peer(Protocol):
    """An engine elsewhere that takes requests at their moments."""

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        """What became of each."""
        ...


class Stopwatch:
    """Marks its start, the first token and the end."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def timing(self, tokens: list[list[int]]) -> Timing:
        begin, first, end = self.marks
        return Timing(first - begin, end - first, tokens)


def lengths(prompts: Prompts, tokens: int | Sequence[int]) -> list[int]:
    """Tokens of each answer."""
    return [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)


def one_length(prompts: Prompts, tokens: int | Sequence[int], engine: str) -> int:
    """The length all answers have, for engines that run a batch in lockstep. Raises ValueError."""
    if len({len(p) for p in prompts}) != 1 or not isinstance(tokens, int):
        raise ValueError(f"{engine} runs prompts and answers of one length only; give a batch of equal ones.")
    return tokens


ALLOWED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
NAMED = ("model", "device")  # by options of their own


def engine_config(settings: Mapping[str, Any], **own: Any) -> EngineConfig:
    """own, where settings say nothing else. settings: fields of EngineConfig, as `--set` has them. Raises ValueError
    for a name or a value that none can have.
    """
    return EngineConfig(**(own | checked(settings)))


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as EngineConfig holds them. Raises ValueError as `engine_config`."""
    known = {f.name: f for f in fields(EngineConfig) if f.name not in NAMED}
    for name in settings.keys() - known.keys():
        raise ValueError(f"{name!r} is no setting of the engine; allowed: {', '.join(sorted(known))}.")
    return {name: held(known[name], value) for name, value in settings.items()}


def held(field: Any, value: Any) -> Any:
    """A value as a field holds it."""
    kind, choices = field.type, field.metadata["choices"]
    if kind is str and type(value) in (int, float):
        value = str(value)  # such as of border=96
    if choices and value not in choices:
        raise ValueError(f"{field.name} is {value!r}; allowed: {', '.join(choices)}.")
    if not fits(value, kind):
        raise ValueError(f"{field.name} is {value!r}; allowed: {ALLOWED[kind]}, such as {example(field)}.")
    return value


def example(field: Any) -> str:
    """A setting as `--set` takes it."""
    return f"{field.name}={str(field.default).lower() if field.type is bool else field.default}"


class Tenfold:
    """The whole engine: scheduler, paged cache, sampler and detokeniser, as a server would run it. A model of random
    weights has no tokenizer and so no detokeniser.
    """

    def __init__(self, setup: Setup) -> None:
        from tenfold.bench.floor import model_sizes  # PyTorch comes with these
        from tenfold.engine.core import Engine as Core
        from tenfold.weights.shapes import is_shape

        sizes: dict[str, Any] = {
            "model": setup.model,
            "device": setup.device,
            "threads": setup.threads,
            "max_batch": setup.batch,
            "max_model_len": setup.context,
            "prefix_cache": False,
        }
        if setup.kv_tokens:
            sizes["kv_memory"] = setup.kv_tokens * model_sizes(setup.model, setup.device, setup.settings).kv_token
        self.core = Core.load(engine_config(setup.settings, **sizes), tokens_only=is_shape(setup.model))
        self.capacity: int | None = self.core.pool.total * self.core.config.page_size
        self.count = 0

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        from tenfold.engine.request import Request, SamplingParams

        found: dict[str, list[int]] = {}
        watch = Stopwatch()
        for prompt, length in zip(prompts, lengths(prompts, tokens)):
            self.count += 1
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            request = Request(str(self.count), tuple(prompt), params)
            found[request.id] = []
            self.core.add(request)
        first = False
        while self.core.has_work:
            for output in self.core.step():
                if output.error:
                    for request_id in found:
                        self.core.abort(request_id)
                    raise RuntimeError(output.error)
                found[output.request_id].extend(output.tokens)
            if not first and all(found.values()):
                first = True
                watch.mark()
        watch.mark()
        return watch.timing(list(found.values()))


ENGINES = {
    "tenfold": "tenfold.bench.engines:Tenfold",
    "llama.cpp": "tenfold.bench.peers.llama_cpp:LlamaCpp",
    "hf": "tenfold.bench.peers.hugging_face:Loop",
    "hf-generate": "tenfold.bench.peers.hugging_face:Generate",
    "hf-compiled": "tenfold.bench.peers.hugging_face:Compiled",
    "vllm": "tenfold.bench.peers.vllm:VLLM",
}


class NotInstalled(RuntimeError):
    """A peer whose packages, or whose tools, are not there."""


def make_engine(name: str, setup: Setup) -> Engine:
    """Build an engine by name. Raises ValueError for an unknown name, NotInstalled for a peer that is not."""
    try:
        engine: Engine = entry(ENGINES, name, "engine")(setup)
    except ModuleNotFoundError as error:
        if name == "tenfold":
            raise
        raise NotInstalled(
            f"{name} is not installed here ({error}); install it, name the folder of its packages with --peer-path "
            "(vllm, llama.cpp), or leave it out of --against."
        ) from error
    return engine
