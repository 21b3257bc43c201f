"""Claims K1 to K4, the KV formats, from raw results of `bench.kv` and `bench.kv_quality`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.bench import kv
from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.kv import Result, Row
from tenfold.bench.kv_quality import subject

MILLION = 1 << 20
DOMINATED = 0.5  # of the bytes of a step with a cache as computed: keys and values
NEAR = 0.26  # bits a number
LONG = 32768  # tokens of all contexts, from which on a kernel's bandwidth counts
DENSE = "dense"
DEFAULT = "skvq"  # has rows of its own wherever it was measured
KIVI = "KIVI"


def of_speed(results: Sequence[Result]) -> list[Claim]:
    """K1 to K3. results: on GPUs; those of one model together."""
    made = []
    for result in results:
        rows = [row for row in result.rows if row.format != DENSE]
        found = [*_million(result, rows), *_gains(result, rows), *_bandwidth(result, rows)]
        made += [signed(each, result.machine) for each in found]
    return made


def name_of(result: Result) -> str:
    return result.name.removeprefix("shape:")


def _million(result: Result, rows: Sequence[Row]) -> list[Claim]:
    longest = max((row for row in rows if row.steps), key=lambda row: row.context, default=None)
    if longest is None or longest.context < MILLION:
        return []
    what = f"context decoded on one GPU, {name_of(result)}, {longest.format}"
    note = f"{longest.median:.1f} ms a step; the pages were filled with numbers, not computed. {longest.memory}"
    return [claim("K1", what, longest.context, "tokens", result.command, at_least=MILLION, note=one_line(note))]


def one_line(text: str) -> str:
    return "; ".join(" ".join(line.split()) for line in text.splitlines())


def dominated(result: Result, row: Row) -> bool:
    """Whether keys and values are most of what a step reads where they are as computed."""
    read = row.batch * row.context * result.formats[DENSE]["bytes_per_token"]
    return read >= DOMINATED * (read + result.streamed)


def _gains(result: Result, rows: Sequence[Row]) -> list[Claim]:
    if DENSE not in result.formats:
        return []
    made = []
    wide = [row for row in rows if dominated(result, row)]
    for kind, gain, least in (("in attention", result.layer_gain, 4.0), ("end to end", result.gain, 3.0)):
        gains = {id(row): found for row in wide if (found := gain(row)) is not None}
        own = [row for row in wide if id(row) in gains]
        others = ", ".join(f"{r.format} at {r.batch} x {r.context}: {gains[id(r)]:.2f}" for r in own)
        for best in _best(own, gains):
            what = f"decode {kind}, {name_of(result)}, {best.format}, {best.batch} x {best.context}, against 16-bit KV"
            rounds = result.gains(best) if gain == result.gain else None  # attention is timed once
            spread = None if rounds is None else rounds.spread
            about = what, gains[id(best)], "x", result.command
            made.append(claim("K2", *about, at_least=least, spread=spread, note=others))
    return [*made, *_throughput(result, wide)]


def _best(rows: Sequence[Row], values: Mapping[int, float]) -> list[Row]:
    """The row of the largest value (by id of a row) and, where that is of another format, the best of the default."""
    found = []
    for some in (rows, [row for row in rows if row.format == DEFAULT]):
        best = max(some, key=lambda row: values[id(row)], default=None)
        if best is not None and best not in found:
            found.append(best)
    return found


def _throughput(result: Result, rows: Sequence[Row]) -> list[Claim]:
    """Tokens a second where a cache as computed does not fit, over those of the largest batch that does."""
    gains: dict[int, tuple[float, Row]] = {}
    for row in rows:
        smaller = [r for r in result.rows if (r.format, r.context) == (DENSE, row.context) and r.steps]
        if row.steps and smaller and result.row(DENSE, row.batch, row.context) is None:
            largest = max(smaller, key=lambda r: r.batch)
            gains[id(row)] = row.batch / row.median / (largest.batch / largest.median), largest
    own, made = [row for row in rows if id(row) in gains], []
    note = ", ".join(f"{r.format} at {r.batch} x {r.context}: {gains[id(r)][0]:.2f}" for r in own)
    for best in _best(own, {place: gain for place, (gain, _) in gains.items()}):
        gain, dense = gains[id(best)]
        what = (
            f"decode, tokens a second, {name_of(result)}, {best.format}, {best.batch} x {best.context}, where 16-bit "
            f"KV does not fit, against it at {dense.batch} x {dense.context}"
        )
        share = best.batch / dense.batch  # rounds of two points are no pairs: the spread is that of all of them
        spread = share * min(dense.steps) / max(best.steps), share * max(dense.steps) / min(best.steps)
        made.append(claim("K2", what, gain, "x", result.command, at_least=3.0, spread=spread, note=note))
    return made


def _bandwidth(result: Result, rows: Sequence[Row]) -> list[Claim]:
    timed = [row for row in rows if row.layer_us and row.batch * row.context >= LONG]
    if not timed:
        return []
    shares = {id(r): 100 * r.layer_read / r.layer_us / 1e3 / result.copy_gbs for r in timed}
    made = []
    for format in dict.fromkeys(row.format for row in timed):
        own = [row for row in timed if row.format == format]
        best = max(own, key=lambda row: shares[id(row)])
        others = ", ".join(f"{r.batch} x {r.context}: {shares[id(r)]:.0f} %" for r in own)
        what = f"attention over packed pages, {name_of(result)}, {format}, {best.batch} x {best.context}"
        made.append(
            claim("K3", f"{what}, share of a copy", shares[id(best)], "%", result.command, at_least=70.0, note=others)
        )
    return made


def of_quality(data: Mapping[str, Any]) -> list[Claim]:
    """K4: every SKVQ format of two bits against the best other one of as many, or up to NEAR more: in perplexity, and
    in codes found far back.
    """
    rows = data["rows"]
    skvq = [r for r in rows if r["format"].startswith("SKVQ k2") and "," not in r["format"]]
    rivals = [r for r in rows[1:] if not r["format"].startswith("SKVQ")]
    made = []
    for row in skvq:
        equal = [r for r in rivals if row["bits"] <= r["bits"] <= row["bits"] + NEAR]
        if equal:
            within = _within(equal, rivals)
            found = _perplexity(data, row, equal, within), _found(data, row, equal, within)
            made += [signed(each, data["machine"]) for each in found]
    return made


def _within(equal: Sequence[Mapping[str, Any]], rivals: Sequence[Mapping[str, Any]]) -> str:
    """Which rivals count, and where none of KIVI's style is among them, how many bits those take."""
    said = "held against: " + " · ".join(r["format"] for r in equal)
    kivi = [r["bits"] for r in rivals if r["format"].startswith(KIVI)]
    if kivi and not any(r["format"].startswith(KIVI) for r in equal):
        said += f"; none of {KIVI}'s style has so few bits, they take {min(kivi):.3g} or more"
    return said


def _perplexity(
    data: Mapping[str, Any], row: Mapping[str, Any], equal: Sequence[Mapping[str, Any]], within: str
) -> Claim:
    exact, best = data["rows"][0], min(equal, key=lambda r: r["perplexity"])
    own, theirs = (f"{r['perplexity']:.2f} ({r['perplexity'] / exact['perplexity'] - 1:+.1%}" for r in (row, best))
    rival = "perplexity of the best other format of as many bits"
    what = f"{rival} over that of {row['format']}, {row['bits']} bits, {subject(data)}"
    note = f"{own} over 16 bits), {best['format']} at {best['bits']} bits {theirs}); {within}"
    return claim("K4", what, best["perplexity"] / row["perplexity"], "x", data["command"], at_least=1.0, note=note)


def _found(data: Mapping[str, Any], row: Mapping[str, Any], equal: Sequence[Mapping[str, Any]], within: str) -> Claim:
    best = max(equal, key=lambda r: r["found"])
    what = (
        f"codes found far back in a prompt, of {row['asked']}, {row['format']}, {row['bits']} bits, "
        f"{subject(data)}, against the best other format of as many bits"
    )
    note = (
        f"{best['format']} at {best['bits']} bits finds {best['found']}, 16 bits {data['rows'][0]['found']}; {within}"
    )
    return claim("K4", what, row["found"], "codes", data["command"], at_least=best["found"], note=note)


def of_results(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """All claims of raw results by suite."""
    on_gpu = [kv.loaded(data) for data in found.get("kv", ()) if "cuda" in data["machine"]]
    return [*of_speed(on_gpu), *(each for data in found.get("kv-quality", ()) for each in of_quality(data))]
