"""Qwen2-MoE (Qwen1.5-MoE too) and Qwen3-MoE: blocks of Qwen2 and Qwen3 whose feed-forward is experts in most layers;
the older one has an expert for every token beside them, with a gate.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tenfold.models.config import ExpertsConfig, Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.models.qwen2 import DEFAULTS, qwen_windows
from tenfold.nn.mlp import MLP
from tenfold.nn.moe import MoE
from tenfold.nn.step import Step

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class QwenMoEBlock:
    def __init__(self, source: Source, head_norms: bool) -> None:
        dim = source.config.head_dim
        norms = [source.norm(f"self_attn.{n}_norm.weight", dim) if head_norms else None for n in "qk"]
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = source.attention(QKV, "self_attn.o_proj", *norms)
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        self.mlp = feed_forward(source)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.mlp(x, norm=self.mlp_norm, residual=x)


def feed_forward(source: Source) -> MLP | MoE:
    experts = source.config.experts
    assert experts is not None
    if not experts.layers[source.layer]:
        return source.mlp(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
    shared = gate = None
    if experts.shared:
        names = [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
        shared = source.mlp(names[:2], names[2], experts.shared)
        gate = source.linear(["mlp.shared_expert_gate"], [1], source.config.hidden_size)
    return source.moe("mlp.gate.weight", "mlp.experts.", shared=shared, shared_gate=gate)


class Qwen2MoE(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, {**DEFAULTS, "num_experts": 60, "num_experts_per_tok": 4})
        config = read_config(keys, "Qwen2MoeForCausalLM")
        routing = keys.routing(keys.count("num_experts"), normed=keys.flag("norm_topk_prob"))
        experts = ExpertsConfig(
            routing,
            keys.count("moe_intermediate_size", 1408),
            keys.sparse_layers(config.layers),
            keys.count("shared_expert_intermediate_size", 5632),
        )
        windows = qwen_windows(keys, config.layers, alternate=True)
        return replace(config, windows=windows, qkv_bias=keys.flag("qkv_bias", True), experts=experts)

    def block(self, source: Source) -> Block:
        return QwenMoEBlock(source, head_norms=False)


class Qwen3MoE(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, {**DEFAULTS, "num_experts_per_tok": 8})
        config = read_config(keys, "Qwen3MoeForCausalLM")
        count = keys.count("num_experts", keys.count("num_local_experts", 128))
        routing = keys.routing(count, normed=keys.flag("norm_topk_prob"))
        experts = ExpertsConfig(routing, keys.count("moe_intermediate_size", 768), keys.sparse_layers(config.layers))
        bias, window = keys.flag("attention_bias"), keys.window() if keys.flag("use_sliding_window") else 0
        windows = (window,) * config.layers
        return replace(config, windows=windows, qkv_bias=bias, out_bias=bias, experts=experts)

    def block(self, source: Source) -> Block:
        return QwenMoEBlock(source, head_norms=True)
