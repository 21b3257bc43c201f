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
    """At every context that was measured in bfloat16 too."""
    own = [result for result in results if result.model.partition("@")[0] == f"shape:{gain.model}"]
    plain = [result for result in own if not result.weights]
    for fewer in (result for result in own if result.weights == gain.weights):
        for context in sorted({row.context for row in fewer.rows if row.batch == gain.batch}):
            decode = f"decode, batch {gain.batch}, context {context}"
            task = decode if gain.decode else f"prefill of {context} tokens"
            what = f"{task}, {gain.model}, {gain.name} over bfloat16"
            at = (gain.batch, context, gain.decode)
            if made := over_bfloat16(gain.id, what, gain.least, plain, fewer, at):
                yield made


def over_bfloat16(
    id: str, what: str, least: float, plain: Sequence[Result], fewer: Result, at: tuple[int, int, bool]
) -> Claim | None:
    """What a run in fewer bits wins over the fastest of those in bfloat16 on the same hardware, None where either lacks
    the point. at: batch, context, and whether a token of an answer counts or the prompt. The ratio is of medians, its
    spread holds every pair of rounds.
    """
    batch, context, decode = at
    same = [result for result in plain if result.machine.get("hardware") == fewer.machine.get("hardware")]
    exact = [(samples(row, decode), result) for result in same if (row := result.row("tenfold", *at))]
    row = fewer.row("tenfold", *at)
    if row is None or not exact:
        return None
    slow, result = min(exact, key=lambda pair: median(pair[0]))
    fast, floor = samples(row, decode), fewer.floor(batch, context) if decode else None
    note = f"{median(slow):.2f} ms and {median(fast):.2f} ms, medians of {len(slow)} and {len(fast)} rounds, "
    note += "one run after the other" + ("" if floor is None else f"; floor {floor:.2f} ms")
    if (commit := result.machine.get("commit")) != fewer.machine.get("commit"):
        note += f"; bfloat16 at commit {commit}"
    made = claim(
        id,
        what,
        median(slow) / median(fast),
        "x",
        "; ".join(dict.fromkeys((result.command, fewer.command))),
        at_least=least,
        against="the same engine in bfloat16",
        spread=(min(slow) / max(fast), max(slow) / min(fast)),
        note=note,
    )
    return signed(made, fewer.machine)


def samples(row: Row, decode: bool) -> list[float]:
    """Milliseconds of a token of an answer, or of the prompt."""
    return row.tpot_samples if decode else row.prefill_samples
