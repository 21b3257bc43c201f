"""Posts made up so that only both modalities together tell the label.

"clash": is the mood of the picture another than that of the text? Moods are balanced and independent of each other, so
what either modality alone knows about the label is nothing, and its best guess is right half the time. "joint": three
labels by the rule of MVSA, contradictions dropped. Words and pictograms are other ones in each split; a share of labels
is wrong, as in data made by people.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenfold.classify.data.draw import Sprite, compose, sprite
from tenfold.classify.data.mvsa import joint
from tenfold.classify.data.posts import NEGATIVE, NEUTRAL, POLARITIES, POSITIVE, SPLITS, DataSet, Post, as_tensor
from tenfold.classify.data.words import AFTER, BEFORE, THINGS, WHOS, Writer

SIZES = (3611, 1000, 2409)  # to learn from as many as in MVSA-single; enough to judge by, that a point is no chance
LARGE = (19_816, 2410, 2409)  # of HFM
LABELS = ("congruent", "incongruent")
NOISE = 0.05
Sprites = Callable[[int, str, random.Random], Sprite]  # of a mood, -1, 0 or 1, for a split
PLAIN = ("here is", "look at", "this is", "a picture of", "on the way to", "back from")


@dataclass(frozen=True, slots=True)
class Wish:
    """rule: "clash" or "joint". sizes: of train, dev and test. noise: share of labels that are wrong, in each."""

    rule: str = "clash"
    sizes: tuple[int, int, int] = SIZES
    noise: float = NOISE
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError."""
        if self.rule not in ("clash", "joint"):
            raise ValueError(f"rule is {self.rule!r}; allowed: clash, joint.")
        if min(self.sizes) < 4:
            raise ValueError(f"sizes are {self.sizes}; allowed: from 4.")
        if not 0 <= self.noise < 0.5:
            raise ValueError(f"noise is {self.noise}; allowed: 0 to less than 0.5.")


def generate(wish: Wish, sprites: Sprites = sprite, pictures: str = "drawn") -> DataSet:
    """The same posts for the same wish. pictures: what `sprites` makes, for people."""
    wish.check()
    parts = [
        _split(wish, name, size, sprites, random.Random(f"{wish.seed} {wish.rule} {name}"))
        for name, size in zip(SPLITS, wish.sizes)
    ]
    labels = LABELS if wish.rule == "clash" else POLARITIES
    name = f"incongruity-{wish.rule}" if pictures == "drawn" else f"incongruity-{wish.rule}-{pictures}"
    return DataSet.of(name, labels, parts, source=f"made up, seed {wish.seed}, {wish.noise:.0%} of labels wrong")


def _split(wish: Wish, split: str, size: int, sprites: Sprites, any: random.Random) -> tuple[Post, ...]:
    writer = Writer(split, any)
    posts = []
    for text, image, label in _moods(wish, size, any):
        if any.random() < wish.noise:
            others = [other for other in range(2 if wish.rule == "clash" else 3) if other != label]
            label = any.choice(others)
        written = writer.text(text) if text else plain(any)
        count = 1 + (any.random() < 0.4)
        drawn = as_tensor(compose([sprites(image, split, any) for _ in range(count)], any))
        posts.append(Post(written, drawn, label))
    return tuple(posts)


def _moods(wish: Wish, size: int, any: random.Random) -> Sequence[tuple[int, int, int]]:
    """Moods of text and picture with their label, every combination as often as every other."""
    if wish.rule == "clash":
        kinds = [(text, image, int(text != image)) for text in (-1, 1) for image in (-1, 1)]
    else:
        number = {-1: NEGATIVE, 0: NEUTRAL, 1: POSITIVE}
        pairs = [(text, image) for text in number for image in number]
        ruled = [(text, image, joint(number[text], number[image])) for text, image in pairs]
        kinds = [(text, image, label) for text, image, label in ruled if label is not None]
    rows = [kinds[i % len(kinds)] for i in range(size)]
    any.shuffle(rows)
    return rows


def plain(any: random.Random) -> str:
    """A text without a mood."""
    words = (any.choice(BEFORE), any.choice(PLAIN), any.choice(WHOS), any.choice(THINGS), any.choice(AFTER))
    return " ".join(filter(None, words))
