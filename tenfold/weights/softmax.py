"""`softmax.json`: how large the attention scores of a model get, measured by `tenfold calibrate softmax`.

It lies where `beside` says. What is missing, damaged or of another model never stops a start: attention then runs
without a unified maximum.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.base.log import logger
from tenfold.ops.attention.unified_max import Window, choose_phi, served, window
from tenfold.weights import beside
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.identity import identity

SCHEMA = 1
LARGEST_FILE = 64 << 20  # bytes
LARGEST = 1e18  # of its numbers, which types of 64 bits have room for
RARE = 0.001  # share of a head's rows, at each end, that phi may leave to the recomputation


@dataclass(frozen=True, slots=True)
class SoftmaxStatistics:
    """Scores as the softmax sees them (scaled, capped, natural units).

    model: `identity` of the checkpoint; text: digest of the calibration text; tokens: of all windows. low, high: of row
    maxima [layers][heads]; rare_low, rare_high: the same with RARE of the rows left out at each end. score_low,
    score_high: hold 99.99 % of all scores of the model.
    """

    model: str
    text: str
    tokens: int
    low: list[list[float]]
    high: list[list[float]]
    rare_low: list[list[float]]
    rare_high: list[list[float]]
    score_low: float
    score_high: float

    def phi(self, dtype: torch.dtype) -> list[Tensor | None]:
        """For each layer phi [heads] float32, for weights of a type; None where some head's rows would often have to be
        computed again, so that the layer is better off without.
        """
        safe = window(dtype)
        return [self._layer(layer, safe) for layer in range(len(self.low))]

    def _layer(self, layer: int, safe: Window) -> Tensor | None:
        low, high = torch.tensor(self.low[layer]), torch.tensor(self.high[layer])
        rare_low, rare_high = torch.tensor(self.rare_low[layer]), torch.tensor(self.rare_high[layer])
        wide = high - low > safe.width
        phi = choose_phi(torch.where(wide, rare_low, low), torch.where(wide, rare_high, high), safe)
        return phi if bool(served(rare_low, rare_high, phi, safe).all()) else None

    def model_phi(self, dtype: torch.dtype) -> float | None:
        """One phi that serves all row maxima of all heads, as in the paper; None where there is none."""
        safe = window(dtype)
        low, high = torch.tensor(min(map(min, self.low))), torch.tensor(max(map(max, self.high)))
        phi = choose_phi(low, high, safe)
        return float(phi) if bool(served(low, high, phi, safe)) else None


def places(checkpoint: Checkpoint, model: str) -> list[Path]:
    """Where statistics of a checkpoint may lie, best first; model: its identity."""
    return beside.places(checkpoint, model, "softmax")


def save(statistics: SoftmaxStatistics, checkpoint: Checkpoint) -> Path:
    """Write to the first place that takes it, all or nothing. Raises OSError where none does."""
    content = json.dumps({"schema": SCHEMA, **asdict(statistics)}, indent=1).encode()
    return beside.save("softmax", places(checkpoint, statistics.model), lambda path: beside.write(path, content))


def load_statistics(checkpoint: Checkpoint, layers: int, heads: int) -> SoftmaxStatistics | None:
    """What was measured of a checkpoint, the first that is usable. None where nothing is; one line in the log then says
    why, unless nothing was measured.
    """
    *near, own = places(checkpoint, "")
    if not own.parent.is_dir() and not any(path.is_file() for path in near):
        return None  # at no more cost: the identity is read from the weights
    model = identity(checkpoint)
    wrong = []
    for path in filter(Path.is_file, places(checkpoint, model)):
        try:
            return read(path, model, layers, heads)
        except (OSError, ValueError, RecursionError) as error:
            wrong.append(f"{path} is not used, {error}")
    if wrong:
        logger.warning("softmax: %s; measure again with `tenfold calibrate softmax`", "; ".join(wrong))
    return None


def load_phi(checkpoint: Checkpoint, layers: int, heads: int, dtype: torch.dtype) -> list[Tensor | None] | None:
    """For each layer phi [heads] float32 for weights of a type, or None where it has none; None: nothing usable."""
    statistics = load_statistics(checkpoint, layers, heads)
    return None if statistics is None else statistics.phi(dtype)


def read(path: Path, model: str, layers: int, heads: int) -> SoftmaxStatistics:
    """Raises ValueError with what is wrong with the file."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise ValueError("it is no file of this version")
    if content.get("model") != model:
        raise ValueError("it was measured with another model")
    check(content, layers, heads)
    return SoftmaxStatistics(**content)


def check(content: dict[str, Any], layers: int, heads: int) -> None:
    """Raises ValueError for values that are no statistics of so many layers and heads."""
    if set(content) != set(SoftmaxStatistics.__slots__):
        raise ValueError("it has other entries than statistics have")
    good = isinstance(content["text"], str) and type(content["tokens"]) is int
    good = good and all(is_number(content[name]) for name in ("score_low", "score_high"))
    for name in ("low", "high", "rare_low", "rare_high"):
        rows = content[name]
        good = good and isinstance(rows, list) and len(rows) == layers
        good = good and all(isinstance(row, list) and len(row) == heads and all(map(is_number, row)) for row in rows)
    if not good:
        raise ValueError(f"its values are not those of {layers} layers of {heads} heads")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST
