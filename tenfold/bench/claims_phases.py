"""Claims P1 to P5, prompts and answers side by side, from raw results of `bench.phases`.

An arm that has two GPUs counts per GPU, and not where latencies are compared. vLLM is told apart from our own rivals.
Rivals take prompts in the order they come, as the engines do that the paper is held against; where a run has no such
arm, all of ours whose border does not move are. Those that overtake too have a claim of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.bench import phases
from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.phases import Result, Row
from tenfold.engine.phases.table import DISAGGREGATED

ATTAINED = 0.9  # of requests that keep both targets
OURS = ("adaptive", "staircase", "paper")  # arms whose border moves; others are rivals
DEFAULT = "adaptive"
CHUNKED = "chunked"


def capacity(result: Result, arm: str, kind: str) -> float:
    """The highest rate at which a share of ATTAINED keeps both targets, between measured rates in proportion; 0: not
    even the lowest one. kind: "tight" or "loose". Per GPU.
    """
    rows = sorted((row for row in result.rows if row.arm == arm), key=lambda row: row.rate)
    best, before = 0.0, None
    for row in rows:
        share = getattr(row, kind)
        if share >= ATTAINED:
            best = row.rate
        elif before is not None and getattr(before, kind) >= ATTAINED:
            last = getattr(before, kind)
            best = before.rate + (row.rate - before.rate) * (last - ATTAINED) / (last - share)
        before = row
    return best / _gpus(arm)


def _gpus(arm: str) -> int:
    return 2 if phases.bare(arm) == DISAGGREGATED else 1


def rivals(result: Result) -> list[str]:
    """Our own arms whose border does not move, in the order of arrival where there are such."""
    ours = _fixed(result)
    return [arm for arm in ours if phases.ARRIVAL in arm] or ours


def kin(result: Result) -> list[str]:
    """Our other arms whose border does not move, which differ from ours by nothing but that."""
    return [arm for arm in _fixed(result) if arm not in rivals(result)]


def _fixed(result: Result) -> list[str]:
    return [arm for arm in result.arms if arm not in OURS and not phases.is_peer(arm)]


def peers(result: Result) -> list[str]:
    return [arm for arm in result.arms if phases.is_peer(arm)]


def of_results(results: Sequence[Result]) -> list[Claim]:
    made: list[Claim] = []
    for result in results:
        if DEFAULT not in result.arms or not result.rows:
            continue
        found = [*_rates(result), *_latency(result)]
        found += _gaps(result) if result.long else [*_flips(result), *_full(result)]
        made += [signed(each, result.machine) for each in found]
    return made


def name_of(result: Result) -> str:
    """The model, and what prompts are mixed in."""
    mix = f", {result.long:.0%} prompts of {result.long_tokens}" if result.long else ""
    return result.model.removeprefix("shape:").partition("@")[0] + mix


def _rates(result: Result) -> list[Claim]:
    made = []
    for kind, times in (("tight", phases.TIGHT), ("loose", phases.LOOSE)):
        rates = {arm: capacity(result, arm, kind) for arm in result.arms}
        about = (
            f"requests a second at {ATTAINED:.0%} attainment, {name_of(result)}, {kind} targets ({times:g} times alone)"
        )
        note = ", ".join(f"{arm}: {rate:.1f}" for arm, rate in rates.items())
        for group, least, against in (
            (rivals(result), 1.5, "the best of our rivals"),
            (kin(result), 1.0, "the best of our arms that overtake too"),
            *(([peer], 1.0, "vLLM") for peer in peers(result)),
        ):
            best = max(group, key=rates.__getitem__, default="")
            if best and rates[best]:
                what, value = f"{about}, {DEFAULT} over {best}", rates[DEFAULT] / rates[best]
                made.append(claim("P1", what, value, "x", result.command, at_least=least, against=against, note=note))
    return made


def _latency(result: Result) -> list[Claim]:
    rate = max(row.rate for row in result.rows)
    rows = {row.arm: row for row in result.rows if row.rate == rate}
    others = [rows[arm] for arm in rivals(result) if arm in rows and _gpus(arm) == 1]
    if DEFAULT not in rows or not others:
        return []
    about = f"mean latency to the last token at {rate:g} requests a second, {name_of(result)}"
    note = ", ".join(f"{arm}: {row.latency:.2f} s" for arm, row in rows.items())

    def over(row: Row, least: float, against: str) -> Claim:
        what, value = f"{about}, {row.arm} over {DEFAULT}", row.latency / rows[DEFAULT].latency
        return claim("P2", what, value, "x", result.command, at_least=least, against=against, note=note)

    best = min(others, key=lambda row: row.latency)
    found = [over(best, 1.27, "the best of our rivals")]
    return found + [over(rows[peer], 1.0, "vLLM") for peer in peers(result) if peer in rows]


def _gaps(result: Result) -> list[Claim]:
    """What long prompts do to the tokens of others, held against chunks and vLLM at the worst of all rates."""
    ours = [row for row in result.rows if row.arm == DEFAULT and row.beside]
    made = []
    for rival in (arm for arm in result.arms if arm.startswith(CHUNKED) or phases.is_peer(arm)):
        pairs = [(row, other) for row in ours if (other := result.row(rival, row.rate)) is not None and other.beside]
        if not pairs:
            continue
        where = f"{name_of(result)}, worst of {len(pairs)} rates"
        gaps = [other.beside["p99"] / row.beside["p99"] for row, other in pairs]
        firsts = [row.ttft["p90"] / other.ttft["p90"] for row, other in pairs]
        against = "vLLM" if phases.is_peer(rival) else "one of our rivals"
        what = f"p99 time between tokens while long prompts wait for their first, {where}, {rival} over {DEFAULT}"
        more: dict[str, Any] = {
            "at_least": 2.0,
            "spread": (min(gaps), max(gaps)),
            "note": _told(pairs, "beside", "p99"),
        }
        made.append(claim("P3", what, min(gaps), "x", result.command, against=against, **more))
        what = f"p90 TTFT, {where}, {DEFAULT} over {rival}"
        more = {"at_most": 1.3, "spread": (min(firsts), max(firsts)), "note": _told(pairs, "ttft", "p90")}
        made.append(claim("P3", what, max(firsts), "x", result.command, against=against, **more))
    return made


def _told(pairs: Sequence[tuple[Row, Row]], percentiles: str, at: str) -> str:
    """Of both at every rate."""
    each = [(row.rate, *(getattr(one, percentiles)[at] for one in (row, other))) for row, other in pairs]
    return ", ".join(f"{rate:g}/s: {own:.0f} and {other:.0f} ms" for rate, own, other in each)


def _flips(result: Result) -> list[Claim]:
    if result.flip_us is None:
        return []
    what = f"a change of the split on the host, {name_of(result)}, median of {phases.FLIPS}"
    failed = sum(row.failed for row in result.rows)
    moved = sum(row.moved for row in result.rows)
    requests = sum(row.requests for row in result.rows)
    note = f"the border moved {moved} times under load, {failed} of {requests} requests failed"
    return [claim("P4", what, result.flip_us, "us", result.command, at_most=100.0, note=note)]


def _full(result: Result) -> list[Claim]:
    if DEFAULT not in result.full or CHUNKED not in result.full:
        return []
    ours, rival = (max(result.full[arm]) for arm in (DEFAULT, CHUNKED))
    what = f"tokens a second of requests that come at once, {name_of(result)}, {DEFAULT} over {CHUNKED}"
    note = ", ".join(f"{arm}: {max(rates):.0f}" for arm, rates in result.full.items())
    return [claim("P5", what, ours / rival, "x", result.command, at_least=0.98, note=note)]


def of_suites(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """All claims of raw results by suite; those of CPUs say nothing."""
    return of_results([phases.loaded(data) for data in found.get("phases", ()) if "cuda" in data["machine"]])
