"""InternVL 2, 2.5 and 3: InternViT looks at tiles of a picture and at all of it, squares of four vectors become one,
and two layers lead to Qwen2, Qwen3 or Llama.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tenfold.models.config import ConfigError, Keys, ModelConfig, TowerSize
from tenfold.models.picture import Picture
from tenfold.models.prepare import IMAGENET, MOST_TILES, Settings, scaled, stacked, tiles_of
from tenfold.models.tower import (
    TowerConfig,
    TowerSource,
    activation,
    by_tiles,
    part_keys,
    tiled_size,
    tiled_tower,
    token_id,
)
from tenfold.nn.norm import RMSNorm
from tenfold.nn.vision import LayerNorm, Spans, Surroundings, VisionBlock, fold, patches, standardised
from tenfold.weights.load import Weights

START, END = "<img>", "</img>"
BOUNDS = (("min", 1), ("max", 12))  # tiles of a picture, where nothing else is said
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class InternConfig:
    """tower: side counts patches. folded: vectors along one side that become one. normed: queries and keys are;
    rms: norms are RMS norms; biased: queries, keys and values are.
    """

    tower: TowerConfig
    folded: int
    normed: bool
    rms: bool
    biased: bool

    @classmethod
    def read(cls, whole: Mapping[str, Any]) -> "InternConfig":
        """Raises ConfigError."""
        keys = part_keys(whole, "vision_config", VISION)
        tower = tiled_tower(keys, "gelu")
        folded = round(1 / Keys(whole).number("downsample_ratio", 0.5, high=1.0))
        if tower.side % folded:
            raise ConfigError(f"downsample_ratio is 1/{folded} in the model config, and {tower.side} patches a side.")
        if whole.get("vision_feature_layer", -1) != -1 or whole.get("select_layer", -1) != -1:
            raise ConfigError("vision_feature_layer is not -1 in the model config; supported: -1.")
        if whole.get("vision_feature_select_strategy", "default") != "default":
            raise ConfigError("vision_feature_select_strategy is not 'default' in the model config; allowed: default.")
        norm = keys.get("norm_type", "layer_norm")
        if norm not in ("layer_norm", "rms_norm"):
            raise ConfigError(f"norm_type is {str(norm)[:40]!r} in the vision config; allowed: layer_norm, rms_norm.")
        normed = keys.flag("use_qk_norm", keys.flag("qk_normalization"))
        biased = keys.flag("attention_bias", keys.flag("qkv_bias"))
        return cls(tower, folded, normed, norm == "rms_norm", biased)

    @property
    def tokens(self) -> int:
        """Of one tile."""
        return (self.tower.side // self.folded) ** 2


class InternProcessor:
    """Settings: those of transformers' GotOcr2ImageProcessor; of the original files, which have none, the config's."""

    def __init__(
        self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], token: Callable[[int], str]
    ) -> None:
        settings = Settings(raw)
        own = InternConfig.read(whole)
        self.token_id = token_id(whole, config, "image_token_id", "img_context_token_id")
        self.placeholder = token(self.token_id)
        settings.colours(IMAGENET)
        self.resample = settings.resample(Image.Resampling.BICUBIC)
        self.tile = own.tower.side * own.tower.patch
        if settings.tile(self.tile) != (self.tile, self.tile):
            raise settings.refuse("size", f"the tower's {self.tile} x {self.tile}")
        least, most = (Settings(whole).count(f"{which}_dynamic_patch", n, MOST_TILES) for which, n in BOUNDS)
        self.least = settings.count("min_patches", least, MOST_TILES)
        self.most = settings.count("max_patches", most, MOST_TILES)
        self.tokens = own.tokens

    def prepare(self, images: Iterable[Image.Image], alone: bool) -> list[Picture]:
        return [self._prepared(image) for image in images]

    def _prepared(self, image: Image.Image) -> Picture:
        tile = self.tile
        columns, rows = self._grid(image.width, image.height)
        tiles = tiles_of(scaled(image, rows * tile, columns * tile, self.resample), tile, tile)
        if len(tiles) > 1:
            tiles.append(scaled(image, tile, tile, self.resample))
        return Picture(self.tokens * len(tiles), len(tiles), tile, tile, stacked(tiles)).keyed()

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows whose shape is nearest to the picture's; of those alike the largest that is not much larger
        than the picture.
        """
        if self.most == 1:
            return 1, 1
        counts = range(1, self.most + 1)
        grids = [(c, r) for c in counts for r in counts if self.least <= c * r <= self.most]
        best, nearest = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(width / height - columns / rows)
            if distance < nearest:
                best, nearest = (columns, rows), distance
            elif distance == nearest and width * height > 0.5 * self.tile**2 * columns * rows:
                best = columns, rows
        return best

    def written(self, picture: Picture) -> str:
        return START + self.placeholder * picture.tokens + END


class InternTower:
    """Two layouts of names: transformers' own, and that of the files of 2024 (`internvl_chat`)."""

    @classmethod
    def size(cls, whole: Mapping[str, Any], raw: Mapping[str, Any]) -> TowerSize:
        return tiled_size(InternConfig.read(whole).tower)

    def __init__(self, whole: Mapping[str, Any], config: ModelConfig, raw: Mapping[str, Any], weights: Weights) -> None:
        self.config = InternConfig.read(whole)
        self.token_id = token_id(whole, config, "image_token_id", "img_context_token_id")
        self.colours = Settings(raw).colours(IMAGENET)
        self.device, self.dtype = weights.device, weights.dtype
        tower = self.config.tower
        source, self.original = TowerSource(weights, "vision."), weights.has("vision.embeddings.class_embedding")
        first, patch, places = ORIGINAL_EMBEDDINGS if self.original else EMBEDDINGS
        self.first = source.array(f"embeddings.{first}", 1, 1, tower.hidden)
        self.weight = source.array(f"embeddings.{patch}.weight", tower.hidden, 3, tower.patch, tower.patch).flatten(1)
        self.bias = source.array(f"embeddings.{patch}.bias", tower.hidden)
        self.places = source.array(f"embeddings.{places}", 1, tower.side**2 + 1, tower.hidden)
        make = self._original_block if self.original else self._block
        layer = "encoder.layers" if self.original else "encoder.layer"
        self.blocks = [make(source.under(f"{layer}.{i}.")) for i in range(tower.layers)]
        lead, inner, hidden = (
            TowerSource(weights, "projector."),
            tower.hidden * self.config.folded**2,
            config.hidden_size,
        )
        norm, up, down = ("0", "1", "3") if self.original else ("layer_norm", "linear_1", "linear_2")
        self.norm = lead.layer_norm(norm, inner, 1e-5)
        self.up, self.down = lead.linear([up], [hidden], inner), lead.linear([down], [hidden], hidden)
        self.act = activation(whole.get("projector_hidden_act", "gelu"))

    def _norm(self, source: TowerSource, name: str) -> LayerNorm | RMSNorm:
        tower = self.config.tower
        return (source.rms_norm if self.config.rms else source.layer_norm)(name, tower.hidden, tower.eps)

    def _scales(self, source: TowerSource, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        first, second = (source.array(name, self.config.tower.hidden) for name in names)
        return first, second

    def _block(self, source: TowerSource) -> VisionBlock:
        tower = self.config.tower
        norms: Any = (None, None)
        if self.config.normed:
            norms = tuple(source.rms_norm(f"attention.{name}_norm", tower.hidden, 1e-6) for name in ("q", "k"))
        qkv = [f"attention.{name}_proj" for name in ("q", "k", "v")]
        attention = source.attention(tower, qkv, "attention.projection_layer", self.config.biased, norms)
        before = self._norm(source, "layernorm_before"), self._norm(source, "layernorm_after")
        mlp = source.mlp(tower, "mlp.fc1", "mlp.fc2")
        return VisionBlock(before, attention, mlp, self._scales(source, ("lambda_1", "lambda_2")))

    def _original_block(self, source: TowerSource) -> VisionBlock:
        tower = self.config.tower
        norms: Any = (None, None)
        if self.config.normed:
            norms = tuple(source.rms_norm(f"attn.{name}_norm", tower.hidden, tower.eps) for name in ("q", "k"))
        attention = source.attention(tower, ["attn.qkv"], "attn.proj", self.config.biased, norms)
        before = self._norm(source, "norm1"), self._norm(source, "norm2")
        return VisionBlock(
            before, attention, source.mlp(tower, "mlp.fc1", "mlp.fc2"), self._scales(source, ("ls1", "ls2"))
        )

    def encode(self, picture: Picture) -> Tensor:
        return by_tiles(self._look, picture, self.device)

    def _look(self, part: Tensor) -> Tensor:
        """uint8 [tiles, H, W, 3] -> [tokens of all, hidden size of the text]."""
        pixels = standardised(part, self.colours.scale, self.colours.mean, self.colours.std)
        tower, tiles = self.config.tower, len(part)
        x = F.linear(patches(pixels.to(self.dtype), tower.patch), self.weight, self.bias)
        x = (torch.cat([self.first.expand(tiles, -1, -1), x], dim=1) + self.places).flatten(0, 1)
        around = Surroundings(Spans.of([tower.side**2 + 1] * tiles, self.device))
        for block in self.blocks:
            x = block(x, around)
        x = x.view(tiles, tower.side**2 + 1, -1)[:, 1:].reshape(tiles, tower.side, tower.side, -1)
        return self.down(self.act(self.up(self.norm(fold(x, self.config.folded).flatten(0, 2)))))


# Names of the vector that stands before the patches, of the patches' convolution, and of the places.
EMBEDDINGS = ("cls_token", "patch_embeddings.projection", "position_embeddings")
ORIGINAL_EMBEDDINGS = ("class_embedding", "patch_embedding", "position_embedding")
