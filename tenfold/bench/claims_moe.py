"""Claim M4, mixed bits of experts against uniform ones, from raw results of `bench.mxmoe`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.bench.claims import Claim, claim, signed

NEAR = 0.01  # bits a weight: a mix of as many bits as a uniform row
LOWER = 1.001  # times what counts as a lower perplexity
FINAL = "mixed model block"  # what `tenfold quantize` does where it is not told otherwise


def of_quality(data: Mapping[str, Any]) -> list[Claim]:
    """M4: at bits where there is a uniform row, and of the whole front."""
    uniform = [r for r in data["rows"] if r["kind"].startswith("uniform")]
    mixed = [r for r in data["rows"] if r["kind"].startswith("mixed")]
    exact = data["rows"][0]["perplexity"]
    made: list[Claim] = []
    for row in uniform:
        rivals = {r["kind"]: r for r in mixed if row["bits"] - 0.1 < r["bits"] <= row["bits"] + NEAR}
        if not rivals:
            continue
        others = ", ".join(f"{kind} {r['perplexity']:.3f}" for kind, r in rivals.items())
        note = f"{data['model']}: {row['kind']} {row['perplexity']:.3f}, exact {exact:.3f}; {others}"
        at = f"at {row['bits']:.2f} bits"
        best = min(rivals.values(), key=lambda r: r["perplexity"])
        value = row["perplexity"] / best["perplexity"]
        what = f"perplexity of uniform {data['method']} over that of {best['kind']}, {at}"
        made.append(claim("M4", what, value, "x", data["command"], at_least=LOWER, note=note))
        blocks, whole = rivals.get("mixed layer block"), rivals.get("mixed layer expert")
        if blocks and whole:
            value = whole["perplexity"] / blocks["perplexity"]
            what = f"perplexity of whole experts over that of single blocks, {at}"
            made.append(claim("M4", what, value, "x", data["command"], at_least=LOWER, note=note))
    final = [r for r in mixed if r["kind"] == FINAL]
    if final and uniform:
        beaten = [r for r in final if any(dominates(u, r) for u in uniform)]
        note = ", ".join(f"{r['bits']:.2f}: {r['perplexity']:.3f}" for r in sorted(final, key=lambda r: r["bits"]))
        what = f"points of {len(final)} of the front that a uniform row dominates"
        made.append(claim("M4", what, len(beaten), "points", data["command"], at_most=0, note=note))
    return [signed(each, data["machine"]) for each in made]


def dominates(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether a has no more bits and no more perplexity, and less of one."""
    no_more = a["bits"] <= b["bits"] + 1e-9 and a["perplexity"] <= b["perplexity"]
    return no_more and (a["bits"] < b["bits"] - NEAR or a["perplexity"] < b["perplexity"])


def of_suites(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """All claims of raw results by suite."""
    return [each for data in found.get("mxmoe", ()) for each in of_quality(data)]
