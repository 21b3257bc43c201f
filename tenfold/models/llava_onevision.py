"""LLaVA-OneVision: SigLIP looks at tiles of a picture and at all of it, two layers lead to Qwen2.

A picture alone in its prompt is cut into tiles of the resolution that wastes least ("anyres"): its tokens are those of
the whole, then those of the tiles put together, without their padding, each row ended by a learned vector, and made
coarser where they are many. Several pictures of one prompt are one square each.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tenfold.models.config import ConfigError, Keys, ModelConfig, TowerSize
from tenfold.models.picture import Picture
from tenfold.models.prepare import MOST_TILES, OPENAI, Settings, scaled, stacked, tiles_of
from tenfold.models.tower import (
    TowerConfig,
    TowerSource,
    activation,
    by_tiles,
    part_keys,
    square,
    tiled_size,
    tiled_tower,
    token_id,
)
from tenfold.nn.vision import Spans, Surroundings, VisionBlock, patches, standardised
from tenfold.weights.load import Weights

TILE = 384
RATIO = 1.1  # features are made coarser where they are more than this above what `anyres_max` allows, by each side
PINPOINTS = tuple((TILE * rows, TILE * columns) for rows in range(1, 7) for columns in range(1, 7))
TOKENS = ("image_token_index", "image_token_id")
STRIP = 256  # rows of a picture that are put into a square at a time


@dataclass(frozen=True, slots=True)
class Anyres:
    """side: features of a tile along one side; tile: pixels; pinpoints: heights and widths that pictures are brought
    to; most: tiles whose features are kept as they are.
    """

    side: int
    tile: int
    pinpoints: tuple[tuple[int, int], ...]
    most: int

    @classmethod
    def read(cls, whole: Mapping[str, Any]) -> "Anyres":
        """Raises ConfigError."""
        vision = part_keys(whole, "vision_config", {"image_size": TILE, "patch_size": 14})
        tile = square(vision, "image_size")
        aspect = whole.get("vision_aspect_ratio") or "anyres_max_9"
        most = str(aspect).removeprefix("anyres_max_")
        if not most.isdigit() or not 1 <= int(most) <= MOST_TILES:
            raise ConfigError(
                f"vision_aspect_ratio is {str(aspect)[:40]!r} in the model config; allowed: anyres_max_N."
            )
        return cls(tile // square(vision, "patch_size"), tile, pinpoints(whole, tile), int(most))

    def best(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint that keeps most of a picture's pixels, and of those the one that wastes least."""

        def worth(point: tuple[int, int]) -> tuple[int, int]:
            scale = min(point[1] / width, point[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - point[0] * point[1]

        return max(self.pinpoints, key=worth)

    def kept(self, height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Of rows x columns features put together from tiles of a picture of this size: how many at the top and at the
        left are padding, as they are at the other end; and what is left of rows and columns.
        """
        if width / height > columns / rows:
            pad = (rows - int(round(height * (columns / width), 7))) // 2
            return pad, 0, rows - 2 * pad, columns
        pad = (columns - int(round(width * (rows / height), 7))) // 2
        return 0, pad, rows, columns - 2 * pad

    def coarser(self, rows: int, columns: int) -> tuple[int, int]:
        """What so many features are brought to."""
        ratio = math.sqrt(rows * columns / (self.most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > RATIO else (rows, columns)

    def tokens(self, height: int, width: int) -> int:
        """Of a picture alone in its prompt."""
        point = self.best(height, width)
        rows, columns = (self.side * (length // self.tile) for length in point)
        rows, columns = self.coarser(*self.kept(height, width, rows, columns)[2:])
        return self.side**2 + rows * (columns + 1)


def pinpoints(raw: Mapping[str, Any], tile: int) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`, in whole tiles. Raises ConfigError."""
    value = raw.get("image_grid_pinpoints") or PINPOINTS
    pairs = (
        [tuple(pair) for pair in value if isinstance(pair, (list, tuple))] if isinstance(value, (list, tuple)) else []
    )
    right = pairs and len(pairs) == len(value) and all(len(p) == 2 and all(type(n) is int for n in p) for p in pairs)
    if not right or not all(h >= tile and w >= tile and h * w <= MOST_TILES * tile**2 for h, w in pairs):
        raise ConfigError(
            f"image_grid_pinpoints is {str(value)[:80]!r} in the model config; allowed: pairs of height and width from "
            f"{tile}, up to {MOST_TILES} tiles."
        )
    return tuple((h, w) for h, w in pairs)


class LlavaProcessor:
    """Settings: those of transformers' LlavaOnevisionImageProcessor."""

    def __init__(
        self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], token: Callable[[int], str]
    ) -> None:
        settings = Settings(raw)
        self.anyres = Anyres.read(whole)
        self.token_id = token_id(whole, config, *TOKENS)
        self.placeholder = token(self.token_id)
        self.colours = settings.colours(OPENAI)
        self.resample = settings.resample(Image.Resampling.BICUBIC)
        tile = self.anyres.tile
        if settings.tile(tile) != (tile, tile):
            raise settings.refuse("size", f"the tower's {tile} x {tile}")
        own = pinpoints(settings.raw, tile) if settings.raw.get("image_grid_pinpoints") else self.anyres.pinpoints
        if own != self.anyres.pinpoints:
            raise settings.refuse("image_grid_pinpoints", "those of the model config")

    def prepare(self, images: Iterable[Image.Image], alone: bool) -> list[Picture]:
        return [self._tiled(image) if alone else self._squared(image) for image in images]

    def written(self, picture: Picture) -> str:
        return self.placeholder * picture.tokens

    def _tiled(self, image: Image.Image) -> Picture:
        width, height = image.size
        tile = self.anyres.tile
        rows, columns = self.anyres.best(height, width)
        down, across = rows / height, columns / width
        if across < down:
            inner = scaled(image, min(math.ceil(height * across), rows), columns, self.resample)
        else:
            inner = scaled(image, rows, min(math.ceil(width * down), columns), self.resample)
        canvas = Image.new("RGB", (columns, rows))
        canvas.paste(inner, ((columns - inner.width) // 2, (rows - inner.height) // 2))
        tiles = [scaled(image, tile, tile, self.resample), *tiles_of(canvas, tile, tile)]
        tokens = self.anyres.tokens(height, width)
        return Picture(
            tokens, len(tiles), tile, tile, stacked(tiles), grid=(rows // tile, columns // tile, height, width)
        ).keyed()

    def _squared(self, image: Image.Image) -> Picture:
        """In the middle of a square, which is scaled in strips and never there as a whole: it may be two hundred times
        as large as a narrow picture.
        """
        side, tile = max(image.size), self.anyres.tile
        red, green, blue = (int(255 * x) for x in self.colours.mean)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        narrow = Image.new("RGB", (tile, side), (red, green, blue))
        for y in range(0, image.height, STRIP):
            part = image.crop((0, y, image.width, min(y + STRIP, image.height)))
            strip = Image.new("RGB", (side, part.height), (red, green, blue))
            strip.paste(part, (left, 0))
            narrow.paste(scaled(strip, part.height, tile, self.resample), (0, top + y))
        pixels = stacked([scaled(narrow, tile, tile, self.resample)])
        return Picture(self.anyres.side**2 + 1, 1, tile, tile, pixels).keyed()


class LlavaTower:
    @classmethod
    def size(cls, whole: Mapping[str, Any], raw: Mapping[str, Any]) -> TowerSize:
        return tiled_size(siglip_config(whole))

    def __init__(self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], weights: Weights) -> None:
        self.anyres = Anyres.read(whole)
        self.token_id = token_id(whole, config, *TOKENS)
        self.colours = Settings(raw).colours(OPENAI)
        self.device, self.dtype = weights.device, weights.dtype
        keys = Keys(whole)
        layer = keys.get("vision_feature_layer", -1)
        self.config = siglip_config(whole)
        if type(layer) is not int or not -self.config.layers <= layer < 0 or layer == -self.config.layers - 1:
            raise ConfigError(f"vision_feature_layer is {str(layer)[:40]} in the model config; allowed: -1 downwards.")
        if keys.get("vision_feature_select_strategy", "full") != "full":
            raise ConfigError("vision_feature_select_strategy is not 'full' in the model config; supported: full.")
        source = TowerSource(weights, "vision.")
        self.embed = PatchEmbedding(source, self.config)
        self.blocks = [
            siglip_block(source.under(f"encoder.layers.{i}."), self.config)
            for i in range(self.config.layers + 1 + layer)
        ]
        weights.pass_over("vision.post_layernorm.", "vision.head.", "vision.encoder.layers.")
        lead = TowerSource(weights, "projector.")
        hidden, bias = config.hidden_size, keys.flag("multimodal_projector_bias", True)
        self.newline = lead.array("newline", hidden)
        self.up = lead.linear(["linear_1"], [hidden], self.config.hidden, bias)
        self.act = activation(keys.get("projector_hidden_act", "gelu"))
        self.down = lead.linear(["linear_2"], [hidden], hidden, bias)

    def encode(self, picture: Picture) -> Tensor:
        features = by_tiles(self._look, picture, self.device)
        if picture.tiles == 1:
            return torch.cat([features[0], self.newline[None]])
        return torch.cat([features[0], self._together(features[1:], picture.grid)])

    def _look(self, tiles: Tensor) -> Tensor:
        """uint8 [tiles, H, W, 3] -> [tiles, patches, hidden size of the text]."""
        pixels = standardised(tiles, self.colours.scale, self.colours.mean, self.colours.std)
        x = self.embed(pixels.to(self.dtype))
        around = Surroundings(Spans.of([self.anyres.side**2] * len(tiles), self.device))
        for block in self.blocks:
            x = block(x, around)
        return self.down(self.act(self.up(x))).unflatten(0, (len(tiles), -1))

    def _together(self, tiles: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Features of tiles as one picture, without its padding, every row ended: [tokens, hidden]."""
        down, across, height, width = grid
        side = self.anyres.side
        joined = tiles.view(down, across, side, side, -1).permute(4, 0, 2, 1, 3)
        joined = joined.reshape(tiles.shape[-1], down * side, across * side)
        top, left, rows, columns = self.anyres.kept(height, width, down * side, across * side)
        joined = joined[:, top : top + rows, left : left + columns]
        coarse = self.anyres.coarser(rows, columns)
        if coarse != (rows, columns):
            joined = F.interpolate(joined[None], coarse, mode="bilinear")[0]
        ends = self.newline[:, None, None].expand(-1, joined.shape[1], 1)
        return torch.cat([joined, ends], dim=2).flatten(1).T


class PatchEmbedding:
    """SigLIP's: patches through one matrix, and a learned vector for each place in a tile."""

    def __init__(self, source: TowerSource, config: TowerConfig) -> None:
        self.patch = config.patch
        shape = (config.hidden, 3, config.patch, config.patch)
        self.weight = source.array("embeddings.patch_embedding.weight", *shape).flatten(1)
        self.bias = source.array("embeddings.patch_embedding.bias", config.hidden)
        self.places = source.array("embeddings.position_embedding.weight", config.side**2, config.hidden)

    def __call__(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, H, W] -> [tiles * patches, D]."""
        return (F.linear(patches(pixels, self.patch), self.weight, self.bias) + self.places).flatten(0, 1)


SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": TILE,
    "patch_size": 14,
}


def siglip_config(whole: Mapping[str, Any], defaults: Mapping[str, Any] = SIGLIP) -> TowerConfig:
    """Raises ConfigError."""
    return tiled_tower(part_keys(whole, "vision_config", defaults), "gelu_pytorch_tanh")


def siglip_block(source: TowerSource, config: TowerConfig) -> VisionBlock:
    norms = (source.layer_norm(f"layer_norm{i}", config.hidden, config.eps) for i in (1, 2))
    attention = source.attention(config, [f"self_attn.{name}_proj" for name in ("q", "k", "v")], "self_attn.out_proj")
    first, second = norms
    return VisionBlock((first, second), attention, source.mlp(config, "mlp.fc1", "mlp.fc2"))
