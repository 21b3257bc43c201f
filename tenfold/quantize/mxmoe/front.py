"""The Pareto front of an allocation: what less loss would have cost in time and bytes under the same budget, and the
other way round. As numbers of the recipe, and as a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tenfold.quantize.mxmoe.allocate import Plan

FILE = "front.png"
READ = "bytes read"  # how words begin that say where times are from, where none were measured
COLOUR, CHOSEN = "#0072B2", "#D55E00"  # told apart by people with the common colour blindnesses


@dataclass(frozen=True, slots=True)
class Corner:
    """bits: of a weight of experts, scales and zeros included; bytes: of all of them; loss, time: the sums that were
    weighed, time (or what is read, see `timed`) in a unit of its own that only the corners of one front share; chosen:
    whether the model has it.
    """

    bits: float
    bytes: int
    loss: float
    time: float
    chosen: bool = False


def corners(plans: Sequence[Plan], chosen: Plan, weights: int) -> tuple[Corner, ...]:
    """Of the plans of a front, the chosen one among them; weights: of all blocks."""
    found = []
    for plan in plans:
        size = sum(plan.bytes.values())
        found.append(Corner(8 * size / weights, round(size), plan.loss, plan.time, plan == chosen))
    return tuple(found)


def read(rows: Sequence[Any]) -> tuple[Corner, ...]:
    """Of a file. Raises TypeError, ValueError for anything else."""
    found = tuple(Corner(**row) for row in rows)
    for corner in found:
        if not all(isinstance(x, int | float) for x in (corner.bits, corner.bytes, corner.loss, corner.time)):
            raise ValueError("a corner of the front is not made of numbers")
    return found


def relative(front: Sequence[Corner]) -> list[float]:
    """Times over that of the chosen corner, or of the first where none is."""
    own = next((corner.time for corner in front if corner.chosen), front[0].time if front else 1.0)
    return [corner.time / own if own else 1.0 for corner in front]


def timed(cost: str) -> bool:
    """Whether a front has times, which cost says where they are from; else it has the bits that picks read."""
    return bool(cost) and not cost.startswith(READ)


def drawable() -> bool:
    """Whether matplotlib is installed, the package's optional extra `bench`."""
    return find_spec("matplotlib") is not None


def draw(front: Sequence[Corner], cost: str, title: str, path: Path) -> Path:
    """Loss over bits, and over time or the bits that picks read; cost: where these are from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    losses, mark = [corner.loss for corner in front], [i for i, corner in enumerate(front) if corner.chosen]
    below = "time of experts" if timed(cost) else "bits of the experts that picks read"
    sides = {
        "bits a weight of experts, scales and zeros included": [corner.bits for corner in front],
        f"{below}, over the chosen point's": relative(front),
    }
    for axis, (label, values) in zip(axes, sides.items()):
        axis.plot(values, losses, color=COLOUR, marker="o", linewidth=1.2, label="front")
        own = [values[i] for i in mark], [losses[i] for i in mark]
        axis.plot(*own, "*", color=CHOSEN, markersize=14, label="chosen")
        axis.set_xlabel(label)
        axis.grid(True, which="both", color="#dddddd", linewidth=0.7)
    if min(losses) > 0:
        axes[0].set_yscale("log")
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    return path
