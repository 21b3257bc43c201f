"""One form for config.json: transformers 4 and 5 write rotary embeddings, types and nested text models differently.

Afterwards the rotary keys are the classic ones: `rope_theta`; `rope_scaling`, None or a dict with "rope_type"; and for
the windowed layers of Gemma 3 `rope_local_base_freq`. `torch_dtype` is a plain name such as "bfloat16". Of a composite
model, such as one that sees pictures, the keys are those of its text part, and "whole" holds the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tenfold.weights.checkpoint import CheckpointError

LANGUAGE = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
LLAVA = {
    **LANGUAGE,
    "model.vision_tower.vision_model.": "vision.",
    "model.vision_tower.": "vision.",
    "vision_tower.vision_model.": "vision.",
    "vision_tower.": "vision.",
    "model.multi_modal_projector.": "projector.",
    "multi_modal_projector.": "projector.",
    "model.image_newline": "projector.newline",
    "image_newline": "projector.newline",
}
QWEN_VL = {**LANGUAGE, "model.visual.": "vision.", "visual.": "vision.", "model.": "model."}
IDEFICS = {
    "model.text_model.": "model.",
    "model.vision_model.": "vision.",
    "model.connector.": "projector.",
    "lm_head.": "lm_head.",
}
INTERNVL_CHAT = {**LANGUAGE, "vision_model.": "vision.", "mlp1.": "projector."}

# Families of text models inside composite ones, and what transformers takes for absent keys of each.
TEXT_FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3_text": ("Gemma3ForCausalLM", {}),
    "llama": (
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "qwen2_vl_text": ("Qwen2ForCausalLM", {}),
    "qwen2_5_vl_text": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
}
QWEN_VL_TEXT = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "max_window_layers": 80,
}


@dataclass(frozen=True, slots=True)
class Composite:
    """A model of which the text part is a family of its own.

    prefixes: of tensor names in the file, and what stands for them in ours: "model." and "lm_head." for the text part,
    "vision." for the tower and "projector." for what leads from it to the text; the longest that fits counts. text: key
    of the text part's config, which in older files lies open. family: of a text part without a model_type. defaults: of
    its absent keys.
    """

    prefixes: Mapping[str, str]
    text: str = "text_config"
    family: str = "llama"
    defaults: Mapping[str, Any] = field(default_factory=dict)


COMPOSITES = {
    "gemma3": Composite({k: v for k, v in LANGUAGE.items() if k != "lm_head."}, family="gemma3_text"),
    "idefics3": Composite(IDEFICS),
    "internvl": Composite(LLAVA, family="qwen2"),
    "internvl_chat": Composite(INTERNVL_CHAT, text="llm_config", family="qwen2"),
    "llava_onevision": Composite(LLAVA, family="qwen2"),
    "qwen2_5_vl": Composite(QWEN_VL, family="qwen2_5_vl_text", defaults=QWEN_VL_TEXT),
    "qwen2_vl": Composite(QWEN_VL, family="qwen2_vl_text", defaults=QWEN_VL_TEXT),
    "smolvlm": Composite(IDEFICS),
}
# Rope types under older names.
ROPE_TYPES = {"su": "longrope"}


def normalise(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of the config in one form. Raises CheckpointError where a key holds something of the wrong kind."""
    config = dict(config)
    config = text_part(config, source)
    if "rope_parameters" in config:
        from_parameters(config, config.pop("rope_parameters"), source)
    config["rope_scaling"] = scaling_of(config.get("rope_scaling"), source)
    dtype = config.pop("dtype", config.get("torch_dtype"))
    if isinstance(dtype, str):
        config["torch_dtype"] = dtype.removeprefix("torch.")
    return config


def text_part(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The text model inside a composite config, which it keeps under "whole"; any other config as it is. Raises
    CheckpointError.
    """
    kind = config.get("model_type")
    composite = COMPOSITES.get(kind) if isinstance(kind, str) else None
    if composite is None:
        return config
    text = config.get(composite.text)
    if text is None and kind in ("qwen2_vl", "qwen2_5_vl"):
        text = {k: v for k, v in config.items() if k not in ("vision_config", "model_type")}
    if not isinstance(text, dict):
        raise CheckpointError(f"{source} describes a {kind} model without its {composite.text}; it is damaged.")
    family = text.get("model_type") or composite.family
    if isinstance(family, str) and family in COMPOSITES:  # older files name the whole model here
        family = composite.family
    if not isinstance(family, str) or family not in TEXT_FAMILIES:
        raise CheckpointError(
            f"{source} describes a {kind} model whose text part is {str(family)[:40]!r}; "
            f"supported: {', '.join(sorted(TEXT_FAMILIES))}."
        )
    architecture, defaults = TEXT_FAMILIES[family]
    inherited = {
        key: config[key]
        for key in ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
        if key in config
    }
    # The whole model's end tokens: the text part's own default knows nothing of turns.
    ends = {key: config[key] for key in ("eos_token_id",) if key in config}
    if "rope_parameters" in text:
        defaults = {**defaults, **{k: v for k, v in composite.defaults.items() if k != "rope_theta"}}
    else:
        defaults = {**defaults, **composite.defaults}
    names = {"architectures": [architecture], "composite": kind, "whole": config}
    return {**defaults, **inherited, **text, **ends, **names}


def text_prefixes(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Prefixes of tensor names in the file, and what stands for them in our names."""
    composite = config.get("composite")
    return COMPOSITES[composite].prefixes if composite in COMPOSITES else {}


def from_parameters(config: dict[str, Any], parameters: Any, source: str) -> None:
    """transformers 5: everything about rope in one object, or one object for each type of layer."""
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{source}: rope_parameters is no object; it is damaged.")
    full = parameters.get("full_attention")
    if isinstance(full, dict):
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            config["rope_local_base_freq"] = local["rope_theta"]
        if isinstance(local, dict) and (kind := local.get("rope_type", "default")) != "default":
            raise CheckpointError(
                f"{source}: rope_parameters of sliding_attention have rope_type {kind!r:.40}; supported: default."
            )
        parameters = full
    scaling = dict(parameters)
    for key in ("rope_theta", "partial_rotary_factor"):
        if scaling.get(key) is not None:
            config[key] = scaling[key]
        scaling.pop(key, None)
    config["rope_scaling"] = scaling


def scaling_of(scaling: Any, source: str) -> dict[str, Any] | None:
    """rope_scaling with its kind under "rope_type", None where it changes nothing."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{source}: rope_scaling is no object; it is damaged.")
    scaling = dict(scaling)
    kind = scaling.pop("type", None)
    kind = scaling.get("rope_type", kind)
    if kind is None or kind in ("default", "mrope"):
        return (
            {"rope_type": "default", "mrope_section": scaling["mrope_section"]} if "mrope_section" in scaling else None
        )
    if not isinstance(kind, str):
        raise CheckpointError(f"{source}: the type of rope_scaling is no text; it is damaged.")
    return {**scaling, "rope_type": ROPE_TYPES.get(kind, kind)}
