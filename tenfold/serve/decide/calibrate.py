"""From what a model says to probabilities one can believe: the prior divided out, orders averaged, one temperature.

Contextual calibration is that of Zhao et al. 2021 ("Calibrate Before Use", section 5), temperature scaling that of Guo
et al. 2017 ("On Calibration of Modern Neural Networks", section 4.2).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tenfold.serve.decide.labels import add, normalised

CONTENT_FREE = ("N/A", "[MASK]", "")  # inputs that say nothing, from the paper
TEMPERATURES = (0.05, 100.0)  # what a temperature may be

Logs = Sequence[float]


def prior(content_free: Sequence[Logs]) -> list[float]:
    """The log of the mean probability of each option over inputs that say nothing."""
    count = math.log(len(content_free))
    return [add(column) - count for column in zip(*content_free)]


def probabilities(seen: Sequence[Logs], priors: Sequence[Logs] | None, temperature: float = 1.0) -> list[float]:
    """seen, priors [orders][options]: log-probabilities with the input and without one, each option in its own column.

    Orders are averaged as logarithms: a preference for a place is a term added to the logits there, and over all
    rotations it adds the same to every option.
    """
    scores = [[log - base for log, base in zip(s, p)] for s, p in zip(seen, priors)] if priors else seen
    means = [sum(column) / len(scores) for column in zip(*scores)]
    return softmax(means, temperature)


def softmax(logs: Logs, temperature: float = 1.0) -> list[float]:
    """Probabilities that sum to 1."""
    top = max(logs)
    return [math.exp(value) for value in normalised([(value - top) / temperature for value in logs])]


def read_temperatures(path: str) -> dict[str, float]:
    """Model name to temperature, from a file that `tenfold bench decisions --fit` wrote; none without a path.
    Raises ValueError.
    """
    if not path:
        return {}
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"decision_temperatures is {path!r}, which cannot be read: {error}.") from None
    low, high = TEMPERATURES
    if not isinstance(told, Mapping):
        raise ValueError(f'decision_temperatures is {path!r}; its content must be like {{"model name": 1.5}}.')
    for name, value in told.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"decision_temperatures gives {name!r} the value {value!r}; allowed: {low} to {high}.")
    return {name: float(value) for name, value in told.items()}
