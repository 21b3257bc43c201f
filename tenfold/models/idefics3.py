"""Idefics3 and SmolVLM: SigLIP looks at tiles of a picture and at all of it, squares of neighbouring vectors become
one, and one matrix leads to Llama. Each tile's place is written in the prompt.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tenfold.models.config import ConfigError, ModelConfig, TowerSize
from tenfold.models.llava_onevision import PatchEmbedding, siglip_block, siglip_config
from tenfold.models.picture import Picture
from tenfold.models.prepare import HALF, MOST_SIDE, Settings, scaled, stacked, tiles_of
from tenfold.models.tower import TowerSource, by_tiles, part_keys, tiled_size, token_id
from tenfold.nn.vision import Spans, Surroundings, fold, standardised
from tenfold.weights.load import Weights

VISION = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}
MOST_EDGE = 4096  # pixels of a side, whatever the settings say
FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"


class IdeficsProcessor:
    """Settings: those of transformers' Idefics3ImageProcessor."""

    def __init__(
        self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], token: Callable[[int], str]
    ) -> None:
        settings = Settings(raw)
        self.token_id = token_id(whole, config, "image_token_id")
        self.placeholder = token(self.token_id)
        settings.colours(HALF)
        self.resample = settings.resample(Image.Resampling.LANCZOS)
        self.split = settings.flag("do_image_splitting", True)
        self.edge = self._edge(settings, "size", 4 * 364)
        tower = siglip_config(whole, VISION)
        self.tile = self._edge(settings, "max_image_size", 364)
        if self.tile // tower.patch != tower.side:
            raise settings.refuse("max_image_size", f"the tower's {tower.patch * tower.side}")
        self.tokens = (tower.side // folded(whole, tower.side)) ** 2

    def _edge(self, settings: Settings, key: str, default: int) -> int:
        edge = settings.sizes(key, {"longest_edge": default}).get("longest_edge", 0)
        if not 0 < edge <= MOST_SIDE:
            raise settings.refuse(key, f"longest_edge up to {MOST_SIDE}")
        return edge

    def prepare(self, images: Iterable[Image.Image], alone: bool) -> list[Picture]:
        return [self._prepared(image) for image in images]

    def _prepared(self, image: Image.Image) -> Picture:
        image = scaled(image, *self._fitted(image.height, image.width), self.resample)
        tile, rows, columns = self.tile, 0, 0
        if self.split:
            image = scaled(image, *self._whole_tiles(image.height, image.width), self.resample)
            tiles = []
            if max(image.size) > tile:
                rows, columns = image.height // tile, image.width // tile
                tiles = tiles_of(image, tile, tile)
                image = scaled(image, tile, tile, self.resample)
        else:
            tiles, image = [], scaled(image, tile, tile, self.resample)
        tiles = [*tiles, image]
        return Picture(self.tokens * len(tiles), len(tiles), tile, tile, stacked(tiles), grid=(rows, columns)).keyed()

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        """Brought to the longest edge, the other one even, neither above MOST_EDGE."""
        ratio = width / height
        if width >= height:
            width = self.edge
            height = int(width / ratio)
            height += height % 2
        else:
            height = self.edge
            width = int(height * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > MOST_EDGE:
            height, width = int(MOST_EDGE / ratio), MOST_EDGE
        elif height > width and height > MOST_EDGE:
            height, width = MOST_EDGE, int(MOST_EDGE * ratio)
        return max(height, 1), max(width, 1)

    def _whole_tiles(self, height: int, width: int) -> tuple[int, int]:
        tile, ratio = self.tile, width / height
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / ratio) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * ratio) / tile) * tile
        return max(height, tile), max(width, tile)

    def written(self, picture: Picture) -> str:
        rows, columns = picture.grid
        own = self.placeholder * self.tokens
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{FAKE}<row_{row}_col_{column}>{own}" for column in range(1, columns + 1)) + "\n"
        return text + ("\n" if rows else "") + FAKE + WHOLE + own + FAKE


class IdeficsTower:
    @classmethod
    def size(cls, whole: Mapping[str, Any], raw: Mapping[str, Any]) -> TowerSize:
        return tiled_size(siglip_config(whole, VISION))

    def __init__(self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], weights: Weights) -> None:
        self.token_id = token_id(whole, config, "image_token_id")
        self.colours = Settings(raw).colours(HALF)
        self.device, self.dtype = weights.device, weights.dtype
        self.config = siglip_config(whole, VISION)
        self.folded = folded(whole, self.config.side)
        source = TowerSource(weights, "vision.")
        self.embed = PatchEmbedding(source, self.config)
        self.embed.places = self.embed.places[buckets(self.config.side).to(self.device)]
        self.blocks = [
            siglip_block(source.under(f"encoder.layers.{i}."), self.config) for i in range(self.config.layers)
        ]
        self.norm = source.layer_norm("post_layernorm", self.config.hidden, self.config.eps)
        lead = TowerSource(weights, "projector.")
        inner = self.config.hidden * self.folded**2
        self.lead = lead.linear(["modality_projection.proj"], [config.hidden_size], inner, bias=False)

    def encode(self, picture: Picture) -> Tensor:
        return by_tiles(self._look, picture, self.device)

    def _look(self, tiles: Tensor) -> Tensor:
        """uint8 [tiles, H, W, 3] -> [tokens of all, hidden size of the text]."""
        pixels = standardised(tiles, self.colours.scale, self.colours.mean, self.colours.std)
        x = self.embed(pixels.to(self.dtype))
        side = self.config.side
        around = Surroundings(Spans.of([side**2] * len(tiles), self.device))
        for block in self.blocks:
            x = block(x, around)
        x = self.norm(x).view(len(tiles), side, side, -1)
        return self.lead(fold(x, self.folded).flatten(0, 2))


def buckets(side: int) -> Tensor:
    """The learned place of each patch of a full tile [side * side] int64. The models were trained with fractions of a
    side, whose rounding puts a few patches into the place beside theirs.
    """
    fractions = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    borders = torch.arange(1 / side, 1.0, 1 / side)
    places = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), borders, right=True)
    return (places[:, None] * side + places).flatten()


def folded(whole: Mapping[str, Any], side: int) -> int:
    """`scale_factor`. Raises ConfigError."""
    factor = part_keys({"": whole}, "", {}).count("scale_factor", 2)
    if side % factor:
        raise ConfigError(f"scale_factor is {factor} in the model config; allowed: a divisor of {side}.")
    return factor
