"""DeepSeek-V2 and V3: latent attention; the first layers dense, then experts in groups beside shared ones."""

from dataclasses import replace
from math import log
from typing import Any

from torch import Tensor

from tenfold.models.config import ConfigError, ExpertsConfig, Keys, Latent, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source, make_norm
from tenfold.nn.attention import LatentAttention, Queries
from tenfold.nn.mlp import MLP
from tenfold.nn.moe import MoE
from tenfold.nn.norm import RMSNorm
from tenfold.nn.rope import RopeSpec
from tenfold.nn.step import Step
from tenfold.ops.kernels import AttentionSpec

METHODS = ("greedy", "group_limited_greedy")
V3 = {
    "max_position_embeddings": 4096,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
}
LATENT_EPS = 1e-6  # of the norms of what queries, and keys and values, are compressed to, whatever rms_norm_eps is


class DeepseekBlock:
    def __init__(self, source: Source) -> None:
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = latent_attention(source)
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        self.mlp = feed_forward(source)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.mlp(x, norm=self.mlp_norm, residual=x)


def latent_attention(source: Source) -> LatentAttention:
    c, weights, own = source.config, source.weights, source.config.latent
    assert own is not None
    rows = c.heads * (own.plain + own.rotary)
    if own.q_rank:
        queries = Queries(
            source.linear(["self_attn.q_b_proj"], [rows], own.q_rank),
            source.linear(["self_attn.q_a_proj"], [own.q_rank], c.hidden_size, c.qkv_bias),
            latent_norm(source, "self_attn.q_a_layernorm.weight", own.q_rank),
        )
    else:
        queries = Queries(source.linear(["self_attn.q_proj"], [rows], c.hidden_size))
    up = weights.dense(f"{source.prefix}self_attn.kv_b_proj.weight", c.heads * (own.plain + own.value), own.rank)
    to_keys, to_values = up.view(c.heads, -1, own.rank).split([own.plain, own.value], dim=1)
    return LatentAttention(
        weights.kernels,
        source.layer,
        AttentionSpec(c.heads, 1, c.head_dim, c.scale),
        source.rope,
        queries,
        source.linear(["self_attn.kv_a_proj_with_mqa"], [own.rank + own.rotary], c.hidden_size, c.qkv_bias),
        latent_norm(source, "self_attn.kv_a_layernorm.weight", own.rank),
        weights.bank_of(to_keys.transpose(1, 2)),
        weights.bank_of(to_values),
        source.linear(["self_attn.o_proj"], [c.hidden_size], c.heads * own.value, c.out_bias),
        own.paired,
    )


def latent_norm(source: Source, name: str, size: int) -> RMSNorm:
    return make_norm(source.weights, source.prefix + name, size, LATENT_EPS, source.unit)


def feed_forward(source: Source) -> MLP | MoE:
    experts = source.config.experts
    assert experts is not None
    if not experts.layers[source.layer]:
        return source.mlp(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
    names = [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    shared = source.mlp(names[:2], names[2], experts.shared) if experts.shared else None
    bias = "mlp.gate.e_score_correction_bias"
    return source.moe("mlp.gate.weight", "mlp.experts.", shared=shared, bias=bias if source.has(bias) else "")


def read_deepseek(keys: Keys, architecture: str, **routing: Any) -> ModelConfig:
    """What V2 and V3 have in common. routing: fields of `Routing`."""
    config = read_config(keys, architecture)
    q_rank = keys.count("q_lora_rank") if keys.get("q_lora_rank") is not None else 0
    latent = Latent(
        rank=keys.count("kv_lora_rank"),
        rotary=keys.count("qk_rope_head_dim"),
        plain=keys.count("qk_nope_head_dim"),
        value=keys.count("v_head_dim"),
        q_rank=q_rank,
        paired=keys.flag("rope_interleave", True),
    )
    rope = keys.rope(latent.rotary, config.rope.theta, keys.get("rope_scaling"))
    picks = keys.routing(keys.count("n_routed_experts"), scale=keys.number("routed_scaling_factor", 1.0), **routing)
    size = keys.count("moe_intermediate_size")
    first, every = keys.whole("first_k_dense_replace"), keys.count("moe_layer_freq", 1)
    sparse = tuple(i >= first and i % every == 0 for i in range(config.layers))
    bias = keys.flag("attention_bias")
    return replace(
        config,
        kv_heads=1,
        head_dim=latent.rank + latent.rotary,
        rope=rope,
        local_rope=rope,
        scale=(latent.plain + latent.rotary) ** -0.5 * sharper(rope),
        qkv_bias=bias,
        out_bias=bias,
        experts=ExpertsConfig(picks, size, sparse, size * keys.whole("n_shared_experts")),
        latent=latent,
    )


def sharper(rope: RopeSpec) -> float:
    """By what YaRN's `mscale_all_dim` multiplies scores. Raises ConfigError."""
    if not rope.scaling.get("mscale_all_dim"):
        return 1.0
    try:
        scale, factor = rope.number("mscale_all_dim"), rope.number("factor", 1.0)
    except ValueError as error:
        raise ConfigError(f"The model config cannot be used: {error}") from error
    return (0.1 * scale * log(factor) + 1.0) ** 2 if factor > 1 else 1.0


class DeepseekV2(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys({"n_shared_experts": 2, **raw}, {"max_position_embeddings": 2048})  # null is for none
        method = keys.get("topk_method", "greedy")
        if method not in METHODS:
            raise ConfigError(f"topk_method is {method!r} in the model config; allowed: {', '.join(METHODS)}.")
        grouped = method == "group_limited_greedy"
        groups = {"groups": keys.count("n_group"), "kept": keys.count("topk_group")} if grouped else {}
        config = read_deepseek(keys, "DeepseekV2ForCausalLM", **groups)
        return replace(config, mlp_bias=keys.flag("mlp_bias"))

    def block(self, source: Source) -> Block:
        return DeepseekBlock(source)


class DeepseekV3(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys({"n_shared_experts": 1, **raw}, V3)
        groups = keys.count("n_group")
        return read_deepseek(
            keys,
            "DeepseekV3ForCausalLM",
            score="sigmoid",
            normed=keys.flag("norm_topk_prob", True),
            groups=groups,
            kept=keys.count("topk_group"),
            best=min(2, keys.count("n_routed_experts") // groups),
        )

    def block(self, source: Source) -> Block:
        return DeepseekBlock(source)
