"""The shape of a sentiment classifier: its encoders, the parts that are switched on, and its labels.

Invariant: a `SentimentConfig` that was checked can be built, and to JSON and back is the same object.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tenfold.models.sentiment.image import ImageShape
from tenfold.models.sentiment.text import TextShape

CBAM = ("none", "channel", "spatial", "both")
LAYOUTS = ("tokens", "picture")
MODALITIES = ("both", "text", "image")
MAX_LABELS = 255


@dataclass(frozen=True, slots=True)
class Parts:
    """The switches between the encoders and the head, the paper's setting where nothing is said.

    bilstm: layers after the text encoder. cnn: a convolution over the spliced tokens. cbam: which gates follow it.
    layout: the spliced features as a row of tokens with channels, or as a picture with one channel (the paper does not
    say which). cross: layers in which tokens attend to those of the other modality. contrastive: a second head whose
    outputs a contrastive loss can be taken of. modalities: what reaches the head at all.
    """

    bilstm: int = 2
    cnn: bool = True
    cbam: str = "both"
    layout: str = "tokens"
    cross: int = 0
    contrastive: bool = False
    modalities: str = "both"

    def check(self) -> None:
        """Raises ValueError for a value that does not exist."""
        for name, allowed in (("cbam", CBAM), ("layout", LAYOUTS), ("modalities", MODALITIES)):
            _one_of(name, getattr(self, name), allowed)
        _one_of("bilstm", self.bilstm, (0, 1, 2))
        _one_of("cross", self.cross, (0, 1, 2, 3))


@dataclass(frozen=True, slots=True)
class SentimentConfig:
    """labels: what the probabilities stand for, in order. width: channels of the spliced features. dropout: a share
    while training. max_tokens: word pieces of a text that are read, both ends included.
    """

    labels: tuple[str, ...]
    text: TextShape
    image: ImageShape
    parts: Parts = Parts()
    dropout: float = 0.1
    max_tokens: int = 200

    @property
    def width(self) -> int:
        return self.text.width

    def check(self) -> None:
        """Raises ValueError, naming what is wrong and what is allowed."""
        self.parts.check()
        self.text.check()
        self.image.check()
        if not 2 <= len(set(self.labels)) == len(self.labels) <= MAX_LABELS:
            raise ValueError(f"labels are {list(self.labels)!r}; allowed: 2 to {MAX_LABELS} different ones.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; allowed: 0 to less than 1.")
        if not 2 <= self.max_tokens <= self.text.positions:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; allowed: 2 to {self.text.positions}, the positions the text encoder "
                "knows."
            )

    def as_json(self) -> dict[str, Any]:
        return {"model_type": "tenfold_sentiment", **asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "SentimentConfig":
        """Raises ValueError for anything but what `as_json` makes."""
        if told.get("model_type") != "tenfold_sentiment":
            raise ValueError(f"model_type is {told.get('model_type')!r}; a classifier's is 'tenfold_sentiment'.")
        try:
            made = cls(
                tuple(map(str, told["labels"])),
                TextShape(**told["text"]),
                ImageShape(**told["image"]),
                Parts(**told["parts"]),
                told["dropout"],
                told["max_tokens"],
            )
            made.check()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The settings of the classifier are not complete: {error}.") from None
        return made


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}.")


__all__ = ["CBAM", "LAYOUTS", "MODALITIES", "ImageShape", "Parts", "SentimentConfig", "TextShape"]
