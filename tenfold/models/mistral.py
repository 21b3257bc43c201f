"""Mistral: Llama's block, every layer with the same sliding window (or none)."""

from dataclasses import replace
from typing import Any

from tenfold.models.config import Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.models.llama import LlamaBlock


class Mistral(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
        if "sliding_window" not in raw:  # null is for none
            defaults["sliding_window"] = 4096
        keys = Keys(raw, defaults)
        config = read_config(keys, "MistralForCausalLM")
        return replace(config, windows=(keys.window(),) * config.layers)

    def block(self, source: Source) -> Block:
        return LlamaBlock(source)
