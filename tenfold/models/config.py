"""`ModelConfig`: the shape of a decoder, read from a Hugging Face config and checked once, for models to rely on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tenfold.nn.rope import RopeSpec
from tenfold.ops.route import Routing

# Largest believable values: what lies above is a broken or hostile file, not a model.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 28,
    "sliding_window": 1 << 30,
    "num_local_experts": 1 << 12,
    "num_experts": 1 << 12,
    "n_routed_experts": 1 << 12,
    "num_experts_per_tok": 1 << 10,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "decoder_sparse_step": 1 << 10,
    "moe_layer_freq": 1 << 10,
    "n_group": 1 << 10,
    "topk_group": 1 << 10,
    "kv_lora_rank": 1 << 14,
    "q_lora_rank": 1 << 14,
    "qk_rope_head_dim": 1 << 12,
    "qk_nope_head_dim": 1 << 12,
    "v_head_dim": 1 << 12,
    "depth": 1 << 10,
    "embed_dim": 1 << 18,
    "num_heads": 1 << 12,
    "mlp_ratio": 1 << 6,
    "out_hidden_size": 1 << 18,
    "window_size": 1 << 14,
    "spatial_merge_size": 1 << 4,
    "temporal_patch_size": 1 << 4,
    "scale_factor": 1 << 4,
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class ConfigError(ValueError):
    """A model config that cannot be used: says which key, what it holds and what is allowed."""


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The experts of a decoder. layers: whether each layer has them, else it is dense; size: features inside one;
    shared: inside those that see every token, together, 0 for none.
    """

    routing: Routing
    size: int
    layers: tuple[bool, ...]
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads are made from `rank` features of a token,
    which are cached beside `rotary` ones that rotate. plain, value: features of a head's keys that do not rotate, and
    of its values; q_rank: of what queries are made from, 0 where that is the token itself; paired: features that
    rotate together are neighbours, not halves. In `ModelConfig`, kv_heads is 1 and head_dim what is cached.
    """

    rank: int
    rotary: int
    plain: int
    value: int
    q_rank: int = 0
    paired: bool = True


@dataclass(frozen=True, slots=True)
class TowerSize:
    """What looking at pictures takes: patches that are looked at together at most, features of each, features inside a
    feed-forward layer, and numbers a patch has as pixels.
    """

    patches: int
    hidden: int
    inner: int
    pixels: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of `layers` equal blocks.

    windows: sliding window of each layer in tokens, 0 for none. rope, local_rope: of layers without and with a window
    (equal where a family has one). scale multiplies query-key products; qkv_clip (queries, keys and values are
    kept within it), attention_softcap, logit_softcap: 0 for none.
    experts, latent: None where a family has none. rope_sections: pairs of features of a head that rotate by the time,
    the row and the column of a picture's token (M-RoPE of Qwen2-VL); empty where pictures count on like text. tower:
    None where the model sees none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    tied: bool
    rope: RopeSpec
    local_rope: RopeSpec
    windows: tuple[int, ...]
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qkv_clip: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    experts: ExpertsConfig | None = None
    latent: Latent | None = None
    rope_sections: tuple[int, ...] = ()
    tower: TowerSize | None = None

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Keys:
    """A raw config with a family's defaults, read key by key with checks. A key that holds None counts as absent."""

    raw: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = self.defaults.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to the key's limit."""
        value = self.get(key, default)
        limit = LIMITS[key]
        if value is None:
            raise ConfigError(f"The model config has no {key}; it must hold a whole number from 1 to {limit}.")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ConfigError(f"{key} is {value!r} in the model config; allowed: a whole number from 1 to {limit}.")
        return value

    def whole(self, key: str, default: int = 0) -> int:
        """A whole number from 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 20:
            raise ConfigError(f"{key} is {value!r} in the model config; allowed: a whole number from 0.")
        return value

    def number(self, key: str, default: float, low: float = 0.0, high: float = 1e9) -> float:
        """A number above `low`, up to `high`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
            raise ConfigError(
                f"{key} is {value!r} in the model config; allowed: a number above {low:g}, up to {high:g}."
            )
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r} in the model config; allowed: true or false.")
        return value

    def cap(self, key: str) -> float:
        """A soft cap; absent or null is 0, for none."""
        return 0.0 if self.get(key) is None else self.number(key, 0.0)

    def window(self) -> int:
        """`sliding_window`; absent or null is 0, for none."""
        return 0 if self.get("sliding_window") is None else self.count("sliding_window")

    def activation(self, key: str) -> str:
        name = self.get(key, "silu")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ConfigError(f"{key} is {name!r} in the model config; supported: {', '.join(sorted(ACTIVATIONS))}.")
        return ACTIVATIONS[name]

    def rope(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> RopeSpec:
        """Rotary embedding with classic `rope_scaling` keys. Phi-3 keeps its original context outside of them."""
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ConfigError(f"rope_scaling is {scaling!r} in the model config; allowed: an object or null.")
        scaling = dict(scaling or {})
        scaling.setdefault("rope_type", scaling.get("type", "default"))
        original = self.get("original_max_position_embeddings")
        if original is not None and scaling["rope_type"] != "default":
            scaling["original_max_position_embeddings"] = original
        partial = self.number("partial_rotary_factor", 1.0, high=1.0)
        try:
            return RopeSpec(theta, int(head_dim * partial), self.count("max_position_embeddings"), scaling)
        except ValueError as error:
            raise ConfigError(f"The model config cannot be used: {error}") from error

    def rope_sections(self, pairs: int) -> tuple[int, ...]:
        """`mrope_section`: pairs of features by time, row and column, `pairs` in all; empty where there is none."""
        value = (self.get("rope_scaling") or {}).get("mrope_section")
        if value is None:
            return ()
        right = isinstance(value, list) and len(value) == 3 and all(type(n) is int and n >= 0 for n in value)
        if not right or sum(value) != pairs:
            raise ConfigError(
                f"mrope_section is {value!r} in the model config; allowed: three whole numbers of {pairs} together."
            )
        return tuple(value)

    def sparse_layers(self, layers: int) -> tuple[bool, ...]:
        """Which layers have experts: each `decoder_sparse_step`-th, but for those that `mlp_only_layers` names."""
        step, dense = self.count("decoder_sparse_step", 1), self.get("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in dense):
            raise ConfigError(f"mlp_only_layers is {dense!r} in the model config; allowed: a list of layer numbers.")
        return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))

    def routing(self, experts: int, **how: Any) -> Routing:
        """Raises ConfigError for numbers that do not go together."""
        try:
            return Routing(experts, self.count("num_experts_per_tok"), **how)
        except ValueError as error:
            raise ConfigError(f"The model config cannot be used: {error}") from error

    def layer_windows(self, layers: int, slides: "tuple[bool, ...] | bool") -> tuple[int, ...]:
        """Window of each layer. `layer_types`, where the config has it, decides which layers slide, else `slides`."""
        types = self.get("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != layers or not all(name in LAYER_TYPES for name in types):
                raise ConfigError(
                    f"layer_types is {types!r} in the model config; "
                    f"allowed: a list of {layers} names out of {', '.join(LAYER_TYPES)}."
                )
            slides = tuple(name == "sliding_attention" for name in types)
        elif isinstance(slides, bool):
            slides = (slides,) * layers
        window = self.window() if any(slides) else 0
        return tuple(window if slide else 0 for slide in slides)


LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(keys: Keys, architecture: str, activation_key: str = "hidden_act") -> ModelConfig:
    """What every family has, without windows. Families replace the rest. Raises ConfigError."""
    if keys.get("quantization_config") is not None:
        raise ConfigError(
            "The checkpoint is quantised in a way that is not read yet (its config has quantization_config); "
            "use the original weights or a GGUF file of this model."
        )
    sizes = {key: keys.count(key) for key in REQUIRED}
    hidden, heads, layers = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_hidden_layers"]
    kv_heads = keys.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads} in the model config; "
            "the first must be a multiple of the second."
        )
    if keys.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size is {hidden} and num_attention_heads {heads} in the model config; "
            "without head_dim the first must be a multiple of the second."
        )
    head_dim = keys.count("head_dim", hidden // heads)
    rope = keys.rope(head_dim, keys.number("rope_theta", 10000.0, high=1e18), keys.get("rope_scaling"))
    return ModelConfig(
        architecture=architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=keys.count("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps", 1e-6, high=1.0),
        activation=keys.activation(activation_key),
        tied=keys.flag("tie_word_embeddings"),
        rope=rope,
        local_rope=rope,
        windows=(0,) * layers,
        scale=head_dim**-0.5,
        rope_sections=keys.rope_sections(rope.rotary_dim // 2),
    )
