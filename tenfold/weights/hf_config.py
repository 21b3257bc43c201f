"""One form for config.json: transformers 4 and 5 write rotary embeddings, types and nested text models differently.

Afterwards the rotary keys are the classic ones: `rope_theta`; `rope_scaling`, None or a dict with "rope_type"; and for
the windowed layers of Gemma 3 `rope_local_base_freq`. `torch_dtype` is a plain name such as "bfloat16".
"""

from collections.abc import Mapping
from typing import Any

from tenfold.weights.checkpoint import CheckpointError

# Composite models whose text part is a family of its own: model_type to (architecture, prefixes of its tensors).
TEXT_MODELS = {
    "gemma3": (
        "Gemma3ForCausalLM",
        {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
    ),
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
    """The text model inside a vision-language config; any other config as it is."""
    if config.get("model_type") not in TEXT_MODELS:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{source} describes a {config['model_type']} model without its text_config; it is damaged."
        )
    inherited = {
        key: config[key]
        for key in ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
        if key in config
    }
    # The whole model's end tokens: the text part's own default knows nothing of turns.
    ends = {key: config[key] for key in ("eos_token_id",) if key in config}
    names = {"architectures": [TEXT_MODELS[config["model_type"]][0]], "composite": config["model_type"]}
    return {**inherited, **text, **ends, **names}


def text_prefixes(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Prefixes of tensor names in the file, and what stands for them in the text model's own names."""
    composite = config.get("composite")
    return TEXT_MODELS[composite][1] if composite in TEXT_MODELS else {}


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
    if kind is None or kind == "default":
        return None
    if not isinstance(kind, str):
        raise CheckpointError(f"{source}: the type of rope_scaling is no text; it is damaged.")
    return {**scaling, "rope_type": ROPE_TYPES.get(kind, kind)}
