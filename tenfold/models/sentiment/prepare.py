"""From what a user has, a text and a picture, to what the model takes. Training and serving share it, so that they see
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.models.sentiment.config import SentimentConfig
from tenfold.models.sentiment.model import Posts

LONGEST = 1 << 20  # characters of a text
NARROWEST = 64  # times that a picture may be longer than wide


@dataclass(frozen=True, slots=True)
class Item:
    """One post, read: token ids, and the picture [3, S, S] in 8 bits, or None."""

    ids: list[int]
    picture: Tensor | None


class Reader:
    """Of one model. tokenizer: a `tokenizers.Tokenizer` with the ends of BERT in its post-processor."""

    def __init__(self, config: SentimentConfig, tokenizer: Any) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(config.max_tokens)
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, config: SentimentConfig, path: Path) -> "Reader":
        """path: of a tokenizer.json. Raises ValueError for one that does not fit the model."""
        return cls(config, open_tokenizer(path, config.text.vocab))

    def read(self, text: str, picture: Tensor | None = None) -> Item:
        """picture [3, H, W] uint8. Raises ValueError for a post with nothing in it, or nothing this model looks at."""
        modalities = self.config.parts.modalities
        check_text(text)
        if not text.strip() and (picture is None or modalities == "text"):
            raise ValueError("text is empty; give a text" + (" or a picture." if modalities != "text" else "."))
        if picture is None and modalities == "image":
            raise ValueError("There is no picture, and this model looks at nothing else; give one.")
        ids = self.tokenizer.encode(text).ids
        seen = None if picture is None or modalities == "text" else fit(picture, self.config.image.size)
        return Item(ids, seen)

    def batch(self, items: Sequence[Item], length: int = 0) -> Posts:
        """Texts padded to `length`, or to the longest where that is more."""
        longest = max(length, *(len(item.ids) for item in items))
        ids = torch.tensor([item.ids + [0] * (longest - len(item.ids)) for item in items])
        seen = {i: item.picture for i, item in enumerate(items) if item.picture is not None}
        size = self.config.image.size
        pictures = torch.stack([*seen.values()]) if seen else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        lengths = torch.tensor([len(item.ids) for item in items])
        return Posts(ids, lengths, pictures, torch.tensor([*seen], dtype=torch.int64))


def open_tokenizer(path: Path, tokens: int) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json. tokens: that the text encoder knows. Raises ValueError for a file
    that holds none, or more.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {error}.") from None
    check_size(path, tokenizer, tokens)
    return tokenizer


def check_size(path: Path, tokenizer: Any, tokens: int) -> None:
    """Raises ValueError for a tokenizer, read from path, with more tokens than the text encoder."""
    if tokenizer.get_vocab_size() > tokens:
        raise ValueError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, the text encoder {tokens}; allowed: no more than the "
            "encoder."
        )


def check_text(text: str) -> None:
    """Raises ValueError for one that is too long, and for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}; allowed: str.")
    if len(text) > LONGEST:
        raise ValueError(f"text has {len(text)} characters; allowed: up to {LONGEST}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has half of a surrogate pair ({text[error.start]!a}) at character {error.start}, which a byte that "
            "is not UTF-8 becomes too; give UTF-8, or a str with characters beyond U+FFFF whole."
        ) from None


def fit(picture: Tensor, size: int) -> Tensor:
    """The middle square of a picture [3, H, W] uint8, [3, size, size]; the shorter side becomes `size`.

    Raises ValueError for a picture of which a square would show nothing.
    """
    _, height, width = picture.shape
    short = min(height, width)
    if short < 1 or max(height, width) > NARROWEST * short:
        raise ValueError(
            f"picture is {width} x {height}; allowed: sides from 1, the longer up to {NARROWEST} times the shorter."
        )
    top, left = (height - short) // 2, (width - short) // 2
    square = picture[None, :, top : top + short, left : left + short]
    if short == size:
        return square[0].contiguous()
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
