"""Claim M4, mixed bits of experts against uniform ones, from raw results of `bench.mxmoe`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.bench.claims import Claim, claim, signed

NEAR = 0.01  # bits a weight: a mix of as many bits as a uniform row
LOWER = 1.001  # times what counts as a lower perplexity
FINAL = "mixed model block end"  # what `tenfold quantize` does where it is not told otherwise
GRAINS = (("mixed layer block", "mixed layer expert"), (FINAL, "mixed model expert end"))  # blocks, whole experts
MEASURES = ("perplexity", "divergence")


def of_quality(data: Mapping[str, Any]) -> list[Claim]:
    """M4: at bits where there is a uniform row, and of the whole front, in perplexity and in divergence."""
    made = [each for measure in MEASURES for each in (*_against(data, measure), *_front(data, measure))]
    return [signed(each, data["machine"]) for each in made]


def _against(data: Mapping[str, Any], measure: str) -> list[Claim]:
    """Of each uniform row over the mix of as many bits, and of whole experts over single blocks."""
    made: list[Claim] = []
    exact = data["rows"][0][measure]
    for row in (r for r in data["rows"] if r["kind"].startswith("uniform")):
        near = [r for r in data["rows"] if row["bits"] - 0.1 < r["bits"] <= row["bits"] + NEAR]
        rivals = {r["kind"]: r[measure] for r in near if r["kind"].startswith("mixed")}
        others = ", ".join(f"{kind} {value:.4g}" for kind, value in rivals.items())
        note = f"{data['model']}: {row['kind']} {row[measure]:.4g}, exact {exact:.4g}; {others}"
        ratios = []
        if FINAL in rivals:
            ratios.append((f"of uniform {data['method']} over that of {FINAL}", row[measure] / rivals[FINAL]))
        for blocks, whole in GRAINS:
            if blocks in rivals and whole in rivals:
                ratios.append((f"of {whole} over that of {blocks}", rivals[whole] / rivals[blocks]))
        for what, value in ratios:
            what = f"{measure} {what}, at {row['bits']:.2f} bits"
            made.append(claim("M4", what, value, "x", data["command"], at_least=LOWER, note=note))
    return made


def _front(data: Mapping[str, Any], measure: str) -> list[Claim]:
    uniform = [r for r in data["rows"] if r["kind"].startswith("uniform")]
    final = sorted((r for r in data["rows"] if r["kind"] == FINAL), key=lambda r: r["bits"])
    if not final or not uniform:
        return []
    beaten = [r for r in final if any(dominates(u, r, measure) for u in uniform)]
    note = ", ".join(f"{r['bits']:.2f}: {r[measure]:.4g}" for r in final)
    what = f"points of {len(final)} of the front that a uniform row dominates in {measure}"
    return [claim("M4", what, len(beaten), "points", data["command"], at_most=0, note=note)]


def dominates(a: Mapping[str, Any], b: Mapping[str, Any], measure: str) -> bool:
    """Whether a has no more bits and no more of the measure, and less of one."""
    no_more = a["bits"] <= b["bits"] + 1e-9 and a[measure] <= b[measure]
    return no_more and (a["bits"] < b["bits"] - NEAR or a[measure] < b[measure])


def of_suites(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """All claims of raw results by suite."""
    return [each for data in found.get("mxmoe", ()) for each in of_quality(data)]
