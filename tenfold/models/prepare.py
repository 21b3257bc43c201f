"""How pictures are prepared for a model: cut and scaled to what its tower looks at, and what stands for them in a
prompt. Numbers come from the checkpoint's own processor settings.

Invariant: the pixels are those of transformers' image processors on Pillow, to the last bit. They stay bytes until they
reach the device, where `nn.vision.standardised` makes numbers of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tenfold.models.config import ConfigError
from tenfold.models.picture import Picture

MOST_SIDE = 1 << 14  # believable sizes of tiles; more is a broken or hostile file
MOST_TILES = 1 << 10

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Processor(Protocol):
    """Of one model. placeholder: what its chat template writes for a picture; token_id: the token that a vector of a
    picture takes the place of.
    """

    placeholder: str
    token_id: int

    def prepare(self, images: Iterable[Image.Image], alone: bool) -> list[Picture]:
        """Pictures of one prompt, RGB, in its order, one after the other; alone: whether there is only one. Raises
        ValueError for one that the model cannot look at.
        """
        ...

    def written(self, picture: Picture) -> str:
        """What takes the place of the placeholder: text with `picture.tokens` times the token."""
        ...


@dataclass(frozen=True, slots=True)
class Colours:
    """Pixels as numbers: `(pixel * scale - mean) / std`."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """A processor's settings, read key by key with checks. Raises ConfigError."""

    raw: Mapping[str, Any]

    def refuse(self, key: str, allowed: str) -> ConfigError:
        return ConfigError(f"{key} is {repr(self.raw.get(key))[:80]} in the processor's settings; allowed: {allowed}.")

    def count(self, key: str, default: int, most: int = MOST_SIDE) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            raise self.refuse(key, f"a whole number from 1 to {most}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def sizes(self, key: str, default: Mapping[str, int]) -> dict[str, int]:
        """An object of lengths in pixels, or one number for both sides."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is int:
            value = {"height": value, "width": value}
        right = isinstance(value, Mapping) and all(n is None or (type(n) is int and n > 0) for n in value.values())
        if not right:
            raise self.refuse(key, "lengths in pixels by name")
        return {name: n for name, n in value.items() if n is not None}

    def tile(self, default: int) -> tuple[int, int]:
        """`size` as height and width."""
        sizes = self.sizes("size", {"height": default, "width": default})
        edge = sizes.get("shortest_edge", 0)
        height, width = sizes.get("height", edge), sizes.get("width", edge)
        if not (0 < height <= MOST_SIDE and 0 < width <= MOST_SIDE):
            raise self.refuse("size", f"height and width up to {MOST_SIDE}")
        return height, width

    def resample(self, default: int) -> Image.Resampling:
        value = self.raw.get("resample")
        try:
            return Image.Resampling(default if value is None else value)
        except (ValueError, TypeError):
            raise self.refuse("resample", "0 to 5, a filter of Pillow") from None

    def colours(self, default: tuple[tuple[float, ...], tuple[float, ...]]) -> Colours:
        for key in ("do_resize", "do_rescale"):
            if not self.flag(key, True):
                raise self.refuse(key, "true")
        scale = self.raw.get("rescale_factor")
        scale = 1 / 255 if scale is None else scale
        if not isinstance(scale, (int, float)) or not 0 < scale < 1e3:
            raise self.refuse("rescale_factor", "a number above 0")
        if not self.flag("do_normalize", True):
            return Colours(float(scale), (0.0,) * 3, (1.0,) * 3)
        mean, std = (self._three(key, own) for key, own in zip(("image_mean", "image_std"), default))
        if not all(x > 0 for x in std):
            raise self.refuse("image_std", "numbers above 0")
        return Colours(float(scale), mean, std)

    def _three(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = self.raw.get(key)
        value = default if value is None else value
        value = [value] * 3 if isinstance(value, (int, float)) else value
        right = isinstance(value, (list, tuple)) and len(value) == 3
        if not right or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in value):
            raise self.refuse(key, "three numbers")
        return tuple(map(float, value))


def blank() -> Image.Image:
    """A small picture of nothing."""
    return Image.new("RGB", (64, 64), (128, 128, 128))


def scaled(image: Image.Image, height: int, width: int, resample: Image.Resampling) -> Image.Image:
    return image.resize((width, height), resample=resample)


def tiles_of(image: Image.Image, height: int, width: int) -> list[Image.Image]:
    """Tiles of a picture whose sides are multiples of theirs, row by row."""
    return [
        image.crop((x, y, x + width, y + height))
        for y in range(0, image.height, height)
        for x in range(0, image.width, width)
    ]


def stacked(tiles: Sequence[Image.Image]) -> bytes:
    """The pixels of equal tiles one after the other."""
    return np.stack([np.asarray(tile) for tile in tiles]).tobytes()
