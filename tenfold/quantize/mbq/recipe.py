"""What a run of mbq, awq or smoothquant found, as it is kept beside the model: whose it is, how it was made, gradients,
scales. An interrupted run leaves one of fewer layers.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenfold.quantize.mbq.data import Sample
from tenfold.quantize.mbq.fold import Scales
from tenfold.quantize.mbq.gradients import Kinds, Magnitude, Magnitudes
from tenfold.quantize.mbq.subject import KINDS

FILE = "recipe.json"
VERSION = 2
LARGEST = 1 << 28  # bytes


@dataclass(slots=True)
class Recipe:
    """model, data: hashes; settings: of the run, by name; mix: in a sentence; magnitudes: of gradients, empty where no
    method needs them; scales and losses: by layer and matrix.
    """

    model: str
    data: str
    settings: dict[str, Any]
    mix: str = ""
    magnitudes: Magnitudes = field(default_factory=dict)
    scales: dict[int, Scales] = field(default_factory=dict)
    losses: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, dict[str, Any]]:
        return self.model, self.data, self.settings

    def content(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": self.model,
            "data": self.data,
            "settings": self.settings,
            "mix": self.mix,
            "magnitudes": {part: [asdict(one) for one in own] for part, own in self.magnitudes.items()},
            "scales": {str(i): {part: written(t) for part, t in own.items()} for i, own in self.scales.items()},
            "losses": {str(i): own for i, own in self.losses.items()},
        }

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def digest_of(samples: Sequence[Sample]) -> str:
    """Of what was calibrated on, in whatever order."""
    return hashlib.sha256("".join(sorted(sample.key for sample in samples)).encode()).hexdigest()


def written(scales: torch.Tensor) -> str:
    return base64.b64encode(scales.float().cpu().numpy().astype("<f4").tobytes()).decode()


def read(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").copy())


def load(path: Path) -> Recipe:
    """Raises ValueError for a file that is no recipe of these methods, OSError."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ValueError
        return _recipe(raw)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is no recipe of mbq, awq, smoothquant or rtn; give the {FILE} of a model that one of them wrote."
        ) from None


def _recipe(raw: Mapping[str, Any]) -> Recipe:
    magnitudes = {
        part: [
            Magnitude(*(Kinds(*(float(one[power][kind]) for kind in KINDS)) for power in ("size", "square")))
            for one in own
        ]
        for part, own in raw["magnitudes"].items()
    }
    scales = {int(i): {part: read(text) for part, text in own.items()} for i, own in raw["scales"].items()}
    losses = {int(i): {part: float(x) for part, x in own.items()} for i, own in raw["losses"].items()}
    return Recipe(
        str(raw["model"]), str(raw["data"]), dict(raw["settings"]), str(raw["mix"]), magnitudes, scales, losses
    )
