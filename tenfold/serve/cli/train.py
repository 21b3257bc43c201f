"""`tenfold train sentiment`: learn a classifier from data, save it with its card, and say how good it is."""

import json
from dataclasses import replace
from pathlib import Path

import tenfold
from tenfold.classify import plots
from tenfold.classify.checkpoint import Checkpoint
from tenfold.classify.data import table
from tenfold.classify.recipe import Recipe
from tenfold.classify.train import train
from tenfold.engine.opened import pick_device
from tenfold.models.sentiment.folder import CARD, CONFIG, Classifier, save
from tenfold.serve.cli.terminal import Bar, columns

UNDER_WAY = "training"  # folder in the classifier's own, while it is made
PICTURE = "confusion.png"


def sentiment(
    out: Path, data: str, data_seed: int, recipe: Recipe, device: str, half: bool, as_json: bool, quiet: bool
) -> None:
    """Raises ValueError for data, settings or a folder that are of no use."""
    import torch

    recipe.check()
    if (out / CONFIG).exists():
        raise ValueError(f"{out} holds a classifier already; give a folder that is new, or remove it.")
    bar = Bar("training")
    try:
        found = table.read(data, data_seed)
        say = None if quiet or as_json else print
        made = train(recipe, found, str(pick_device(device)), out / UNDER_WAY, bar.update, say)
    finally:
        bar.stop()
    made = replace(made, card={"tenfold": tenfold.__version__, **made.card})
    save(out, made, torch.float16 if half else torch.float32)
    Checkpoint(out / UNDER_WAY, "").remove()
    if plots.can_plot():
        title = f"{found.name}, test, accuracy {made.card['test']['accuracy']:.1%}"
        plots.confusion(made.card["test"]["confusion"], found.labels, title, out / PICTURE)
    if as_json:
        print(json.dumps(made.card, indent=1))
    elif not quiet:
        print(describe(made))
        print(f'saved in {out} ({CARD} says more); try it: tenfold classify --classifier {out} "What a day!"')


def describe(made: Classifier) -> str:
    """How good it is, on posts it has not seen."""
    card = made.card
    test, raw = card["test"], card["test_uncalibrated"]
    rows = [
        ("parameters", f"{card['parameters']:,}"),
        ("best epoch", f"{card['best_epoch']} of {card['epochs']}"),
        ("test posts", str(test["posts"])),
        ("accuracy", f"{test['accuracy']:.4f}"),
        ("F1, weighted and macro", f"{test['f1_weighted']:.4f} and {test['f1_macro']:.4f}"),
        ("temperature", f"{card['temperature']:.3f}"),
        ("calibration error", f"{test['ece']:.4f}, before scaling {raw['ece']:.4f}"),
        ("Brier score", f"{test['brier']:.4f}, before scaling {raw['brier']:.4f}"),
    ]
    return columns(rows)
