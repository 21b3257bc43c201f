"""Claims C1 to C4, the sentiment classifier, from raw results of `bench.sentiment`."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tenfold.bench.case import paired_ratio
from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.sentiment import FULL, VARIANTS, by_variant, gains, spread

PAPER = {"accuracy": 1.91, "f1_weighted": 3.09}  # points over its baseline, the more of its two sets'
CLASHES = ("incongruity", "incongruity-large", "incongruity-emoji")  # sets whose labels need both modalities
SEEDS = 5
CHANCE = 50.0  # % of a clash
NEAR = 3.0  # points from it: three times what 2,409 posts are off by chance
OFF, LOST, FASTER = 0.05, 5.0, 5.0  # calibration error, % of generation, times the peer's loop
LARGEST = 64  # posts at once


def of_ablation(data: Mapping[str, Any]) -> Iterator[Claim]:
    """C1, C2 and C4 of every set."""
    rows, command = data["rows"], data["command"]
    for name in dict.fromkeys(row["data"] for row in rows):
        yield from _gain(rows, name, command)
        yield _complete(rows, name, command)
        if name in CLASHES:
            yield from _alone(rows, name, command)
        yield from _calibrated(rows, name, command)
    if card := data.get("packaged"):
        note = f"Brier {card['brier']:.3f}, accuracy {card['accuracy']:.3f} of three labels, {card['posts']} posts"
        what = "calibration error of the packaged classifier, posts it has not seen"
        yield claim("C4", what, card["ece"], "", command, at_most=OFF, note=note)


def _gain(rows: Sequence[Mapping[str, Any]], name: str, command: str) -> Iterator[Claim]:
    """C1: points that BiLSTM, CNN and CBAM are worth together, seed by seed; no figure of fewer seeds than SEEDS."""
    for score, words in (("accuracy", "accuracy"), ("f1_weighted", "F1")):
        found = [100 * gain for gain in gains(rows, name, score)]
        if not found:
            continue
        mean, off = spread(found)
        full, plain = (_mean(rows, name, variant, score) for variant in (FULL, "concatenation"))
        note = f"{100 * full:.2f} % against {100 * plain:.2f} %, {len(found)} seeds, standard deviation {off:.2f}"
        least, enough = PAPER[score] if name in CLASHES else None, len(found) >= SEEDS
        around, value = (min(found), max(found)), mean if enough else None
        what = f"{words} with BiLSTM, CNN and CBAM over without, {name}"
        yield claim("C1", what, value, "points", command, at_least=least, spread=around, note=note)
        if least is not None:
            what, value = f"the same, less a standard deviation over seeds, {words}, {name}", mean - off
            yield claim("C1", what, value if enough else None, "points", command, at_least=0.0, note=note)


def _complete(rows: Sequence[Mapping[str, Any]], name: str, command: str) -> Claim:
    found = by_variant(rows, name)
    whole = sum(len(own) >= SEEDS for own in found.values())
    best = max(found, key=lambda variant: _mean(rows, name, variant, "accuracy"))
    note = f"best: {best}, accuracy {100 * _mean(rows, name, best, 'accuracy'):.2f} %"
    what = f"variants measured with {SEEDS} seeds, {name}"
    return claim("C2", what, whole, "", command, at_least=len(VARIANTS), note=note)


def _alone(rows: Sequence[Mapping[str, Any]], name: str, command: str) -> Iterator[Claim]:
    for variant in ("text only", "image only"):
        if own := by_variant(rows, name).get(variant):
            found = [100 * row["scores"]["accuracy"] for row in own]
            away = abs(statistics.mean(found) - CHANCE)
            note = f"accuracy {statistics.mean(found):.2f} %, chance is {CHANCE:g} %"
            what = f"distance of {variant} from chance, {name}"
            yield claim("C2", what, away, "points", command, at_most=NEAR, note=note)


def _calibrated(rows: Sequence[Mapping[str, Any]], name: str, command: str) -> Iterator[Claim]:
    if own := by_variant(rows, name).get(FULL):
        found, before = ([row[kind]["ece"] for row in own] for kind in ("scores", "uncalibrated"))
        brier = statistics.mean(row["scores"]["brier"] for row in own)
        posts = own[0]["scores"]["posts"]
        note = f"before scaling {statistics.mean(before):.4f}; Brier {brier:.3f}; {posts} posts, {len(own)} seeds"
        if chance := [row["expected_ece"] for row in own if "expected_ece" in row]:
            note += f"; a perfectly calibrated one: {statistics.mean(chance):.4f}"
        around, what = (min(found), max(found)), f"calibration error after scaling, {name}"
        yield claim("C4", what, statistics.mean(found), "", command, at_most=OFF, spread=around, note=note)


def _mean(rows: Sequence[Mapping[str, Any]], name: str, variant: str, score: str) -> float:
    own = by_variant(rows, name).get(variant, ())
    return statistics.mean(row["scores"][score] for row in own) if own else 0.0


def of_serving(data: Mapping[str, Any]) -> Iterator[Claim]:
    """C3 of one size on one device."""
    command, size = data["command"], data["size"]
    alone = [row for row in data["rows"] if row["engine"] == "tenfold" and not row["beside"]]
    peers = {row["engine"]: row for row in data["rows"] if row["engine"] != "tenfold"}
    is_gpu = "cuda" in data["machine"]
    for row in data["rows"]:
        if row["engine"] == "tenfold":
            where = " beside generation" if row["beside"] else ""
            note = f"{_rate(row):.0f} posts/s, p50 {row['p50']:.2f} ms"
            what = f"P99 of posts, {size}, batch {row['batch']}{where}"
            yield claim("C3", what, row["p99"], "ms", command, note=note)
    largest = max(alone, key=lambda row: row["batch"])
    for engine, peer in peers.items():
        ratio = paired_ratio(peer["seconds"], largest["seconds"])
        note = f"ours {_rate(largest):.0f} posts/s, theirs {_rate(peer):.0f}, {len(peer['seconds'])} interleaved rounds"
        least = FASTER if engine == "loop" and is_gpu and largest["batch"] == LARGEST else None
        what = f"posts a second, {size}, batch {largest['batch']}, against transformers and torchvision, {engine}"
        more: dict[str, Any] = {"at_least": least, "against": engine, "spread": ratio.spread, "note": note}
        yield claim("C3", what, ratio.median, "x", command, **more)
    if found := data.get("generation"):
        yield _lost(found, size, command)


def _rate(row: Mapping[str, Any]) -> float:
    return row["batch"] / statistics.median(row["seconds"])


def _lost(found: Mapping[str, Any], size: str, command: str) -> Claim:
    """What generation loses, round by round."""
    kept = paired_ratio(found["with"], found["without"])
    around = (100 * (1 - kept.spread[1]), 100 * (1 - kept.spread[0]))
    speeds = (statistics.median(found[name]) for name in ("without", "with"))
    late = sorted(found["latencies"])
    note = "{:.0f} tokens/s without, {:.0f} with".format(*speeds)
    if late:
        note += f"; posts beside it: p50 {late[len(late) // 2]:.1f} ms, p99 {late[int(len(late) * 0.99)]:.1f} ms"
    what = f"generation lost to {found['rate']:g} classifications a second, {found['model']}, {size}"
    return claim("C3", what, 100 * (1 - kept.median), "%", command, at_most=LOST, spread=around, note=note)


def of_suites(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """All claims of raw results by suite."""
    made = [(each, data) for data in found.get("sentiment", ()) for each in of_ablation(data)]
    made += [(each, data) for data in found.get("sentiment-serving", ()) for each in of_serving(data)]
    return [signed(each, data["machine"]) for each, data in made]
