"""Llama 2 and 3.x, SmolLM2: norm, attention, norm, gated feed-forward, each of the two around a residual."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tenfold.models.config import Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.nn.step import Step


class LlamaBlock:
    def __init__(self, source: Source) -> None:
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = source.attention(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.o_proj"
        )
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        self.mlp = source.mlp(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.mlp(x, norm=self.mlp_norm, residual=x)


class Llama(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, {"max_position_embeddings": 2048})
        bias = keys.flag("attention_bias")
        config = read_config(keys, "LlamaForCausalLM")
        return replace(config, qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias"))

    def block(self, source: Source) -> Block:
        return LlamaBlock(source)
