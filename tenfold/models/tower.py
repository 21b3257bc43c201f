"""What vision towers share: reading their layers from a checkpoint, and sizes from a config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold.models.config import ConfigError, Keys, ModelConfig, TowerSize
from tenfold.models.picture import Picture
from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm
from tenfold.nn.vision import ACTIVATIONS, Activation, LayerNorm, VisionAttention, VisionMLP
from tenfold.weights.load import Weights

TILES = 8  # looked at together; more would only need more memory


class Tower(Protocol):
    """What looks at pictures for a model. token_id: of the tokens that its vectors take the place of."""

    token_id: int

    @classmethod
    def size(cls, whole: Mapping[str, Any], raw: Mapping[str, Any]) -> TowerSize:
        """From the composite config and the processor's settings. Raises ConfigError."""
        ...

    def encode(self, picture: Picture) -> Tensor:
        """[picture.tokens, hidden size of the text] in the compute type. Depends on this picture alone."""
        ...


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """A tower of `layers` equal blocks. side: patches of a tile along one side; 0 where pictures have any size."""

    hidden: int
    inner: int
    layers: int
    heads: int
    patch: int
    side: int
    eps: float
    act: str


def tiled_size(config: TowerConfig) -> TowerSize:
    """Of a tower that looks at TILES tiles together."""
    return TowerSize(TILES * (config.side**2 + 1), config.hidden, config.inner, 3 * config.patch**2)


def part_keys(raw: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> Keys:
    """A part of a composite config. Raises ConfigError."""
    part = raw.get(key)
    if part is not None and not isinstance(part, Mapping):
        raise ConfigError(f"{key} is {str(part)[:80]!r} in the model config; allowed: an object.")
    return Keys(part or {}, defaults)


def square(keys: Keys, key: str) -> int:
    """A length that may be given for each side, both equal. Raises ConfigError."""
    value = keys.get(key)
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or not 1 <= value <= 1 << 14:
        raise ConfigError(f"{key} is {str(keys.get(key))[:80]!r} in the model config; allowed: one length in pixels.")
    return value


def check_heads(config: TowerConfig, multiple: int = 1) -> None:
    """Raises ConfigError."""
    if config.hidden % config.heads or config.hidden // config.heads % multiple:
        raise ConfigError(
            f"The vision config has {config.hidden} features for {config.heads} heads; "
            f"allowed: a multiple of {multiple} for each."
        )


def tiled_tower(keys: Keys, act: str) -> TowerConfig:
    """Of a tower that looks at square tiles of one size; act: its activation unless the config names one. Raises
    ConfigError.
    """
    patch = square(keys, "patch_size")
    config = TowerConfig(
        hidden=keys.count("hidden_size"),
        inner=keys.count("intermediate_size"),
        layers=keys.count("num_hidden_layers"),
        heads=keys.count("num_attention_heads"),
        patch=patch,
        side=square(keys, "image_size") // patch,
        eps=keys.number("layer_norm_eps", 1e-6, high=1.0),
        act=str(keys.get("hidden_act", act)),
    )
    check_heads(config)
    return config


def activation(name: Any) -> Activation:
    """Raises ConfigError."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(
            f"The activation {str(name)[:40]!r} of the vision config is not known; supported: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def token_id(raw: Mapping[str, Any], config: ModelConfig, *names: str) -> int:
    """The first of these keys that the composite config has. Raises ConfigError."""
    value = next((raw[name] for name in names if raw.get(name) is not None), None)
    if type(value) is not int or not 0 <= value < config.vocab_size:
        raise ConfigError(
            f"{names[0]} is {str(value)[:40]} in the model config; allowed: a token id below {config.vocab_size}."
        )
    return value


@dataclass(frozen=True, slots=True, eq=False)
class TowerSource:
    """Layers from the weights under `prefix`."""

    weights: Weights
    prefix: str

    def under(self, prefix: str) -> "TowerSource":
        return TowerSource(self.weights, self.prefix + prefix)

    def array(self, name: str, *shape: int) -> Tensor:
        return self.weights.array(self.prefix + name, shape)

    def vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(self.prefix + name, size=size)

    def layer_norm(self, name: str, size: int, eps: float) -> LayerNorm:
        return LayerNorm(self.vector(name + ".weight", size), self.vector(name + ".bias", size), eps)

    def rms_norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self.weights.kernels, self.vector(name + ".weight", size), eps)

    def linear(self, names: Sequence[str], rows: Sequence[int], cols: int, bias: bool = True) -> Linear:
        """The named projections stacked by rows."""
        full = [self.prefix + name for name in names]
        weight = self.weights.matrix(*(name + ".weight" for name in full), rows=rows, cols=cols)
        offsets = self.weights.vector(*(name + ".bias" for name in full), size=sum(rows)) if bias else None
        return Linear(self.weights.kernels, weight, offsets)

    def attention(
        self,
        config: TowerConfig,
        qkv: Sequence[str],
        out: str,
        bias: bool = True,
        norms: tuple[RMSNorm, RMSNorm] | tuple[None, None] = (None, None),
    ) -> VisionAttention:
        """qkv: names of three projections, or of one that holds all."""
        size = config.hidden
        rows = [size] * 3 if len(qkv) == 3 else [3 * size]
        made = self.linear(qkv, rows, size, bias), self.linear([out], [size], size)
        return VisionAttention(self.weights.kernels, config.heads, *made, *norms)

    def mlp(self, config: TowerConfig, up: str, down: str) -> VisionMLP:
        return VisionMLP(
            self.linear([up], [config.inner], config.hidden),
            self.linear([down], [config.hidden], config.inner),
            activation(config.act),
        )


def pixels_of(picture: Picture, device: torch.device) -> Tensor:
    """uint8 [tiles, height, width, 3] on the device."""
    raw = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8)
    return raw.view(picture.tiles, picture.height, picture.width, 3).to(device)


def by_tiles(look: Callable[[Tensor], Tensor], picture: Picture, device: torch.device) -> Tensor:
    """What `look` makes of the tiles of a picture, TILES at a time, joined along the first dimension."""
    return torch.cat([look(tiles) for tiles in pixels_of(picture, device).split(TILES)])
