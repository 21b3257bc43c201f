"""The CPU suite: decode, prefill and batch-8 decode of one model, ours and peers in turn on an idle machine."""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.claims import Claim, claim
from tenfold.bench.engines import Setup
from tenfold.bench.hardware import ROOT, busy_cores, commit, processor, today
from tenfold.bench.worker import Worker
from tenfold.weights.beside import write


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` prompts of `prompt` tokens, continued by `tokens`. phase says which part is timed."""

    name: str
    batch: int
    prompt: int
    tokens: int
    phase: str

    @property
    def work(self) -> int:
        """Tokens that the timed phase computes."""
        return self.batch * (self.prompt if self.phase == "prefill" else self.tokens - 1)


CASES = (
    Case("decode, batch 1", 1, 32, 129, "decode"),
    Case("prefill, 512 tokens", 1, 512, 1, "prefill"),
    Case("decode, batch 8", 8, 32, 65, "decode"),
)
# id and least ratio of each case against each peer, on the bundled Q4_1 file.
TARGETS = {
    ("decode, batch 1", "llama.cpp"): ("A1", 1.5),
    ("decode, batch 1", "hf"): ("A1", 8.0),
    ("prefill, 512 tokens", "llama.cpp"): ("A2", 2.5),
    ("prefill, 512 tokens", "hf"): ("A2", 1.4),
    ("decode, batch 8", "llama.cpp"): ("A3", 3.0),
}
# Other quantisations of the same model are only compared with llama.cpp.
FORMAT_TARGETS = {("decode, batch 1", "llama.cpp"): ("A1", 1.0)}
CONTEXT = 1024

Speeds = dict[str, dict[str, list[float]]]
Targets = dict[tuple[str, str], tuple[str, float]]


def prompts_of(case: Case, seed: int, vocabulary: int = 40_000) -> list[list[int]]:
    """Random token ids: speed does not depend on their meaning, and no prefix repeats between rounds."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary // 40, vocabulary) for _ in range(case.prompt)] for _ in range(case.batch)]


def measure(
    model: str,
    engines: Sequence[str],
    threads: int,
    rounds: int,
    cases: Sequence[Case] = CASES,
    say: Callable[[str], None] = print,
    vocabulary: int = 40_000,
) -> Speeds:
    """Tokens per second by case and engine, one sample a round; the order of engines turns around every round."""
    speeds: Speeds = {case.name: {name: [] for name in engines} for case in cases}
    with ExitStack() as stack:
        workers = []
        for name in engines:
            say(f"starting {name}")
            worker = Worker(name, Setup(model, threads, max(c.batch for c in cases), CONTEXT))
            stack.callback(worker.close)
            workers.append(worker)
        for worker in workers:  # first calls allocate and warm caches
            for case in cases:
                worker.generate(prompts_of(case, 0, vocabulary), min(case.tokens, 8))
        for i in range(rounds):
            for case in cases:
                prompts = prompts_of(case, i + 1, vocabulary)
                for worker in workers if i % 2 == 0 else workers[::-1]:
                    timing = worker.generate(prompts, case.tokens)
                    speeds[case.name][worker.name].append(case.work / getattr(timing, case.phase))
            latest = [f"{c.name}: " + " / ".join(f"{speeds[c.name][e][-1]:.0f}" for e in engines) for c in cases]
            say(f"round {i + 1} of {rounds}: " + ", ".join(latest))
    return speeds


def claims_of(speeds: Speeds, label: str, command: str, targets: Targets) -> list[Claim]:
    """Claims of a run: the ratio to each peer that has a target, with both medians in the note."""
    claims = []
    for (case, peer), (id, least) in targets.items():
        samples = speeds.get(case, {})
        if not samples.get(peer):
            continue
        ratio = paired_ratio(samples["tenfold"], samples[peer])
        ours, theirs = Figure(tuple(samples["tenfold"])).median, Figure(tuple(samples[peer])).median
        note = f"{ours:.0f} tokens/s against {theirs:.0f}, median of {len(ratio.samples)} interleaved rounds."
        claims.append(
            claim(
                id,
                f"{case}, {label}, against {peer}",
                ratio.median,
                "x",
                command,
                at_least=least,
                against=peer,
                spread=ratio.spread,
                note=note,
            )
        )
    return claims


def place(name: str) -> Path:
    return ROOT / "bench" / "results" / f"{name}.json"


def kept(name: str) -> dict[str, Any]:
    """The data of a raw result file, as `save` wrote it; empty where there is none."""
    path = place(name)
    data: dict[str, Any] = json.loads(path.read_text())["data"] if path.exists() else {}
    return data


def save(name: str, data: object) -> Path:
    """Write a raw result file beside the claims."""
    path = place(name)
    record = {
        "hardware": processor(),
        "commit": commit(),
        "date": today(),
        "busy_cores_before": round(busy_cores(), 2),
        "data": data,
    }
    write(path, (json.dumps(record, indent=1) + "\n").encode())
    return path
