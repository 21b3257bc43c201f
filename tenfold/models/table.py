"""Which model families are known, and the two ways in: `model_config` (sizes, before loading) and `build_model`."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tenfold.base.table import entry
from tenfold.models.config import ConfigError, ModelConfig
from tenfold.nn.step import Step
from tenfold.ops.kernels import Kernels
from tenfold.weights.load import Weights

MODELS = {
    "DeepseekV2ForCausalLM": "tenfold.models.deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "tenfold.models.deepseek:DeepseekV3",
    "Gemma3ForCausalLM": "tenfold.models.gemma3:Gemma3",
    "LlamaForCausalLM": "tenfold.models.llama:Llama",
    "MistralForCausalLM": "tenfold.models.mistral:Mistral",
    "MixtralForCausalLM": "tenfold.models.mixtral:Mixtral",
    "OlmoeForCausalLM": "tenfold.models.olmoe:Olmoe",
    "Phi3ForCausalLM": "tenfold.models.phi3:Phi3",
    "Qwen2ForCausalLM": "tenfold.models.qwen2:Qwen2",
    "Qwen2MoeForCausalLM": "tenfold.models.qwen_moe:Qwen2MoE",
    "Qwen3ForCausalLM": "tenfold.models.qwen3:Qwen3",
    "Qwen3MoeForCausalLM": "tenfold.models.qwen_moe:Qwen3MoE",
}


class Model(Protocol):
    """A decoder as the engine sees it. Its KV cache has `config.layers`, `config.kv_heads` and `config.head_dim`."""

    config: ModelConfig

    def forward(self, step: Step) -> Tensor:
        """Logits [len(step.logits_rows), vocab] float32."""
        ...

    def hidden(self, step: Step) -> Tensor:
        """Final normed states [T, hidden_size]."""
        ...

    def on(self, kernels: Kernels) -> "Model":
        """The same weights on other kernels, with recordings and graphs of its own."""
        ...

    def part(self, step: Step, x: Tensor | None, layers: range) -> Tensor:
        """Some layers of `forward`: x is what the layers before gave, None for the first; the last give the logits."""
        ...


def architecture(raw: Mapping[str, Any]) -> str:
    """The first known name in the config's `architectures`. Raises ConfigError listing what is supported."""
    names = raw.get("architectures")
    names = names if isinstance(names, list) else []
    for name in names:
        if isinstance(name, str) and name in MODELS:
            return name
    given = ", ".join(str(name)[:80] for name in names[:4]) or "none given"
    raise ConfigError(f"Architecture ({given}) is not supported; supported: {', '.join(sorted(MODELS))}.")


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read and check a checkpoint's config. Raises ConfigError with the key, what it holds and what is allowed."""
    return entry(MODELS, architecture(raw), "architecture").configure(dict(raw))


def build_model(raw: Mapping[str, Any], weights: Weights, max_model_len: int) -> Model:
    """The model of a config, for sequences of up to max_model_len tokens. Raises ConfigError, CheckpointError."""
    family = entry(MODELS, architecture(raw), "architecture")
    model: Model = family(family.configure(dict(raw)), weights, max_model_len)
    weights.finish()
    return model
