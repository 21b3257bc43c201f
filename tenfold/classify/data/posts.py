"""`Post` and `DataSet`: what every source of data makes, and training takes.

Invariant: the digest of a data set tells its content: posts, labels, pictures and splits.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tenfold.base.pictures import open_picture

POLARITIES = ("negative", "neutral", "positive")
NEGATIVE, NEUTRAL, POSITIVE = range(3)
SPLITS = ("train", "dev", "test")
SHARES = (0.8, 0.1)  # of train and dev where a source has no splits of its own


@dataclass(frozen=True, slots=True, eq=False)
class Post:
    """label: its number in the labels of the set. picture [3, H, W] uint8, or the path of one, which is opened when it
    is needed, or None.
    """

    text: str
    picture: Tensor | Path | None
    label: int

    def pixels(self) -> Tensor | None:
        """The picture, opened. Raises PictureError."""
        return as_tensor(open_picture(self.picture)) if isinstance(self.picture, Path) else self.picture


@dataclass(frozen=True, slots=True)
class DataSet:
    """source: for people: where the posts come from and what they are."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Post, ...]
    dev: tuple[Post, ...]
    test: tuple[Post, ...]
    source: str = ""

    @classmethod
    def of(cls, name: str, labels: Sequence[str], parts: Iterable[Sequence[Post]], source: str = "") -> "DataSet":
        """parts: train, dev and test."""
        train, dev, test = map(tuple, parts)
        return cls(name, tuple(labels), train, dev, test, source)

    def split(self, name: str) -> tuple[Post, ...]:
        posts: tuple[Post, ...] = getattr(self, name)
        return posts

    def check(self) -> None:
        """Raises ValueError where there is nothing to learn from, or nothing to judge by."""
        for name in SPLITS:
            if not self.split(name):
                raise ValueError(f"{self.name} has no posts to {'learn from' if name == 'train' else name}.")
        if len({post.label for post in self.train}) < 2:
            raise ValueError(f"{self.name} has posts of one label only; at least two are needed.")

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each split, posts by label."""
        found = {}
        for name in SPLITS:
            count = Counter(post.label for post in self.split(name))
            found[name] = {label: count[i] for i, label in enumerate(self.labels)}
        return found

    def digest(self) -> str:
        """SHA-256 over everything."""
        made = hashlib.sha256("\0".join((self.name, *self.labels)).encode())
        for name in SPLITS:
            made.update(f"\0{name}".encode())
            for post in self.split(name):
                made.update(f"\0{post.label}\0{post.text}\0".encode())
                made.update(_content(post.picture))
        return made.hexdigest()


def _content(picture: Tensor | Path | None) -> bytes:
    if isinstance(picture, Path):
        return hashlib.sha256(picture.read_bytes()).digest()
    return b"" if picture is None else hashlib.sha256(picture.numpy().tobytes()).digest()


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def divide(posts: Sequence[Post], seed: int) -> tuple[tuple[Post, ...], tuple[Post, ...], tuple[Post, ...]]:
    """Train, dev and test by chance, the same for the same seed; labels may be spread unevenly."""
    order = list(posts)
    random.Random(seed).shuffle(order)
    first, second = (round(len(order) * share) for share in (SHARES[0], sum(SHARES)))
    return tuple(order[:first]), tuple(order[first:second]), tuple(order[second:])


def split_of(key: str, train: int, dev: int) -> str:
    """The split of whatever has this key, the same in every set. train, dev: posts of a hundred."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return SPLITS[(place >= train) + (place >= train + dev)]


def polarity(rating: float, border: float) -> int:
    """The label of a rating around 0."""
    return POSITIVE if rating >= border else NEGATIVE if rating <= -border else NEUTRAL
