"""Offline throughput: all requests are there at once, and what counts is when the last token of the last one is out.

Prompts are random ids of drawn lengths, answers greedy and of drawn lengths, end tokens ignored, no prefix cache. Each
engine gets the same requests and forms its own batches.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from tenfold.bench.engines import Engine, Setup
from tenfold.bench.floor import model_sizes
from tenfold.bench.hardware import machine
from tenfold.bench.lengths import Lengths
from tenfold.bench.worker import Worker
from tenfold.weights.shapes import at_least_positions, is_shape


@dataclass(frozen=True, slots=True)
class Work:
    """count requests. prompt, answer: distributions of their lengths in tokens."""

    count: int
    prompt: Lengths
    answer: Lengths

    @property
    def longest(self) -> int:
        return self.prompt.high + self.answer.high

    def requests(self, seed: int, vocabulary: int) -> tuple[list[list[int]], list[int]]:
        """Prompts, and the length of each answer; other ones for each seed."""
        rng = random.Random(seed)
        lengths = [(self.prompt.draw(rng), self.answer.draw(rng)) for _ in range(self.count)]
        return [rng.choices(range(vocabulary), k=p) for p, _ in lengths], [a for _, a in lengths]


@dataclass(slots=True)
class Result:
    """Seconds and tokens of each round by engine."""

    model: str
    machine: dict[str, str]
    work: Work
    seconds: dict[str, list[float]] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def output_rate(self, engine: str) -> float:
        """Tokens of answers a second, median of rounds."""
        return median(t / s for t, s in zip(self.answer_tokens, self.seconds[engine]))

    def total_rate(self, engine: str) -> float:
        """Tokens of prompts and answers a second, median of rounds."""
        pairs = zip(self.prompt_tokens, self.answer_tokens, self.seconds[engine])
        return median((p + a) / s for p, a, s in pairs)

    def lines(self) -> list[str]:
        return [
            f"{name:12} {self.output_rate(name):9.0f} tokens/s out, {self.total_rate(name):9.0f} in all, "
            f"{median(seconds):.1f} s for {self.work.count} requests"
            for name, seconds in self.seconds.items()
            if seconds
        ]

    def plain(self) -> dict[str, Any]:
        return {"suite": "throughput", "lines": self.lines() + self.notes} | asdict(self)


def measure(
    engines: Mapping[str, Engine], result: Result, rounds: int, vocabulary: int, say: Callable[[str], None] = print
) -> None:
    """Add `rounds` samples of each engine, in turn."""
    warm_up = Work(min(4, result.work.count), result.work.prompt, Lengths("uniform", 4, 4))
    for name, engine in engines.items():
        result.seconds[name] = []
        engine.generate(*warm_up.requests(-1, vocabulary))
    for i in range(rounds):
        prompts, answers = result.work.requests(i, vocabulary)
        if len(result.answer_tokens) == i:  # the first engines of a result; those that follow get the same requests
            result.prompt_tokens.append(sum(map(len, prompts)))
            result.answer_tokens.append(sum(answers))
        for name in list(engines)[:: 1 if i % 2 == 0 else -1]:
            found = engines[name].generate(prompts, answers)
            short = [len(tokens) for tokens in found.tokens]
            if short != answers:
                raise RuntimeError(f"{name} gave {sum(short)} tokens and was asked for {sum(answers)}.")
            result.seconds[name].append(found.total)
        say(f"round {i + 1} of {rounds}: " + ", ".join(f"{n} {s[-1]:.1f} s" for n, s in result.seconds.items()))


def peers_of(names: Sequence[str]) -> list[str]:
    """Each once. Raises ValueError for a peer that runs batches in lockstep, so that none can come or go."""
    for name in names:
        if name != "vllm":
            raise ValueError(f"against is {name!r}; allowed: vllm. Others cannot take requests of different lengths.")
    return list(dict.fromkeys(names))


def run(
    model: str,
    engines: Sequence[str],
    work: Work,
    rounds: int,
    device: str,
    batch: int,
    *,
    threads: int = 0,
    tuning: Mapping[str, Mapping[str, Any]] | None = None,
    peer_path: str = "",
    say: Callable[[str], None] = print,
) -> Result:
    """Every engine in a process of its own, one after the other, for on a GPU each takes all the memory."""
    if is_shape(model):
        model = at_least_positions(model, work.longest)
    result = Result(model, machine(device), work)
    vocabulary = model_sizes(model, device).vocab
    for name in engines:
        setup = Setup(model, threads, batch, work.longest, device, settings=dict((tuning or {}).get(name, {})))
        worker = Worker(name, setup, "" if name == "tenfold" else peer_path)
        try:
            measure({name: worker}, result, rounds, vocabulary, say)
            result.notes += worker.told()
        finally:
            worker.close()
    if len(engines) > 1:
        result.notes.append("The engines ran one after the other, each in a process of its own.")
    return result
