"""`Classifier`: what a post of text and picture feels like, from Python. `LLM.classify` delegates to it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tenfold.base.pictures import LIMITS, PictureLimits, open_picture
from tenfold.engine.pool import PoolConfig, open_pool
from tenfold.models.sentiment.folder import DEFAULT
from tenfold.models.sentiment.prepare import Item

Picture = bytes | str | Path | Image.Image


@dataclass(frozen=True, slots=True)
class Post:
    """picture: the bytes of a file, its path, or an open picture; None: there is none."""

    text: str = ""
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Feeling:
    """label: the likeliest. probabilities: of every label, together 1."""

    label: str
    probabilities: dict[str, float]


class Classifier:
    """A sentiment classifier to call from a script; may be used from several threads.

    model: "default" or a folder that `tenfold train sentiment` wrote; settings: fields of PoolConfig. Raises
    ValueError.

    >>> with Classifier() as feel:
    ...     print(feel.classify("What a lovely day!")[0].label)
    """

    def __init__(self, model: str = DEFAULT, **settings: Any) -> None:
        self.pool = open_pool(model, PoolConfig(**settings))

    def __enter__(self) -> "Classifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.pool.classifier.config.labels

    def classify(self, posts: str | Post | Sequence[str | Post]) -> list[Feeling]:
        """One post or many; a Feeling for each, in their order. Raises ValueError for one that holds nothing or is
        none, PictureError, and QueueFull where posts of other threads fill the queue.
        """
        items = [self.read(post) for post in posts_of(posts)]
        found: list[Feeling] = []
        for start in range(0, len(items), self.pool.config.queue):
            entries = self.pool.submit_all(items[start : start + self.pool.config.queue])
            found += [feeling(entry.future.result(), self.labels) for entry in entries]
        return found

    def read(self, post: Post) -> Item:
        return self.pool.classifier.reader.read(post.text, None if post.picture is None else pixels(post.picture))

    def close(self, patience: float | None = None) -> None:
        """Idempotent."""
        self.pool.close(patience)


def posts_of(given: Any) -> list[Post]:
    """Raises ValueError for what is neither a post nor many."""
    if isinstance(given, str | Post):
        given = [given]
    elif isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"posts are a {type(given).__name__}; allowed: a str, a Post, or a sequence of them.")
    made = [Post(post) if isinstance(post, str) else post for post in given]
    for i, post in enumerate(made):
        if not isinstance(post, Post):
            raise ValueError(f"posts[{i}] is a {type(post).__name__}; allowed: a str or a Post.")
    return made


def pixels(picture: Picture, limits: PictureLimits = LIMITS) -> Tensor:
    """[3, H, W] uint8. Raises PictureError."""
    source = Path(picture) if isinstance(picture, str) else picture
    return torch.from_numpy(np.array(open_picture(source, limits))).permute(2, 0, 1)


def feeling(probabilities: Sequence[float], labels: Sequence[str]) -> Feeling:
    told = dict(zip(labels, probabilities))
    return Feeling(max(labels, key=told.__getitem__), told)
