"""Qwen2 and 2.5: Llama's block with biases on query, key and value; upper layers may slide."""

from dataclasses import replace
from typing import Any

from tenfold.models.config import ConfigError, Keys, ModelConfig, read_config
from tenfold.models.decoder import Block, Decoder, Source
from tenfold.models.llama import LlamaBlock

DEFAULTS = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}


class Qwen2(Decoder):
    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        keys = Keys(raw, DEFAULTS)
        config = read_config(keys, "Qwen2ForCausalLM")
        return replace(config, windows=qwen_windows(keys, config.layers), qkv_bias=True)

    def block(self, source: Source) -> Block:
        return LlamaBlock(source)


def qwen_windows(keys: Keys, layers: int, alternate: bool = False) -> tuple[int, ...]:
    """With `use_sliding_window` the layers from `max_window_layers` on slide; alternate: every second one before."""
    if not keys.flag("use_sliding_window"):
        return (0,) * layers
    first = keys.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ConfigError(f"max_window_layers is {first!r} in the model config; allowed: a whole number from 0.")
    slides = (layer < first and layer % 2 == 0 if alternate else layer >= first for layer in range(layers))
    return keys.layer_windows(layers, tuple(slides))
