"""What weights of fewer bits win over bfloat16 on whole models (`bench.single`): F7, V2 and V3."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.single import Result, Row

DENSE, VLM = "llama-3-8b", "llava-onevision-7b"


@dataclass(frozen=True, slots=True)
class Gain:
    """What weights of fewer bits are to win over bfloat16: times less for a token of an answer (decode), or for a
    prompt; of a model, at so many requests at a time.
    """

    id: str
    model: str
    weights: str
    name: str
    least: float
    batch: int = 1
    decode: bool = True


GAINS = (
    Gain("F7", DENSE, "int4", "W4A16", 2.5),
    Gain("F7", DENSE, "fp8", "FP8", 1.4, batch=64),
    Gain("V2", VLM, "int3", "W3A16", 2.0),
    Gain("V3", VLM, "w4a8", "W4A8", 1.3, decode=False),
)


def of_models(results: Sequence[Result]) -> list[Claim]:
    """Of runs in bfloat16 and in fewer bits, one after the other on one machine."""
    return [each for gain in GAINS for each in _of(gain, results)]


def _of(gain: Gain, results: Sequence[Result]) -> Iterator[Claim]:
    """At every context that was measured in bfloat16 too, whose fastest run counts."""
    own = [result for result in results if result.model.partition("@")[0] == f"shape:{gain.model}"]
    for fewer in (result for result in own if result.weights == gain.weights):
        hardware = fewer.machine.get("hardware")
        plain = [result for result in own if not result.weights and result.machine.get("hardware") == hardware]
        for context in sorted({row.context for row in fewer.rows if row.batch == gain.batch}):
            at = ("tenfold", gain.batch, context, gain.decode)
            exact = [(found, result) for result in plain if (found := result.row(*at))]
            if exact and (row := fewer.row(*at)):
                first, result = min(exact, key=lambda pair: median(samples(gain, pair[0])))
                yield signed(_claim(gain, first, row, f"{result.command}; {fewer.command}"), fewer.machine)


def samples(gain: Gain, row: Row) -> list[float]:
    """Milliseconds of what a gain is about."""
    return row.tpot_samples if gain.decode else row.prefill_samples


def _claim(gain: Gain, exact: Row, fewer: Row, command: str) -> Claim:
    """The ratio of medians; its spread holds every pair of rounds."""
    slow, fast = (samples(gain, row) for row in (exact, fewer))
    decode = f"decode, batch {gain.batch}, context {fewer.context}"
    task = decode if gain.decode else f"prefill of {fewer.context} tokens"
    note = f"{median(slow):.2f} ms and {median(fast):.2f} ms, medians of {len(slow)} and {len(fast)} rounds, "
    note += "one run after the other"
    return claim(
        gain.id,
        f"{task}, {gain.model}, {gain.name} over bfloat16",
        median(slow) / median(fast),
        "x",
        command,
        at_least=gain.least,
        against="the same engine in bfloat16",
        spread=(min(slow) / max(fast), max(slow) / min(fast)),
        note=note,
    )
