"""Posts read once, and batches of them in an order that a seed tells."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tenfold.classify.data.posts import Post
from tenfold.models.sentiment.model import Posts
from tenfold.models.sentiment.prepare import Item, Reader

KEPT = 2 << 30  # bytes of pictures that are kept; more are opened again each time
GROUP = 16  # batches whose posts are sorted by length together
SHIFT = 16  # a picture is moved by up to a 16th of its side


class Shelf:
    """Items of a split, by number."""

    def __init__(self, posts: Sequence[Post], reader: Reader) -> None:
        self.posts, self.reader = posts, reader
        self.labels = torch.tensor([post.label for post in posts])
        self._items: dict[int, Item] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self.posts)

    def item(self, number: int) -> Item:
        """Raises ValueError with what is wrong with a post."""
        if number in self._items:
            return self._items[number]
        made = self._read(self.posts[number])
        size = 0 if made.picture is None else made.picture.numel()
        if size <= self._room:
            self._room -= size
            self._items[number] = made
        return made

    def _read(self, post: Post) -> Item:
        try:
            return self.reader.read(post.text, post.pixels())
        except ValueError as error:
            if not isinstance(post.picture, Path):
                raise
            raise ValueError(f"The post of {post.picture}: {error}") from None

    def batch(self, numbers: Sequence[int]) -> tuple[Posts, Tensor]:
        """Posts and their labels."""
        chosen = list(numbers)
        return self.reader.batch([self.item(i) for i in chosen]), self.labels[chosen]

    def in_order(self, size: int) -> Iterator[tuple[Posts, Tensor]]:
        """All, the shortest texts first, so that little is padded."""
        order = sorted(range(len(self)), key=lambda i: len(self.item(i).ids))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def shuffled(self, size: int, seed: torch.Generator) -> Iterator[tuple[Posts, Tensor]]:
        """All, by chance, but in batches of texts that are about as long, so that little is padded."""
        order = torch.randperm(len(self), generator=seed).tolist()
        groups = (order[start : start + size * GROUP] for start in range(0, len(order), size * GROUP))
        alike = [number for group in groups for number in sorted(group, key=lambda i: len(self.item(i).ids))]
        batches = [alike[start : start + size] for start in range(0, len(alike), size)]
        for i in torch.randperm(len(batches), generator=seed).tolist():
            yield self.batch(batches[i])


def varied(posts: Posts, seed: torch.Generator, unknown: int, share: float) -> Posts:
    """Another view of posts: pictures moved and, half of them, mirrored; a share of word pieces unknown. Ends of texts
    stay.
    """
    pictures = posts.pictures
    if len(pictures):
        far = max(1, pictures.shape[-1] // SHIFT)
        down, right = (int(torch.randint(-far, far + 1, (1,), generator=seed)) for _ in range(2))
        pictures = pictures.roll((down, right), (2, 3))
        mirrored = torch.rand(len(pictures), generator=seed) < 0.5
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    places = torch.arange(posts.ids.shape[1])
    inside = (places > 0) & (places < posts.lengths[:, None] - 1)
    dropped = (torch.rand(posts.ids.shape, generator=seed) < share) & inside
    return replace(posts, ids=posts.ids.masked_fill(dropped, unknown), pictures=pictures)
