"""The sentiment classifier: what each of its parts is worth, how well calibrated it is, and how it serves.

    python -m tenfold.bench.sentiment ablation --device cuda --jobs 8 --out A.json
    python -m tenfold.bench.sentiment serving --size base --device cuda --out S.json

ablation: every variant of VARIANTS on every set with several seeds, encoders beginning where the packaged classifier's
do, which has seen no post for judging of any set. Scores are of the test split, after the temperature that dev asks
for; variants are compared seed by seed. expected_ece of a row: the calibration error of a perfectly calibrated
classifier of the same confidences. serving: `bench.sentiment_serving`.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tenfold.bench import sentiment_serving
from tenfold.bench.command import again, portable, save, unlike
from tenfold.bench.hardware import machine
from tenfold.bench.single import device_of
from tenfold.classify.data import table
from tenfold.classify.data.posts import DataSet
from tenfold.classify.recipe import Recipe
from tenfold.classify.scores import expected_ece, fit_temperature
from tenfold.classify.train import Trainer
from tenfold.models.sentiment.config import Parts
from tenfold.models.sentiment.folder import DEFAULT, open_folder, place

FULL, PLAIN = "full", "concatenation"
_NOTHING = Parts(0, False, "none")
VARIANTS: dict[str, Parts] = {
    "text only": Parts(modalities="text"),
    "image only": Parts(modalities="image"),
    PLAIN: _NOTHING,
    "+ BiLSTM 1": replace(_NOTHING, bilstm=1),
    "+ BiLSTM 2": replace(_NOTHING, bilstm=2),
    "+ CNN": replace(_NOTHING, cnn=True),
    "+ CBAM channel": replace(_NOTHING, cbam="channel"),
    "+ CBAM spatial": replace(_NOTHING, cbam="spatial"),
    "+ CBAM both": replace(_NOTHING, cbam="both"),
    FULL: Parts(),
    "full, BiLSTM 1": Parts(bilstm=1),
    "full, no BiLSTM": Parts(bilstm=0),
    "full, no CNN": Parts(cnn=False),
    "full, no CBAM": Parts(cbam="none"),
    "full, channel gate": Parts(cbam="channel"),
    "full, spatial gate": Parts(cbam="spatial"),
    "full, as a picture": Parts(layout="picture"),
    "full + cross-attention": Parts(cross=1),
    "full + contrastive": Parts(contrastive=True),
}
DATA = "incongruity,incongruity-emoji,emoji,tweets"
Job = tuple[str, str, int]  # set, variant, seed
Row = dict[str, Any]


def jobs_of(data: Sequence[str], variants: Sequence[str], seeds: int) -> list[Job]:
    """Seeds outermost, so that what is measured before an interruption can be compared."""
    return [(name, variant, seed) for seed in range(seeds) for name in data for variant in variants]


@lru_cache(maxsize=8)
def _read(data: str) -> DataSet:
    return table.read(data)


def one(job: Job, recipe: Recipe, device: str) -> Row:
    """Train and judge. Raises ValueError for data that is not there."""
    data, variant, seed = job
    trainer = Trainer(replace(recipe, parts=VARIANTS[variant], seed=seed), _read(data), device)
    run = trainer.train()
    temperature = fit_temperature(*trainer.logits("dev"))
    scores, raw = trainer.judge("test", temperature), trainer.judge("test")
    sure = (trainer.logits("test")[0].double() / temperature).softmax(-1).amax(-1)
    return {
        "data": data.partition("=")[0],
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "epochs": run.epoch,
        "temperature": temperature,
        "scores": scores.as_json(),
        "expected_ece": expected_ece(sure),
        "uncalibrated": {"ece": raw.ece, "brier": raw.brier},
    }


def _in_worker(job: Job, recipe: Recipe, device: str) -> Row:
    torch.set_num_threads(1)
    return one(job, recipe, device)


def run(jobs: Sequence[Job], recipe: Recipe, device: str, workers: int) -> Iterator[Row]:
    """Each as it is done, several at a time where there are workers: one of these small models does not fill a GPU."""
    if workers < 2:
        yield from (one(job, recipe, device) for job in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_in_worker, job, recipe, device) for job in jobs]):
            yield future.result()


def ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["data"], list(VARIANTS).index(row["variant"]), row["seed"]))


def line(row: Row) -> str:
    """For people."""
    scores = row["scores"]
    told = f"{row['data']:20} {row['variant']:24} seed {row['seed']}: accuracy {scores['accuracy']:.4f}"
    told += f", F1 {scores['f1_macro']:.4f}, ECE {scores['ece']:.4f}"
    return f"{told} (by chance {row['expected_ece']:.4f})"


def by_variant(rows: Sequence[Mapping[str, Any]], data: str) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of a set, in the order of VARIANTS, each by seed."""
    own = [row for row in rows if row["data"] == data]
    return {name: found for name in VARIANTS if (found := [row for row in own if row["variant"] == name])}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def gains(rows: Sequence[Mapping[str, Any]], data: str, score: str, over: str = PLAIN) -> list[float]:
    """By how much the full model is better than another, seed by seed."""
    found = by_variant(rows, data)
    before = {row["seed"]: row["scores"][score] for row in found.get(over, ())}
    return [row["scores"][score] - before[row["seed"]] for row in found.get(FULL, ()) if row["seed"] in before]


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for people."""
    for data in dict.fromkeys(row["data"] for row in rows):
        yield f"{data}:"
        for variant, own in by_variant(rows, data).items():
            told = [spread([row["scores"][name] for row in own]) for name in ("accuracy", "f1_macro", "ece")]
            yield f"  {variant:24} " + "  ".join(f"{mean:.4f} ± {off:.4f}" for mean, off in told)


def ablation(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """keep: called with the result so far after every row; one that lies at `given.out` already is gone on with."""
    device, names = device_of(given.device), list(VARIANTS) if not given.variants else given.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"variants has {unknown[0]!r}; allowed: {', '.join(VARIANTS)}.")
    recipe = Recipe(
        text=given.text,
        image_weights=given.image_weights,
        epochs=given.epochs,
        patience=given.patience,
        frozen=given.frozen,
        precision=given.precision,
    )
    told = replace(recipe, text=portable(given.text), image_weights=portable(given.image_weights))
    data = given.data.split(",")
    result: dict[str, Any] = {
        "suite": "sentiment",
        "machine": machine(device) | ({"commit": given.commit} if given.commit else {}),
        "recipe": json.loads(json.dumps(asdict(told))),
        "sets": {
            each.partition("=")[0]: {"sha256": _read(each).digest(), "counts": _read(each).counts()} for each in data
        },
        "packaged": open_folder(place(DEFAULT)).card["test"],
        "rows": [],
    }
    result["rows"] = rows = _before(given.out, result)
    done = {(row["data"], row["variant"], row["seed"]) for row in rows}
    jobs = [job for job in jobs_of(data, names, given.seeds) if (job[0].partition("=")[0], *job[1:]) not in done]
    for i, row in enumerate(run(jobs, recipe, device, given.jobs), start=1):
        rows.append(row)
        print(f"[{i}/{len(jobs)}] {line(row)}", flush=True)
        keep(result | {"rows": ordered(rows)})
    print("\n".join(lines(rows)))
    return result | {"rows": ordered(rows)}


def _before(path: Path | None, result: Mapping[str, Any]) -> list[Row]:
    """Rows of an earlier run that was interrupted, where recipe, data and hardware are the same; none where commit or
    torch are others.
    """
    if path is None or not path.is_file():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))
    same = all(told[key] == result[key] for key in ("recipe", "sets", "packaged"))
    if not same or told["machine"]["hardware"] != result["machine"]["hardware"]:
        raise SystemExit(f"{path} holds a result of another recipe, other data or hardware; give another --out.")
    if changed := unlike(told["machine"], result["machine"]):
        print(f"{path} is measured anew: it was with {changed}")
        return []
    rows: list[Row] = told["rows"]
    return rows


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of its kinds."""
    parser = argparse.ArgumentParser(
        prog="python -m tenfold.bench.sentiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True)
    parts = kinds.add_parser("ablation")
    parts.add_argument("--data", default=DATA, help="sets, comma-separated, each NAME or NAME=FOLDER")
    parts.add_argument("--variants", default="", help="comma-separated; empty: all")
    parts.add_argument("--seeds", type=int, default=5)
    parts.add_argument("--text", default="default", help="text encoder to begin with, as for tenfold train sentiment")
    parts.add_argument("--image-weights", default="default", help="picture encoder likewise; empty: anew")
    parts.add_argument("--epochs", type=int, default=20)
    parts.add_argument("--patience", type=int, default=10)
    parts.add_argument("--frozen", type=int, default=0)
    parts.add_argument("--precision", default="float32")
    parts.add_argument("--jobs", type=int, default=1, help="trained at one time")
    sentiment_serving.add_arguments(kinds.add_parser("serving"))
    for kind, each in kinds.choices.items():
        each.set_defaults(kind=kind)
        each.add_argument("--device", default="auto")
        each.add_argument("--out", type=Path)
        each.add_argument("--commit", default="")
    return parser, kinds.choices


def main(arguments: Sequence[str] | None = None) -> None:
    parser, kinds = make_parser()
    given = parser.parse_args(arguments)
    command = {"command": again(kinds[given.kind], given)}

    def keep(found: dict[str, Any]) -> None:
        if given.out:
            save(given.out, found | command, given.commit)

    keep(ablation(given, keep) if given.kind == "ablation" else sentiment_serving.measure(given, print))


if __name__ == "__main__":
    main()
