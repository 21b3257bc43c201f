"""OLMoE: Llama's block with experts, and with a norm over all of query and over all of key, which may be clipped."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tenfold.models.config import ExpertsConfig, Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.nn.attention import Wide
from tenfold.nn.step import Step


class OlmoeBlock:
    def __init__(self, source: Source) -> None:
        config = source.config
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = source.attention(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.o_proj"
        )
        self.attention.wide = Wide(
            source.norm("self_attn.q_norm.weight", config.q_size),
            source.norm("self_attn.k_norm.weight", config.kv_size),
            config.qkv_clip,
        )
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        self.moe = source.moe("mlp.gate.weight", "mlp.experts.")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.moe(x, norm=self.mlp_norm, residual=x)


class Olmoe(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, {"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5})
        config = read_config(keys, "OlmoeForCausalLM")
        routing = keys.routing(keys.count("num_experts"), normed=keys.flag("norm_topk_prob"))
        experts = ExpertsConfig(routing, config.intermediate_size, (True,) * config.layers)
        bias = keys.flag("attention_bias")
        return replace(config, qkv_bias=bias, out_bias=bias, qkv_clip=keys.cap("clip_qkv"), experts=experts)

    def block(self, source: Source) -> Block:
        return OlmoeBlock(source)
