"""Claim V4 of models that see: MBQ against other methods at equal bits (`bench.vlm`). V1, of single products, is in
`claims_gpu`; V2 and V3, of whole models, are in `claims_bits`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.bench.claims import Claim, claim, signed

BASELINES = ("rtn", "awq", "smoothquant")


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
