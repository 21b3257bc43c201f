"""What few bits cost a model that sees, by method at equal bits: `python -m tenfold.bench.vlm --model MODEL ...`.

Every seed draws its own calibration samples; all methods of a seed see the same ones, and all are judged on the same
held-out pairs: mean negative log-likelihood of answers, and the share of whole answers that are right. Matrices are
rounded in their place, so bits that no file holds can be judged on any device. Beside the methods: the search taken
apart (norm of differences, what tokens count, what matrices are looked at with), and the gradients of tokens of each
kind by layer.

    python -m tenfold.bench.vlm --model vlm --data data/train --held-out data/held_out --out vlm.json
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tenfold.bench.command import again, save
from tenfold.bench.hardware import machine
from tenfold.quantize.mbq.compare import ABLATION, Row, compare
from tenfold.quantize.mbq.data import Pair, mix_of, read_pairs
from tenfold.quantize.mbq.gradients import Magnitudes, worths
from tenfold.quantize.mbq.search import METHODS, Method
from tenfold.quantize.mbq.subject import KINDS, Subject
from tenfold.quantize.schemes import parse
from tenfold.serve.pairs import Reader
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

SCHEMES = "w4g64z,w3g64z,w4a8"
SHOWN = {"vision": "pictures", "answer": "answers", "said": "before what is said", "rest": "the rest"}
# The search in all its forms, but for those that have a name of their own.
APART = {name: method for name, method in ABLATION.items() if method not in METHODS.values()}


def drawn(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """So many pairs without repetition, or all."""
    return random.Random(seed).sample(list(pairs), min(count, len(pairs)))


def apart(names: str) -> dict[str, Method]:
    """Of names between semicolons. Raises ValueError."""
    wanted = [name.strip() for name in names.split(";") if name.strip()]
    for name in wanted:
        if name not in APART:
            raise ValueError(f"{name!r} is no form of the search; allowed: {'; '.join(APART)}.")
    return {name: APART[name] for name in wanted}


def gathered(runs: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Rows of every seed as one, with mean and spread."""
    made = []
    for same in zip(*runs, strict=True):
        losses, shares = [r.score.loss for r in same], [r.score.accuracy for r in same]
        made.append(
            {
                "method": same[0].method,
                "scheme": same[0].scheme,
                "bits": same[0].bits,
                "loss": statistics.fmean(losses),
                "losses": losses,
                "accuracy": statistics.fmean(shares),
                "accuracies": shares,
            }
        )
    return made


def layers(found: Magnitudes) -> list[dict[str, Any]]:
    """Gradients of one seed as a table: of each layer's part, over each kind of token, and what a picture's counts."""
    used = worths(found)
    return [
        {"layer": i, "part": part, **asdict(one.size), "square": asdict(one.square)}
        | {"ratio": one.ratio, "used": used[part][i].vision}
        for part, own in found.items()
        for i, one in enumerate(own)
    ]


def measured(
    subject: Subject,
    reader: Reader,
    pairs: Sequence[Pair],
    held: Sequence[Pair],
    schemes: Sequence[str],
    seeds: Sequence[int],
    samples: int,
    methods: Mapping[str, Method],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows of all methods and schemes over seeds, and the gradients that the first seed saw."""
    judged, runs, gradients, mixes = reader.samples(held), [], [], []
    for seed in seeds:
        calibrating = reader.samples(drawn(pairs, samples, seed))
        mixes.append(str(mix_of(calibrating)))
        say(f"seed {seed}: {mixes[-1]}")
        rows, found = compare(subject, calibrating, judged, [parse(s) for s in schemes], methods, say)
        runs.append(rows)
        gradients.append(layers(found))
    return {"judged": len(judged), "mix": mixes, "rows": gathered(runs), "gradients": gradients[0]}


def cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}"


def table(data: Mapping[str, Any]) -> str:
    """Markdown of methods side by side, and of gradients by layer."""
    lines = [cells("scheme", "method", "bits", "loss", "spread", "right", "spread"), cells(*["---"] * 7)]
    for r in data["rows"]:
        loss, right = f"{r['loss']:.4f}", f"{r['accuracy']:.4f}"
        shown = loss, spread(r["losses"]), right, spread(r["accuracies"])
        lines.append(cells(r["scheme"], r["method"], f"{r['bits']:.3f}", *shown))
    kinds = [kind for kind in KINDS if kind in data["gradients"][0]]
    heads = "layer", "part", *(f"gradient, {SHOWN[kind]}" for kind in kinds), "pictures / answers", "used"
    lines += ["", cells(*heads), cells(*["---"] * len(heads))]
    for g in data["gradients"]:
        sizes = (f"{g[kind]:.3g}" for kind in kinds)
        lines.append(cells(g["layer"], g["part"], *sizes, f"{g['ratio']:.3f}", f"{g['used']:.3f}"))
    own = data["machine"]
    told = f"{data['judged']} pairs held out, {len(data['mix'])} seeds; first: {data['mix'][0]}."
    return "\n".join([*lines, "", f"{told} Commit {own.get('commit', '')}, {own.get('date', '')}. `{data['command']}`"])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tenfold.bench.vlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="pairs to calibrate on")
    parser.add_argument("--held-out", type=Path, required=True, help="pairs to judge on")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="pairs of a calibration")
    parser.add_argument("--judged", type=int, default=2000, help="pairs that are judged, at most")
    parser.add_argument("--apart", default=";".join(APART), help="forms of the search beside the methods, between ;")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    methods = {**METHODS, **apart(given.apart)}
    checkpoint = open_checkpoint(resolve(given.model))
    held = drawn(read_pairs(given.held_out), given.judged, 0)
    result: dict[str, Any] = {
        "suite": "vlm",
        "machine": machine(given.device),
        "command": again(parser, given),
        "model": Path(given.model).name,
    }
    subject, names = Subject(checkpoint, given.device), given.schemes.split(",")
    pairs, seeds = read_pairs(given.data), range(given.seeds)
    result |= measured(subject, Reader(checkpoint), pairs, held, names, seeds, given.samples, methods)
    print(table(result))
    if given.out:
        save(given.out, result, given.commit)


if __name__ == "__main__":
    main()
