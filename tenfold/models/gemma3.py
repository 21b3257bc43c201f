"""Gemma 3, text: norms before and after each sublayer and on query and key heads; five windowed layers to a full one,
with a rotary base of their own."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tenfold.models.config import ConfigError, Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.nn.step import Step

# What published configs leave out.
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1_000_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


class Gemma3Block:
    def __init__(self, source: Source) -> None:
        head_dim = source.config.head_dim
        self.before_attention = source.norm("input_layernorm.weight")
        self.attention = source.attention(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn.o_proj",
            q_norm=source.norm("self_attn.q_norm.weight", head_dim),
            k_norm=source.norm("self_attn.k_norm.weight", head_dim),
        )
        self.after_attention = source.norm("post_attention_layernorm.weight")
        self.before_mlp = source.norm("pre_feedforward_layernorm.weight")
        self.mlp = source.mlp(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
        self.after_mlp = source.norm("post_feedforward_layernorm.weight")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.after_attention.add(x, self.attention(x, step, norm=self.before_attention))
        return self.after_mlp.add(x, self.mlp(x, norm=self.before_mlp))


class Gemma3(Decoder):
    unit = 1.0  # norms are stored as their difference from 1

    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, DEFAULTS)
        if keys.flag("use_bidirectional_attention"):
            raise ConfigError(
                "use_bidirectional_attention is true in the model config; only causal models are supported."
            )
        config = read_config(keys, "Gemma3ForCausalLM", activation_key="hidden_activation")
        bias = keys.flag("attention_bias")
        return replace(
            config,
            windows=keys.layer_windows(config.layers, pattern(keys, config.layers)),
            local_rope=keys.rope(config.head_dim, keys.number("rope_local_base_freq", 10_000.0, high=1e18), None),
            scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
            attention_softcap=keys.cap("attn_logit_softcapping"),
            logit_softcap=keys.cap("final_logit_softcapping"),
            qkv_bias=bias,
            out_bias=bias,
        )

    def embed_scale(self, config: ModelConfig, dtype: torch.dtype) -> float:
        """Rounded to the compute type, as the models were trained."""
        return float(torch.tensor(config.hidden_size**0.5, dtype=dtype))

    def block(self, source: Source) -> Block:
        return Gemma3Block(source)


def pattern(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Every sixth layer (or `sliding_window_pattern`-th) sees everything, the others slide."""
    every = keys.get("sliding_window_pattern", 6)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"sliding_window_pattern is {every!r} in the model config; allowed: a whole number from 1.")
    return tuple(bool((layer + 1) % every) for layer in range(layers))
