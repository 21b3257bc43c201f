"""Mixtral: Mistral's block with experts in place of the feed-forward."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tenfold.models.config import ExpertsConfig, Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.nn.step import Step

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


class MixtralBlock:
    def __init__(self, source: Source) -> None:
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = source.attention(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.o_proj"
        )
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        name = "block_sparse_moe" if source.has("block_sparse_moe.gate.weight") else "mlp"
        names = ("w1", "w3", "w2") if name == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
        self.moe = source.moe(f"{name}.gate.weight", f"{name}.experts.", names)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.moe(x, norm=self.mlp_norm, residual=x)


class Mixtral(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, DEFAULTS)
        config = read_config(keys, "MixtralForCausalLM")
        routing = keys.routing(keys.count("num_local_experts"), normed=True)
        experts = ExpertsConfig(routing, config.intermediate_size, (True,) * config.layers)
        return replace(config, windows=(keys.window(),) * config.layers, experts=experts)

    def block(self, source: Source) -> Block:
        return MixtralBlock(source)
