"""Claims V2 to V4 of models that see: fewer bits against bfloat16 on a whole model (`bench.single`), and MBQ against
other methods at equal bits (`bench.vlm`). V1, of single products, is in `claims_gpu`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.single import Result, Row

BASELINES = ("rtn", "awq", "smoothquant")
WHOLE = "llava-onevision-7b"


@dataclass(frozen=True, slots=True)
class Gain:
    """What weights of fewer bits are to win over bfloat16: times less for a token of an answer, or for a prompt."""

    id: str
    weights: str
    name: str
    least: float
    decode: bool


GAINS = (Gain("V2", "int3", "W3A16", 2.0, True), Gain("V3", "w4a8", "W4A8", 1.3, False))


def of_models(results: Sequence[Result]) -> list[Claim]:
    """V2 and V3: one request of text, in bfloat16 and in fewer bits, in runs one after the other on one machine."""
    own = [result for result in results if result.model.partition("@")[0] == f"shape:{WHOLE}"]
    pairs = [(gain, result) for gain in GAINS for result in own if result.weights == gain.weights]
    return [each for gain, fewer in pairs for each in _gains(gain, own, fewer)]


def _gains(gain: Gain, own: Sequence[Result], fewer: Result) -> Iterator[Claim]:
    """At every context that was measured in bfloat16 too, whose fastest run counts."""
    hardware = fewer.machine.get("hardware")
    plain = [result for result in own if not result.weights and result.machine.get("hardware") == hardware]
    for context in sorted({row.context for row in fewer.rows}):
        at = ("tenfold", 1, context, gain.decode)
        exact = [(found, result) for result in plain if (found := result.row(*at))]
        if exact and (row := fewer.row(*at)):
            first, result = min(exact, key=lambda pair: median(samples(gain, pair[0])))
            yield signed(_gain(gain, first, row, f"{result.command}; {fewer.command}"), fewer.machine)


def samples(gain: Gain, row: Row) -> list[float]:
    """Milliseconds of what a gain is about."""
    return row.tpot_samples if gain.decode else row.prefill_samples


def _gain(gain: Gain, exact: Row, fewer: Row, command: str) -> Claim:
    """The ratio of medians; its spread holds every pair of rounds."""
    slow, fast = (samples(gain, row) for row in (exact, fewer))
    task = f"decode, batch 1, context {fewer.context}" if gain.decode else f"prefill of {fewer.context} tokens"
    note = f"{median(slow):.2f} ms and {median(fast):.2f} ms, medians of {len(slow)} and {len(fast)} rounds, "
    note += "one run after the other"
    return claim(
        gain.id,
        f"{task}, {WHOLE}, {gain.name} over bfloat16",
        median(slow) / median(fast),
        "x",
        command,
        at_least=gain.least,
        against="the same engine in bfloat16",
        spread=(min(slow) / max(fast), max(slow) / min(fast)),
        note=note,
    )


def of_quality(data: Mapping[str, Any]) -> list[Claim]:
    """V4: of each scheme, what MBQ wins over the best baseline, in loss and in whole answers, mean of seeds."""
    exact = data["rows"][0]
    made: list[Claim] = []
    for scheme in dict.fromkeys(row["scheme"] for row in data["rows"][1:]):
        rows = {row["method"]: row for row in data["rows"] if row["scheme"] == scheme}
        mbq, others = rows["mbq"], [rows[name] for name in BASELINES]
        told = ", ".join(f"{r['method']} {r['loss']:.4f} and {r['accuracy']:.2%}" for r in (exact, mbq, *others))
        note = f"{data['model']}, loss and whole answers right, mean of {len(mbq['losses'])} seeds: {told}"
        best = min(others, key=lambda row: row["loss"])
        each = [a - b for a, b in zip(best["losses"], mbq["losses"])]
        what = f"loss of the best baseline less that of MBQ, {scheme}"
        spread = (min(each), max(each))
        value = best["loss"] - mbq["loss"]
        made.append(claim("V4", what, value, "nats", data["command"], at_least=1e-6, spread=spread, note=note))
        best = max(others, key=lambda row: row["accuracy"])
        each = [100 * (a - b) for a, b in zip(mbq["accuracies"], best["accuracies"])]
        what = f"whole answers right by MBQ less those by the best baseline, {scheme}"
        value, spread = 100 * (mbq["accuracy"] - best["accuracy"]), (min(each), max(each))
        made.append(claim("V4", what, value, "points", data["command"], at_least=1e-6, spread=spread, note=note))
    return [signed(each_claim, data["machine"]) for each_claim in made]


def of_suites(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """All claims of raw results by suite."""
    return [each for data in found.get("vlm", ()) for each in of_quality(data)]
