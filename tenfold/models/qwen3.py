"""Qwen3: Llama's block with a norm on each head of query and key; upper layers may slide."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tenfold.models.config import Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.models.qwen2 import DEFAULTS, qwen_windows
from tenfold.nn.step import Step


class Qwen3Block:
    def __init__(self, source: Source) -> None:
        head_dim = source.config.head_dim
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = source.attention(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn.o_proj",
            q_norm=source.norm("self_attn.q_norm.weight", head_dim),
            k_norm=source.norm("self_attn.k_norm.weight", head_dim),
        )
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        self.mlp = source.mlp(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.mlp(x, norm=self.mlp_norm, residual=x)


class Qwen3(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, {**DEFAULTS, "head_dim": 128})
        bias = keys.flag("attention_bias")
        config = read_config(keys, "Qwen3ForCausalLM")
        windows = qwen_windows(keys, config.layers)
        return replace(config, windows=windows, qkv_bias=bias, out_bias=bias)

    def block(self, source: Source) -> Block:
        return Qwen3Block(source)
