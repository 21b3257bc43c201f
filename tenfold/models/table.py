"""Which model families are known, and the two ways in: `model_config` (sizes, before loading) and `build_model`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tenfold.base.table import entry
from tenfold.models.config import ConfigError, ModelConfig
from tenfold.models.tower import Tower
from tenfold.nn.step import Step
from tenfold.ops.kernels import Kernels
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.load import Weights

if TYPE_CHECKING:  # Pillow comes with it
    from tenfold.models.prepare import Processor

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

# What looks at pictures, and what prepares them, by the model_type of the whole.
TOWERS = {
    "idefics3": "tenfold.models.idefics3:IdeficsTower",
    "internvl": "tenfold.models.internvl:InternTower",
    "internvl_chat": "tenfold.models.internvl:InternTower",
    "llava_onevision": "tenfold.models.llava_onevision:LlavaTower",
    "qwen2_5_vl": "tenfold.models.qwen_vl:QwenTower",
    "qwen2_vl": "tenfold.models.qwen_vl:QwenTower",
    "smolvlm": "tenfold.models.idefics3:IdeficsTower",
}
PROCESSORS = {name: entry_point.replace("Tower", "Processor") for name, entry_point in TOWERS.items()}


class Model(Protocol):
    """A decoder as the engine sees it. Its KV cache has `config.layers`, `config.kv_heads` and `config.head_dim`.
    tower: what looks at pictures, None where nothing does.
    """

    config: ModelConfig
    tower: Tower | None

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
    config: ModelConfig = entry(MODELS, architecture(raw), "architecture").configure(dict(raw))
    if not sees(raw):
        return config
    return replace(config, tower=entry(TOWERS, raw["composite"], "model_type").size(raw["whole"], raw["processor"]))


def build_model(raw: Mapping[str, Any], weights: Weights, max_model_len: int) -> Model:
    """The model of a config, for sequences of up to max_model_len tokens. Raises ConfigError, CheckpointError."""
    family = entry(MODELS, architecture(raw), "architecture")
    model: Model = family(model_config(raw), weights, max_model_len)
    if sees(raw):
        make = entry(TOWERS, raw["composite"], "model_type")
        model.tower = make(whole(weights.checkpoint), model.config, raw["processor"], weights)
    weights.finish()
    return model


def sees(raw: Mapping[str, Any]) -> bool:
    """Whether the model of a config looks at pictures."""
    return raw.get("composite") in TOWERS


def whole(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a composite model, of which `checkpoint.config` is the text part."""
    config = dict(checkpoint.config["whole"])
    if config.get("model_type") == "internvl_chat":  # whose code looked the token up
        config.setdefault("img_context_token_id", checkpoint.tokenizer().token_to_id("<IMG_CONTEXT>"))
    return config


def make_processor(checkpoint: Checkpoint, token: Callable[[int], str] | None = None) -> "Processor | None":
    """What prepares pictures for a model, None where it sees none. token: the text of a token, where the checkpoint has
    no tokenizer. Raises ConfigError, CheckpointError.
    """
    raw = checkpoint.config
    if not sees(raw):
        return None

    def known(id: int) -> str:
        text: str | None = checkpoint.tokenizer().id_to_token(id)
        if text is None:
            raise ConfigError(f"The model config names the token {id} for pictures, which the tokenizer does not have.")
        return text

    make = entry(PROCESSORS, raw["composite"], "model_type")
    made: Processor = make(whole(checkpoint), model_config(raw), raw["processor"], token or known)
    return made
