"""Phi-3: Llama's block with query, key and value in one projection, gate and up in another; long ones use longrope."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tenfold.models.config import Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.nn.step import Step

DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
# Names under which early exports say longrope; what they hold is longrope's two lists.
LONGROPE = ("su", "yarn")


class Phi3Block:
    def __init__(self, source: Source) -> None:
        self.attention_norm = source.norm("input_layernorm.weight")
        self.attention = source.attention(["self_attn.qkv_proj"], "self_attn.o_proj")
        self.mlp_norm = source.norm("post_attention_layernorm.weight")
        self.mlp = source.mlp(["mlp.gate_up_proj"], "mlp.down_proj")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(x, step, norm=self.attention_norm, residual=x)
        return self.mlp(x, norm=self.mlp_norm, residual=x)


class Phi3(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        scaling = raw.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in LONGROPE:
            raw = {**raw, "rope_scaling": {**scaling, "rope_type": "longrope"}}
        keys = Keys(raw, DEFAULTS)
        config = read_config(keys, "Phi3ForCausalLM")
        return replace(config, windows=(keys.window(),) * config.layers)

    def block(self, source: Source) -> Block:
        return Phi3Block(source)
