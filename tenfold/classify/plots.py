"""The confusion of a classifier as a picture; needs matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def confusion(table: Sequence[Sequence[int]], labels: Sequence[str], title: str, path: Path) -> Path:
    """table [truth][guess]: counts, shown with their share of the truth."""
    from matplotlib.figure import Figure

    count = len(labels)
    shares = [[cell / max(1, sum(row)) for cell in row] for row in table]
    figure = Figure(figsize=(1.8 + 1.1 * count, 1.6 + 1.0 * count), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for truth, row in enumerate(table):
        for guess, cell in enumerate(row):
            share = shares[truth][guess]
            axes.text(guess, truth, f"{cell}\n{share:.0%}", ha="center", va="center", color="w" if share > 0.5 else "k")
    axes.set_xticks(range(count), labels)
    axes.set_yticks(range(count), labels)
    axes.set(xlabel="guessed", ylabel="true", title=title)
    figure.savefig(path, dpi=120)
    return path
