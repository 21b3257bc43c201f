"""Qwen2-VL and Qwen2.5-VL: a tower for pictures of any shape, whose patches rotate by row and column, and Qwen2, whose
positions in pictures have a row and a column, too (M-RoPE).

Patches that become one token lie together: of squares of `merge` by `merge` patches one after the other. In 2.5 most
blocks see windows only.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tenfold.models.config import ConfigError, ModelConfig, TowerSize
from tenfold.models.picture import Picture
from tenfold.models.prepare import OPENAI, Settings, scaled, stacked
from tenfold.models.tower import (
    TowerConfig,
    TowerSource,
    check_heads,
    part_keys,
    pixels_of,
    square,
    token_id,
)
from tenfold.nn.mlp import MLP
from tenfold.nn.norm import RMSNorm
from tenfold.nn.vision import Axial, LayerNorm, Spans, Surroundings, VisionBlock, standardised
from tenfold.weights.load import Weights

THETA = 10000.0
EPS = 1e-6
LEAST, MOST = 56 * 56, 28 * 28 * 1280  # pixels, where nothing else is said
MOST_PIXELS = 1 << 26
MOST_RATIO = 200
ACT = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # of gated layers


@dataclass(frozen=True, slots=True)
class QwenConfig:
    """time: frames that one patch takes, all alike in a picture. window: tokens along one side of a window, 0 for
    none; full: blocks that see all. out: features of the text. gated: of 2.5, with RMS norms and gates.
    """

    tower: TowerConfig
    merge: int
    time: int
    window: int
    full: frozenset[int]
    out: int
    gated: bool

    @classmethod
    def read(cls, whole: Mapping[str, Any]) -> "QwenConfig":
        """Raises ConfigError."""
        gated = whole.get("model_type") == "qwen2_5_vl"
        keys = part_keys(whole, "vision_config", QWEN25 if gated else QWEN2)
        hidden = keys.count("hidden_size" if gated else "embed_dim")
        inner = keys.count("intermediate_size") if gated else hidden * keys.count("mlp_ratio")
        patch, merge = square(keys, "patch_size"), keys.count("spatial_merge_size")
        act = str(keys.get("hidden_act"))
        tower = TowerConfig(hidden, inner, keys.count("depth"), keys.count("num_heads"), patch, 0, EPS, act)
        check_heads(tower, 4)
        window = keys.count("window_size") // merge // patch if gated else 0
        if gated and not window:
            raise ConfigError(
                f"window_size is {keys.get('window_size')} in the vision config; allowed: from {patch * merge}."
            )
        if gated and act not in ACT:
            raise ConfigError(f"hidden_act is {act[:40]!r} in the vision config; supported: {', '.join(ACT)}.")
        full = keys.get("fullatt_block_indexes", [])
        if not isinstance(full, list) or not all(type(n) is int for n in full):
            raise ConfigError(
                f"fullatt_block_indexes is {str(full)[:80]} in the vision config; allowed: a list of numbers."
            )
        out = keys.count("out_hidden_size" if gated else "hidden_size")
        return cls(tower, merge, keys.count("temporal_patch_size"), window, frozenset(full), out, gated)


QWEN2 = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN25 = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


class QwenProcessor:
    """Settings: those of transformers' Qwen2VLImageProcessor."""

    def __init__(
        self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], token: Callable[[int], str]
    ) -> None:
        settings = Settings(raw)
        own = QwenConfig.read(whole)
        self.token_id = token_id(whole, config, "image_token_id")
        self.placeholder = token(self.token_id)
        settings.colours(OPENAI)
        self.resample = settings.resample(Image.Resampling.BICUBIC)
        self.patch, self.merge = own.tower.patch, own.merge
        for key, value in (("patch_size", self.patch), ("merge_size", self.merge), ("temporal_patch_size", own.time)):
            if settings.count(key, value) != value:
                raise settings.refuse(key, f"the tower's {value}")
        self.least, self.most = pixel_bounds(settings)

    def prepare(self, images: Iterable[Image.Image], alone: bool) -> list[Picture]:
        return [self._prepared(image) for image in images]

    def _prepared(self, image: Image.Image) -> Picture:
        height, width = self._size(image.height, image.width)
        pixels = stacked([scaled(image, height, width, self.resample)])
        rows, columns = height // (self.patch * self.merge), width // (self.patch * self.merge)
        return Picture(rows * columns, 1, height, width, pixels, axes=(rows, columns)).keyed()

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Multiples of what a token takes, between the least and the most pixels, of nearly the same shape."""
        if max(height, width) > MOST_RATIO * min(height, width):
            raise ValueError(
                f"The picture is {width} x {height} pixels; allowed: one side up to {MOST_RATIO} times the other."
            )
        factor = self.patch * self.merge
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if rows * columns > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, columns = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
        elif rows * columns < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(n * grow / factor) * factor for n in (height, width))
        return rows, columns

    def written(self, picture: Picture) -> str:
        return self.placeholder * picture.tokens


def pixel_bounds(settings: Settings) -> tuple[int, int]:
    """The least and the most pixels that a picture is brought to. Raises ConfigError."""
    size = settings.sizes("size", {})
    least = settings.count("min_pixels", size.get("shortest_edge", LEAST), MOST_PIXELS)
    return least, settings.count("max_pixels", size.get("longest_edge", MOST), MOST_PIXELS)


class QwenTower:
    @classmethod
    def size(cls, whole: Mapping[str, Any], raw: Mapping[str, Any]) -> TowerSize:
        config = QwenConfig.read(whole)
        tower = config.tower
        most = pixel_bounds(Settings(raw))[1] // tower.patch**2
        return TowerSize(most, tower.hidden, tower.inner, 3 * config.time * tower.patch**2)

    def __init__(self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], weights: Weights) -> None:
        self.config = QwenConfig.read(whole)
        self.token_id = token_id(whole, config, "image_token_id")
        self.colours = Settings(raw).colours(OPENAI)
        self.device, self.dtype = weights.device, weights.dtype
        tower, merge = self.config.tower, self.config.merge
        if self.config.out != config.hidden_size:
            raise ConfigError(
                f"The vision config leads to {self.config.out} features; the text part has {config.hidden_size}."
            )
        source = TowerSource(weights, "vision.")
        shape = (tower.hidden, 3, self.config.time, tower.patch, tower.patch)
        self.weight = source.array("patch_embed.proj.weight", *shape).flatten(1)
        self.blocks = [self._block(source.under(f"blocks.{i}.")) for i in range(tower.layers)]
        self.norm = self._norm(source, "merger.ln_q")
        inner = tower.hidden * merge**2
        self.up = source.linear(["merger.mlp.0"], [inner], inner)
        self.down = source.linear(["merger.mlp.2"], [config.hidden_size], inner)

    def _norm(self, source: TowerSource, name: str) -> LayerNorm | RMSNorm:
        return (source.rms_norm if self.config.gated else source.layer_norm)(name, self.config.tower.hidden, EPS)

    def _block(self, source: TowerSource) -> VisionBlock:
        tower = self.config.tower
        norms = self._norm(source, "norm1"), self._norm(source, "norm2")
        attention = source.attention(tower, ["attn.qkv"], "attn.proj")
        if not self.config.gated:
            return VisionBlock(norms, attention, source.mlp(tower, "mlp.fc1", "mlp.fc2"))
        gate_up = source.linear(["mlp.gate_proj", "mlp.up_proj"], [tower.inner] * 2, tower.hidden)
        down = source.linear(["mlp.down_proj"], [tower.hidden], tower.inner)
        return VisionBlock(norms, attention, MLP(gate_up, down, ACT[tower.act]))

    def encode(self, picture: Picture) -> Tensor:
        tower, merge = self.config.tower, self.config.merge
        rows, columns = picture.height // tower.patch, picture.width // tower.patch
        order, windows = window_order(rows // merge, columns // merge, self.config.window)
        places = together(torch.arange(rows * columns).view(1, rows, columns), merge)  # of patches, by token
        if windows:
            places = places[torch.from_numpy(order)]
        places = places.flatten().to(self.device)
        x = F.linear(self._patches(picture, rows, columns).to(self.dtype)[places], self.weight)
        axial = Axial.of(places // columns, places % columns, tower.hidden // tower.heads, THETA)
        whole = Surroundings(Spans.of([rows * columns], self.device), axial)
        parts = Surroundings(Spans.of([n * merge**2 for n in windows], self.device), axial) if windows else whole
        for i, block in enumerate(self.blocks):
            x = block(x, whole if i in self.config.full else parts)
        x = self.norm(x).view(picture.tokens, -1)
        x = self.down(F.gelu(self.up(x)))
        return x[torch.from_numpy(np.argsort(order)).to(self.device)] if windows else x

    def _patches(self, picture: Picture, rows: int, columns: int) -> Tensor:
        """[rows * columns, 3 * time * patch * patch] float32, row by row."""
        pixels = standardised(pixels_of(picture, self.device), self.colours.scale, self.colours.mean, self.colours.std)
        patch, time = self.config.tower.patch, self.config.time
        cut = pixels[0].view(3, rows, patch, columns, patch).permute(1, 3, 0, 2, 4)
        return cut[:, :, :, None].expand(-1, -1, -1, time, -1, -1).reshape(rows * columns, -1)


def together(grid: Tensor, side: int) -> Tensor:
    """[1, rows, columns] -> [rows * columns / side**2, side**2]: what lies in one square, squares row by row."""
    _, rows, columns = grid.shape
    cut = grid.view(rows // side, side, columns // side, side)
    return cut.transpose(1, 2).reshape(-1, side * side)


def window_order(rows: int, columns: int, side: int) -> tuple[np.ndarray, list[int]]:
    """The tokens of a grid window by window [rows * columns], windows of side x side row by row, and how many each has;
    none where side is 0.
    """
    grid = np.arange(rows * columns).reshape(rows, columns)
    if not side:
        return grid.flatten(), []
    parts = [grid[y : y + side, x : x + side].flatten() for y in range(0, rows, side) for x in range(0, columns, side)]
    return np.concatenate(parts), [len(part) for part in parts]
