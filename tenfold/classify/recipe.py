"""How a classifier is made: everything that decides what comes out, and nothing else."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tenfold.classify.encoder import NEW, Size
from tenfold.models.sentiment.config import ImageShape, Parts

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Recipe:
    """text, size: where the text encoder begins. image_weights: where that of pictures does: a file of its weights, and
    it is frozen then, as in CLMLF; "default" or the folder of a classifier; or anew. frozen: epochs in which a text
    encoder that knows something does not change; encoder_rate: learning rate of encoders that do. word_dropout: share
    of word pieces hidden while training. contrast: weight of the contrastive losses. patience: epochs without a better
    accuracy on dev after which training ends.
    """

    parts: Parts = field(default_factory=Parts)
    text: str = NEW
    size: Size = field(default_factory=Size)
    image: ImageShape = field(default_factory=ImageShape)
    image_weights: str = ""
    max_tokens: int = 64
    dropout: float = 0.1
    word_dropout: float = 0.05
    epochs: int = 20
    batch: int = 64
    rate: float = 1e-3
    encoder_rate: float = 2e-4
    frozen: int = 2
    patience: int = 8
    decay: float = 0.01
    contrast: float = 0.1
    precision: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError, naming what is wrong and what is allowed."""
        self.parts.check()
        self.image.check()
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: from 1.")
        for name in ("rate", "encoder_rate", "decay", "contrast", "frozen"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: from 0.")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to less than 1.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}.")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def digest(self, data: str) -> str:
        """Of the recipe with data of this digest: runs with the same one go on with each other."""
        return hashlib.sha256(json.dumps([self.as_json(), data], sort_keys=True).encode()).hexdigest()
