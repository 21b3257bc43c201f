"""Claims F1 to F7, the GPU fast path, from raw results: grids of `bench single`, ablations of `bench arms`, and times
of single kernels as the tuner measures them.

A kernel time is an object {"op", "shape", "batch", "arm", "microseconds", "bytes"}: op "linear" (where it is missing),
"attention" (a decode; with "context"), "uneven" (contexts of up to that) or "prefill" (attention of a whole prompt);
"ours" says whether the arm is this project's, and where it is missing, arms whose names begin with one of LIBRARIES are
not.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from tenfold.bench import (
    arms,
    claims_bits,
    claims_kv,
    claims_moe,
    claims_phases,
    claims_sentiment,
    claims_vlm,
    quality_gpu,
    soak,
)
from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.files import Suites, made_of
from tenfold.bench.report import by_model
from tenfold.bench.single import Result, Row, loaded

LIBRARIES = ("cublas", "library", "torch", "sdpa", "cudnn", "flash", "flashinfer", "hf", "vllm")
TPOT_LIMITS, TPOT_ON = {"llama-2-7b": 5.2, "llama-3-8b": 5.6}, "H100"  # ms at batch 1, context 1k, and on what
CONTEXT = 1024
LONG = 32768
PREFILL = 8192
PAGE = 16  # tokens of a page in `bench.kernels`
SMS = {"H100 80GB HBM3": 132, "H200": 132}  # multiprocessors of what kernels were timed on
MOST_GRID = 8  # requests of the grid that F2 asks for; larger batches are told apart

Timing = Mapping[str, Any]


def shape_name(model: str) -> str:
    return model.removeprefix("shape:").partition("@")[0]


def of_single(results: Sequence[Result]) -> list[Claim]:
    """F1, F2, F3 and the end-to-end half of F6. results: of one model and one machine, the peers' among them."""
    command = "; ".join(dict.fromkeys(result.command for result in results))
    found = [*_eager(results, command), *_compiled(results, command), *_vllm(results, command)]
    found += [*_tpot(results, command), *_prefill(results, command)]
    return [signed(made, results[0].machine) for made in found]


def points_of(results: Iterable[Result], engine: str) -> list[tuple[int, int]]:
    """(batch, context) where both we and `engine` decoded, in order."""
    results = list(results)
    points = {(r.batch, r.context) for result in results for r in result.rows if r.engine == engine and r.long}
    return sorted(p for p in points if any(result.row("tenfold", *p) for result in results))


def speedup(results: Iterable[Result], peer: str, batch: int, context: int) -> tuple[Figure, Row, Row]:
    """Peer's TPOT / ours at a point: round by round where both took turns in one run, else of the medians."""
    pairs = [(result.row("tenfold", batch, context), result.row(peer, batch, context)) for result in results]
    for ours, theirs in pairs:
        if ours and theirs and len(ours.long) == len(theirs.long) and peer in ours.beside:
            return paired_ratio(theirs.tpot_samples, ours.tpot_samples), ours, theirs
    ours = next(row for row, _ in pairs if row)
    theirs = next(row for _, row in pairs if row)
    return Figure((of(theirs) / of(ours),)), ours, theirs


def of(row: Row) -> float:
    """TPOT of a row that has decodes."""
    return median(row.tpot_samples)


def medians(ours: Row, theirs: Row) -> str:
    turn = "interleaved" if theirs.engine in ours.beside else "one after the other"
    return f"ours {of(ours):.2f} ms, theirs {of(theirs):.2f} ms, {len(ours.long)} rounds, {turn}"


def _eager(results: Sequence[Result], command: str) -> list[Claim]:
    points = points_of(results, "hf-generate")
    if not points:
        return []
    pairs = {p: speedup(results, "hf-generate", *p) for p in points}
    best = max(points, key=lambda p: pairs[p][0].median)
    ratio, ours, theirs = pairs[best]
    what = f"decode, {shape_name(results[0].model)}, best case of {len(points)} points, against transformers' generate"
    note = f"batch {best[0]}, context {best[1]}: {medians(ours, theirs)}; over all points "
    note += f"{min(p[0].median for p in pairs.values()):.1f}x to {ratio.median:.1f}x"
    peer = "transformers generate, eager"
    return [claim("F1", what, ratio.median, "x", command, at_least=12, against=peer, spread=ratio.spread, note=note)]


def _compiled(results: Sequence[Result], command: str) -> list[Claim]:
    found = []
    for batch, context in points_of(results, "hf-compiled"):
        ratio, ours, theirs = speedup(results, "hf-compiled", batch, context)
        what = (
            f"decode, {shape_name(results[0].model)}, batch {batch}, context {context}, against transformers compiled"
        )
        peer = "transformers, static cache + torch.compile(reduce-overhead)"
        spread, note = ratio.spread, medians(ours, theirs)
        found.append(
            claim("F1", what, ratio.median, "x", command, at_least=1.2, against=peer, spread=spread, note=note)
        )
    return found


def _vllm(results: Sequence[Result], command: str) -> list[Claim]:
    points = points_of(results, "vllm")
    if not points:
        return []
    name, peer = shape_name(results[0].model), "vLLM"
    compared = {p: speedup(results, "vllm", *p) for p in points}
    groups: dict[str, dict[tuple[int, int], float]] = {}  # of the grid, then what lies outside of it
    for point, (figure, ours, _) in compared.items():
        outside = f", batches above {MOST_GRID}" if point[0] > MOST_GRID else ""
        groups.setdefault(", contexts that differ" if ours.lengths else outside, {})[point] = figure.median
    found = []
    for where, own in sorted(groups.items()):
        worst = min(own, key=own.__getitem__)
        each = ", ".join(f"{b} x {c}: {r:.2f}" for (b, c), r in own.items())
        turn = medians(*compared[worst][1:])
        if not where:
            spread = min(own.values()), max(own.values())
            average = f"decode, {name}, geometric mean of {len(own)} points, against vLLM"
            mean = geometric_mean(list(own.values()))
            found.append(
                claim("F2", average, mean, "x", command, at_least=1.15, against=peer, spread=spread, note=each)
            )
        lowest = f"decode, {name}, worst of {len(own)} points{where}, against vLLM"
        note = f"{each}; {turn}" if where else turn
        found.append(claim("F2", lowest, own[worst], "x", command, at_least=1.0, against=peer, note=note))
    return found


def _tpot(results: Sequence[Result], command: str) -> list[Claim]:
    """F3, a time that was set for one kind of GPU: a row with the most rounds, so that a peer beside it costs nothing
    in certainty.
    """
    name = shape_name(results[0].model)
    there = [r for r in results if TPOT_ON in r.machine["hardware"]]
    rows = [(row, r) for r in there if (row := r.row("tenfold", 1, CONTEXT)) is not None]
    if name not in TPOT_LIMITS or not rows:
        return []
    row, result = max(rows, key=lambda pair: len(pair[0].long))
    figure, floor = Figure(tuple(row.tpot_samples)), result.floor(1, CONTEXT)
    against = "" if floor is None else f"floor {floor:.2f} ms"
    note = "" if floor is None else f"{100 * floor / figure.median:.0f} % of the limit set by memory"
    what = f"time per output token, {name}, batch 1, context {CONTEXT}"
    limit = TPOT_LIMITS[name]
    return [
        claim("F3", what, figure.median, "ms", command, at_most=limit, against=against, spread=figure.spread, note=note)
    ]


def _prefill(results: Sequence[Result], command: str) -> list[Claim]:
    """F6 end to end: useful operations over time, as a share of the ceiling of a matrix product in the same run."""
    rows = [(row, r) for r in results if (row := r.row("tenfold", 1, PREFILL, False)) and r.sizes and r.matmul_tflops]
    if not rows:
        return []
    row, result = max(rows, key=lambda pair: len(pair[0].short))
    assert result.sizes is not None
    flops = result.sizes.prefill_flops(1, PREFILL)
    shares = Figure(tuple(100 * flops / (1e-3 * ms) / (1e12 * result.matmul_tflops) for ms in row.prefill_samples))
    against = f"{result.matmul_tflops:.0f} TFLOP/s of an 8192^3 product"
    note = f"{row.prefill:.1f} ms for {flops / 1e12:.0f} TFLOP, causal attention counted once"
    what = f"prefill of {PREFILL} tokens end to end, {shape_name(result.model)}, share of the matrix ceiling"
    return [
        claim("F6", what, shares.median, "%", command, at_least=60, against=against, spread=shares.spread, note=note)
    ]


# Kernels by themselves


def is_ours(row: Timing) -> bool:
    ours = row.get("ours")
    return not str(row["arm"]).startswith(LIBRARIES) if ours is None else bool(ours)


def grouped(rows: Iterable[Timing], *keys: str) -> dict[tuple[Any, ...], list[Timing]]:
    found: dict[tuple[Any, ...], list[Timing]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def rate(row: Timing) -> float:
    """GB/s."""
    return float(row["bytes"]) / (1e3 * float(row["microseconds"]))


def fastest(rows: Iterable[Timing], wanted: Callable[[Timing], bool] = lambda row: True) -> Timing | None:
    return min((row for row in rows if wanted(row)), key=lambda row: float(row["microseconds"]), default=None)


def of_kernels(rows: Sequence[Timing], copy_gbs: float, machine: Mapping[str, str], command: str) -> list[Claim]:
    """F4, F5, the kernel half of F6, and V1. copy_gbs: copy bandwidth measured in the same run."""
    by_op = grouped(({"op": "linear"} | dict(row) for row in rows), "op")
    sms = next((count for name, count in SMS.items() if name in machine["hardware"]), 0)
    found = [*_linears(by_op.get(("linear",), []), copy_gbs, command, sms)]
    found += _attention(by_op.get(("attention",), []), copy_gbs, command, sms)
    found += _uneven(by_op.get(("uneven",), []), copy_gbs, command)
    found += _prefill_kernels(by_op.get(("prefill",), []), command)
    found += _three_bits(by_op.get(("packed",), []), copy_gbs, command)
    return [signed(made, machine) for made in found]


def ruled(group: Iterable[Timing], sms: int) -> tuple[str, Timing | None]:
    """The arm that an engine runs where `tenfold tune` measured nothing, "" where that cannot be told, and its row. Of
    attention that is the lazy softmax, without statistics of the model.
    """
    group = list(group)
    try:
        arm = rule_of(group[0], sms) if sms else ""
    except ImportError:  # the rules need Triton
        arm = ""
    lazy = arm.replace("decode:", "decode:lazy:", 1)
    return arm, fastest(group, lambda row: row["arm"] in (arm, lazy))


def rule_of(row: Timing, sms: int) -> str:
    """The arm of the rule for a shape as `bench.kernels` names it, "" for any other."""
    from tenfold.ops.gpu import arms as linears
    from tenfold.ops.gpu import attending
    from tenfold.ops.kernels import AttentionSpec

    if found := re.fullmatch(r"(\d+)/(\d+) heads of (\d+)", row["shape"]):
        heads, kv_heads, head_dim = map(int, found.groups())
        spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5)
        return attending.rule(attending.Reading(spec, row["batch"], row["context"], PAGE), sms)
    if found := re.fullmatch(r"linear(\S*) (\d+) x (\d+)", row["shape"]):
        parts = found[1].split("+")
        act = next((act for act in linears.ACTS if act in parts), None)
        use = linears.Use("norm" in parts, act, "residual" in parts, "float32" in parts)
        return linears.rule(linears.Work(int(found[2]), int(found[3]), "dense", use, row["batch"]), sms)
    return ""


def _linears(rows: Sequence[Timing], copy_gbs: float, command: str, sms: int) -> list[Claim]:
    points = {key: group for key, group in grouped(rows, "shape", "batch").items() if key[1] <= 64}
    rules = {key: row for key, group in points.items() if (row := ruled(group, sms)[1])}
    shares = {key: 100 * rate(best) / copy_gbs for key, group in points.items() if (best := fastest(group))}
    if not shares:
        return []
    worst = min(shares, key=shares.__getitem__)
    below = [f"{shape} at {batch} ({share:.0f} %)" for (shape, batch), share in sorted(shares.items()) if share < 90]
    note = f"lowest at {worst[0]}, batch {worst[1]}; mean {sum(shares.values()) / len(shares):.0f} %"
    note += "; below 90 %: " + ", ".join(below[:8]) + (f" and {len(below) - 8} more" if len(below) > 8 else "")
    if rules:
        least = min(rules.values(), key=rate)
        note += f"; by the rule, where nothing was measured, from {100 * rate(least) / copy_gbs:.0f} % "
        note += f"({least['shape']} at {least['batch']}, {least['arm']}; timed at {len(rules)} of {len(points)})"
    what = f"weight traffic of decode linears, worst of {len(shares)} shapes and batches 1 to 64, share of a copy"
    spread, against = (min(shares.values()), max(shares.values())), f"copies at {copy_gbs:.0f} GB/s"
    found = [claim("F4", what, shares[worst], "%", command, at_least=90, against=against, spread=spread, note=note)]
    ratios: dict[tuple[Any, ...], float] = {}
    alone, ruling = dict(ratios), dict(ratios)
    for key, group in points.items():
        library = fastest(group, lambda row: str(row["arm"]).startswith("cublas"))
        best, own = fastest(group), fastest(group, is_ours)
        if library and best:
            took = float(library["microseconds"])
            ratios[key] = took / float(best["microseconds"])
            alone |= {key: took / float(own["microseconds"])} if own else {}
            ruling |= {key: took / float(rules[key]["microseconds"])} if key in rules else {}
    if ratios:
        slowest, wins = min(ratios, key=ratios.__getitem__), sum(r > 1 for r in ratios.values())
        what = f"decode linears against cuBLAS, worst of {len(ratios)} shapes and batches 1 to 64"
        note = f"at {slowest[0]}, batch {slowest[1]}; another arm wins at {wins} of {len(ratios)}; geometric mean "
        note += f"{geometric_mean(list(ratios.values())):.2f}x; cuBLAS is one of the arms, so less than 1 cannot be"
        if alone:
            note += f": our own alone reach {min(alone.values()):.3g}x at least"
        if ruling:
            at = min(ruling, key=ruling.__getitem__)
            note += f"; by the rule from {ruling[at]:.2f}x ({at[0]} at {at[1]}, {rules[at]['arm']}; timed at "
            note += f"{len(ruling)} of {len(ratios)})"
        spread = min(ratios.values()), max(ratios.values())
        value = ratios[slowest]
        found.append(claim("F4", what, value, "x", command, at_least=1.0, against="cuBLAS", spread=spread, note=note))
    return found


def _attention(rows: Sequence[Timing], copy_gbs: float, command: str, sms: int) -> list[Claim]:
    found = []
    for (shape, batch, context), group in sorted(grouped(rows, "shape", "batch", "context").items()):
        best = fastest(group, is_ours)
        if best is None or context != LONG or batch not in (1, 8):
            continue
        share = 100 * rate(best) / copy_gbs
        what = f"decode attention, {shape}, batch {batch}, context {context}, share of a copy"
        note = f"the fastest arm, {best['arm']}, {float(best['microseconds']):.1f} us, {rate(best):.0f} GB/s"
        arm, timed = ruled(group, sms)
        if timed is not None:
            note += f"; by the rule {timed['arm']} {float(timed['microseconds']):.1f} us, "
            note += f"{100 * rate(timed) / copy_gbs:.0f} %"
        elif arm:
            note += f"; the rule's, {arm}, was not timed"
        against = f"copies at {copy_gbs:.0f} GB/s"
        found.append(claim("F5", what, share, "%", command, at_least=85, against=against, note=note))
    return found


def _uneven(rows: Sequence[Timing], copy_gbs: float, command: str) -> list[Claim]:
    """Contexts that differ in length: shared out by it against the best number of splits that is the same for all."""
    found = []
    for (shape, batch, context), group in sorted(grouped(rows, "shape", "batch", "context").items()):
        even = fastest(group, lambda row: row["arm"].endswith(":even"))
        same = fastest(group, lambda row: row["arm"].startswith("decode:") and not row["arm"].endswith(":even"))
        if not (even and same):
            continue
        ratio = float(same["microseconds"]) / float(even["microseconds"])
        what = f"decode attention, {shape}, {batch} contexts of up to {context} tokens, by length over splits for all"
        note = f"{even['arm']} {float(even['microseconds']):.1f} us, {100 * rate(even) / copy_gbs:.0f} % of a copy; "
        note += f"{same['arm']} {float(same['microseconds']):.1f} us"
        found.append(claim("F5", what, ratio, "x", command, at_least=1.0, against=str(same["arm"]), note=note))
    return found


def _prefill_kernels(rows: Sequence[Timing], command: str) -> list[Claim]:
    """Our fastest arm alone: PyTorch's attention is an arm of the engine only behind a copy of pages."""
    found = []
    for (shape, batch, context), group in sorted(grouped(rows, "shape", "batch", "context").items()):
        ours, library = fastest(group, is_ours), fastest(group, lambda row: not is_ours(row))
        if not (ours and library) or context != PREFILL:
            continue
        ratio = float(library["microseconds"]) / float(ours["microseconds"])
        what = f"attention of a prefill, {shape}, batch {batch}, {context} tokens, against the fastest of SDPA"
        note = f"arm {ours['arm']} {float(ours['microseconds']):.0f} us, "
        note += f"{library['arm']} {float(library['microseconds']):.0f} us"
        plain = fastest(group, lambda row: is_ours(row) and "unified" not in row["arm"] and "paper" not in row["arm"])
        if plain and plain is not ours:
            note += f"; without statistics for a unified maximum {float(plain['microseconds']):.0f} us ({plain['arm']})"
        found.append(claim("F6", what, ratio, "x", command, at_least=1.0, against=str(library["arm"]), note=note))
    return found


# Fewer bits

LARGE = 10 << 20  # bytes of packed weights from which on reading them is what counts


def _three_bits(rows: Sequence[Timing], copy_gbs: float, command: str) -> list[Claim]:
    """V1: one token, weights of 3 bits against bfloat16 by cuBLAS, and their bytes against a copy's."""
    found = []
    by_shape = grouped((row for row in rows if row["batch"] == 1), "shape")
    for (shape,), group in by_shape.items():
        dense = fastest(group, lambda row: row["format"] == "dense")
        ours = fastest(group, lambda row: str(row["format"]).startswith("int3"))
        if not (dense and ours):
            continue
        ratio = float(dense["microseconds"]) / float(ours["microseconds"])
        note = f"arm {ours['arm']} {float(ours['microseconds']):.1f} us, cuBLAS {float(dense['microseconds']):.1f} us"
        large = int(ours["bytes"]) >= LARGE
        size = "" if large else f"; {int(ours['bytes']) >> 20} MiB, too small for 3x to be asked for"
        what = f"W3A16 ({ours['format']}) {shape}, batch 1, against bfloat16"
        least = 3.0 if large else 1.0
        found.append(claim("V1", what, ratio, "x", command, at_least=least, against="cuBLAS", note=note + size))
        if large:
            share, against = 100 * rate(ours) / copy_gbs, f"copies at {copy_gbs:.0f} GB/s"
            what = f"W3A16 ({ours['format']}) {shape}, batch 1, packed bytes, share of a copy"
            found.append(claim("V1", what, share, "%", command, at_least=70, against=against, note=note))
    return found


BITS = (("int4 over bfloat16", 1, 2.5, "W4A16"), ("fp8 over bfloat16", 64, 1.4, "FP8"))


def of_arms(result: arms.Result) -> list[Claim]:
    """F7 from the ablations of weight formats."""
    found = []
    for name, batch, least, label in BITS:
        for row in (r for r in result.rows if (r.name, r.batch) == (name, batch)):
            off, on = (median(samples) for samples in (row.off_ms, row.on_ms))
            what = f"{label} over bf16, {shape_name(result.model)}, batch {batch}, context {row.context}"
            note = f"{off:.2f} ms and {on:.2f} ms per output token, {len(row.on_ms)} interleaved rounds"
            more: dict[str, Any] = {"against": "the same engine in bf16", "spread": row.gain.spread, "note": note}
            found.append(claim("F7", what, row.gain.median, "x", result.command, at_least=least, **more))
    return [signed(made, result.machine) for made in found]


def of_folder(folder: Path) -> list[Claim]:
    """Every claim that the raw results of a folder bear out; kernel times are files of suite "kernels" with `rows`,
    `copy_gbs` and `machine`. Raises ValueError for a folder without results and for a file that is not complete.
    """
    return made_of(folder, of_suites)


def of_suites(found: Suites) -> list[Claim]:
    """Every claim of raw results by suite. Runs with weights of fewer bits are no answer to what is claimed of a model
    as it is.
    """
    made: list[Claim] = []
    singles = sorted((loaded(data) for data in found.get("single", ())), key=lambda result: result.weights)
    plain = [result for result in singles if result.rows and not result.weights]
    for model, results in by_model(plain).items():
        if shape_name(model) not in (claims_moe.WHOLE, claims_bits.VLM):  # of which other things are claimed
            made += of_single(results)
    made += claims_moe.of_models(singles) + claims_bits.of_models(singles)
    for data in found.get("arms", ()):
        made += of_arms(arms.loaded(data))
    for data in found.get("kernels", ()):
        made += of_kernels(data["rows"], data["copy_gbs"], data["machine"], data.get("command", "tenfold tune"))
    for data in found.get("quality", ()):
        made += quality_gpu.claims_of(quality_gpu.loaded(data))
    made += soak.claims_of([soak.loaded(data) for data in found.get("soak", ())])
    made += claims_vlm.of_suites(found)
    made += claims_kv.of_results(found) + claims_phases.of_suites(found) + claims_moe.of_suites(found)
    return made + claims_sentiment.of_suites(found)
