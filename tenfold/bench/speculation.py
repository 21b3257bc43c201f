"""Speculation off and on in one engine, in turn: `python -m tenfold.bench.speculation --model NAME --speculate ngram`.

Three texts: one the answer repeats, a free one, and the free one sampled. `rows` requests are computed at a time, and
five times as many are there at once, so that a row whose answer ends early has another at once. Answers are compared
token by token: on a CPU all must be equal; on a GPU, where rounding depends on the batch, it is told how many are.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.bench.case import paired_ratio
from tenfold.bench.hardware import machine
from tenfold.engine.core import Engine
from tenfold.engine.opened import pick_device
from tenfold.engine.request import Request, SamplingParams
from tenfold.weights.shapes import is_shape

REPEATED = (
    "The harbour master wrote down the name of every ship that came in: the Aurora with salt, the Beatrice with "
    "timber, the Cormorant with coal. At noon he closed the book and walked to the pier."
)
TEXTS = {
    "repeat": (f"Repeat this text word for word.\n\n{REPEATED}\n\nThe harbour master wrote", 0.0),
    "free": ("Write a long story about a lighthouse keeper who finds a letter.", 0.0),
    "sampled": ("Write a long story about a lighthouse keeper who finds a letter.", 0.8),
}


@dataclass(slots=True)
class Point:
    """Seconds by round, off and on; tokens of one round; what speculation did in all rounds."""

    text: str
    rows: int
    tokens: int = 0
    off: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)
    equal: int = 0
    answers: int = 0
    drafted: int = 0
    accepted: int = 0

    def plain(self) -> dict[str, Any]:
        gain = paired_ratio(self.off, self.on)
        return asdict(self) | {"gain": gain.median, "gain_spread": gain.spread}


def prompt_of(engine: Engine, text: str) -> tuple[int, ...]:
    """Without a tokenizer (a model of random weights) ids that occur three times."""
    if engine.text is None:
        vocabulary = min(1000, engine.vocab_size)
        return tuple((i * 7919 + len(text)) % vocabulary for i in range(40)) * 3
    ids: list[int] = engine.text.encode(text)  # type: ignore[attr-defined]
    return tuple(ids)


def once(engine: Engine, prompt: tuple[int, ...], temperature: float, rows: int, tokens: int) -> dict[str, list[int]]:
    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
    for i in range(5 * rows):
        seeded = SamplingParams(**(asdict(params) | {"seed": i}))
        engine.add(Request(str(i), prompt, seeded))
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            answers.setdefault(output.request_id, []).extend(output.tokens)
    return answers


def measure(engine: Engine, text: str, rows: int, tokens: int, rounds: int) -> Point:
    """One more round than asked for: the first, which learns and compiles, is not counted."""
    prompt, temperature = prompt_of(engine, TEXTS[text][0]), TEXTS[text][1]
    point, speculator = Point(text, rows, 5 * rows * tokens), engine.speculator
    for number in range(rounds + 1):
        found, seconds = [], []
        for on in (False, True):
            engine.speculator = speculator if on else None
            begin = time.perf_counter()
            found.append(once(engine, prompt, temperature, rows, tokens))
            seconds.append(time.perf_counter() - begin)
        point.equal += sum(found[0][name] == found[1][name] for name in found[0])
        point.answers += len(found[0])
        if number:
            point.off.append(seconds[0])
            point.on.append(seconds[1])
    stats = engine.stats()
    point.drafted, point.accepted = stats.drafted_tokens, stats.accepted_tokens
    return point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="default")
    parser.add_argument("--speculate", default="ngram")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if others := [text for text in given.texts.split(",") if text not in TEXTS]:
        parser.error(f"--texts has {', '.join(others)}; allowed: {', '.join(TEXTS)}.")
    where = machine(pick_device(given.device).type)
    print(json.dumps({"machine": where, "model": given.model, "speculate": given.speculate}))
    for rows in map(int, given.rows.split(",")):
        config = EngineConfig(
            *(given.model, given.device),
            speculate=given.speculate,
            speculate_tokens=given.drafts,
            max_batch=rows,
            max_model_len=1024,
            prefix_cache=False,
        )
        for text in given.texts.split(","):
            engine = Engine.load(config, tokens_only=is_shape(given.model))
            print(json.dumps(measure(engine, text, rows, given.tokens, given.rounds).plain()), flush=True)
            del engine


if __name__ == "__main__":
    main()
