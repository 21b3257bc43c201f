"""Claims M1 to M5 of mixture-of-experts models: times of a layer's experts (`bench.moe`), mixed bits against uniform
ones (`bench.mxmoe`), and whole models (`bench.single`).
"""

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.claims_bits import over_bfloat16
from tenfold.bench.single import Result
from tenfold.weights.shapes import MIXED

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
            what = f"{measure} {what}, at {row['bits']:.2f} bits, schemes from {least(data)}"
            made.append(claim("M4", what, value, "x", data["command"], at_least=LOWER, note=note))
    return made


def _front(data: Mapping[str, Any], measure: str) -> list[Claim]:
    uniform = [r for r in data["rows"] if r["kind"].startswith("uniform")]
    final = sorted((r for r in data["rows"] if r["kind"] == FINAL), key=lambda r: r["bits"])
    if not final or not uniform:
        return []
    beaten = [r for r in final if any(dominates(u, r, measure) for u in uniform)]
    note = ", ".join(f"{r['bits']:.2f}: {r[measure]:.4g}" for r in final)
    what = f"points of {len(final)} of the front that a uniform row dominates in {measure}, schemes from {least(data)}"
    return [claim("M4", what, len(beaten), "points", data["command"], at_most=0, note=note)]


def least(data: Mapping[str, Any]) -> str:
    """The scheme of the fewest bits that blocks could get."""
    return min(data["schemes"], key=data["schemes"].__getitem__)


def dominates(a: Mapping[str, Any], b: Mapping[str, Any], measure: str) -> bool:
    """Whether a has no more bits and no more of the measure, and less of one."""
    no_more = a["bits"] <= b["bits"] + 1e-9 and a[measure] <= b[measure]
    return no_more and (a["bits"] < b["bits"] - NEAR or a[measure] < b[measure])


# Times of a layer's experts

DENSE, FEW, SOME, MANY = "bfloat16", 64, 512, 8192  # tokens: of a decode at most, and of prompts
FIVE, ABOVE, FOUR = "mixed 5 bits", "mixed 4.5 bits", "mixed 4 bits"
UNIFORM = ("w8a8", "w4a16")
Row = Mapping[str, Any]


def of_kernels(data: Mapping[str, Any]) -> list[Claim]:
    """M1 to M3, of both products of a layer, picks sorted before."""
    rows = [row for row in data["rows"] if not row["whole"]]
    made = [*_mixed(rows, data["command"]), *_uniform(rows, data["command"]), *_dense(rows, data)]
    return [signed(each, data["machine"]) for each in made]


def fastest(rows: Sequence[Row], ours: bool | None = True, **wanted: Any) -> Row | None:
    """Of rows with these values; ours None: the rivals' too."""
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items()) and ours in (None, r["ours"])]
    return min(found, key=lambda row: float(row["microseconds"]), default=None)


def _points(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Models and numbers of tokens."""
    return list(dict.fromkeys((row["model"], row["tokens"]) for row in rows))


def told(row: Row) -> str:
    bound = "reading" if row["read"] > row["compute"] else "arithmetic"
    share = 100 * max(row["read"], row["compute"]) / row["microseconds"]
    return f"{row['microseconds']:.0f} us, {share:.0f} % of what {bound} allows ({row['arm']})"


def _mixed(rows: Sequence[Row], command: str) -> list[Claim]:
    """M1: mixed formats, about 4 bits for few tokens and about 5 for many, over the faster of our products in bfloat16
    and the libraries'.
    """
    made = []
    for model, tokens in _points(rows):
        least = 2.5 if tokens <= FEW else {SOME: 2.0, MANY: 1.2}.get(tokens, 1.0)
        dense = fastest(rows, None, model=model, tokens=tokens, format=DENSE)
        for format in (FOUR, ABOVE) if tokens <= FEW else (ABOVE, FIVE):
            mixed = fastest(rows, model=model, tokens=tokens, format=format)
            if mixed and dense:
                what = f"experts of {model.removeprefix('shape:')}, {tokens} tokens, {format}, over bfloat16"
                value = dense["microseconds"] / mixed["microseconds"]
                more: dict[str, Any] = {"against": str(dense["arm"]), "note": f"{told(mixed)}; bfloat16 {told(dense)}"}
                made.append(claim("M1", what, value, "x", command, at_least=least, **more))
    return made


def _uniform(rows: Sequence[Row], command: str) -> list[Claim]:
    """M2: mixed bits against uniform W8A8, whose accuracy a mix of 5 bits is to match, and against W4A16 that of as
    many bits; those of more bits beside W4A16, too.
    """
    made = []
    for uniform, mix in (("w8a8", FIVE), ("w4a16", FOUR), ("w4a16", ABOVE), ("w4a16", FIVE)):
        gains, notes = {}, []
        for model, tokens in _points(rows):
            mixed = fastest(rows, model=model, tokens=tokens, format=mix)
            others = {name: fastest(rows, model=model, tokens=tokens, format=name) for name in UNIFORM}
            own = others[uniform]
            if mixed and own:
                gains[model, tokens] = own["microseconds"] / mixed["microseconds"]
                each = [f"{k} {v['microseconds'] / mixed['microseconds']:.2f}" for k, v in others.items() if v]
                notes.append(f"{model.removeprefix('shape:')} {tokens}: {', '.join(each)}")
        if not gains:
            continue
        values = list(gains.values())
        spread = 100 * (min(values) - 1), 100 * (max(values) - 1)
        mean, best = 100 * (geometric_mean(values) - 1), spread[1]
        what, note = f"time of {uniform.upper()} experts over that of {mix}", "; ".join(notes)
        made += [
            claim("M2", f"{what}, mean of {len(values)}", mean, "%", command, at_least=10, spread=spread, note=note),
            claim("M2", f"{what}, best of {len(values)}", best, "%", command, at_least=25),
        ]
    return made


def _dense(rows: Sequence[Row], data: Mapping[str, Any]) -> list[Claim]:
    """M3: our products in bfloat16 against the libraries', and of few tokens against a copy."""
    rivals, loops, shares = {}, {}, {}
    for model, tokens in _points(rows):
        ours = fastest(rows, model=model, tokens=tokens, format=DENSE)
        if ours is None:
            continue
        name = f"{model.removeprefix('shape:')} {tokens}"
        theirs = fastest(rows, False, model=model, tokens=tokens, format=DENSE)
        loop = fastest(rows, False, model=model, tokens=tokens, format=DENSE, arm="cublas loop")
        if theirs:
            rivals[name] = theirs["microseconds"] / ours["microseconds"]
        if loop:
            loops[name] = loop["microseconds"] / ours["microseconds"]
        if tokens <= FEW:
            shares[name] = 100 * ours["read"] / ours["microseconds"]
    made = []
    for what, values, unit, least, against in (
        ("speed of bfloat16 experts over the better library's", rivals, "x", 0.9, "torch._grouped_mm, cuBLAS loop"),
        ("speed of bfloat16 experts over a loop of cuBLAS products", loops, "x", 1.0, "cuBLAS loop"),
        ("bytes of bfloat16 experts, share of a copy", shares, "%", 80, f"copies at {data['copy_gbs']:.0f} GB/s"),
    ):
        if values:
            worst = min(values, key=values.__getitem__)
            each = ", ".join(f"{name}: {value:.2f}" for name, value in values.items())
            spread, title = (min(values.values()), max(values.values())), f"{what}, worst of {len(values)}"
            note, command = f"at {worst}; {each}", data["command"]
            value = values[worst]
            made.append(
                claim("M3", title, value, unit, command, at_least=least, against=against, spread=spread, note=note)
            )
    return made


# Whole models

WHOLE, CONTEXT = "qwen3-30b-a3b", 512
BATCHES = (1, 8, 64)
# Milliseconds a step of vLLM 0.26 in bfloat16, random routing, on one GPU: where it did not run beside.
VLLM, VLLM_ON = {1: 4.73, 8: 11.99, 64: 24.5}, "H100"


def of_models(results: Sequence[Result]) -> list[Claim]:
    """M5, of runs in bfloat16 against vLLM on the same hardware, and of those with fewer bits."""
    names = {f"shape:{WHOLE}": "", **{f"shape:{WHOLE}@mixed={n}": f"experts of mixed {n} bits" for n in MIXED}}
    own = [result for result in results if result.model in names]
    modes = [(", the rest ".join(filter(None, (names[result.model], result.weights))), result) for result in own]
    plain = [result for mode, result in modes if not mode]
    made = [each for result in plain for batch in BATCHES if (each := _against_vllm(result, own, batch))]
    for mode, result in modes:
        for batch in BATCHES if mode else ():
            what = f"decode, {WHOLE}, batch {batch}, context {CONTEXT}, {mode} over bfloat16"
            least = 2.0 if batch > 1 else 1.0
            if each := over_bfloat16("M5", what, least, plain, result, (batch, CONTEXT, True)):
                made.append(each)
    return made


def _against_vllm(result: Result, results: Sequence[Result], batch: int) -> Claim | None:
    """Of a run in bfloat16; None where it or vLLM's step is not known."""
    row, (theirs, how) = result.row("tenfold", batch, CONTEXT), vllm_step(results, result.machine["hardware"], batch)
    if row is None or row.tpot is None or theirs is None:
        return None
    floor = result.floor(batch, CONTEXT)
    note = f"{row.tpot:.2f} ms a step" + ("" if floor is None else f", floor {floor:.2f} ms")
    note += f"; vLLM {theirs:.4g} ms, {how}"
    what = f"decode, {WHOLE}, batch {batch}, context {CONTEXT}, bfloat16, against vLLM"
    made = claim("M5", what, theirs / row.tpot, "x", result.command, at_least=1.15, against="vLLM", note=note)
    return signed(made, result.machine)


def vllm_step(results: Sequence[Result], hardware: str, batch: int) -> tuple[float | None, str]:
    """Milliseconds of a step of vLLM on this hardware, and how they were measured; None: that is not known."""
    for result in results:
        row = result.row("vllm", batch, CONTEXT)
        if row is not None and result.machine["hardware"] == hardware:
            return row.tpot, "one after the other"
    return (VLLM[batch], "measured before") if VLLM_ON in hardware else (None, "")


def of_suites(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """Claims of raw results by suite, but for whole models."""
    made = [each for data in found.get("moe", ()) for each in of_kernels(data)]
    return made + [each for data in found.get("mxmoe", ()) for each in of_quality(data)]
