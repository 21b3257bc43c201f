"""Configs are checked once, here: each broken value is answered with the key, what it holds and what is allowed."""

from typing import Any

import pytest

from tenfold.models.config import ConfigError
from tenfold.models.table import MODELS, model_config
from tests.tiny import LATENT

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def family(name: str, **changes: Any) -> dict[str, Any]:
    return {**GOOD, "architectures": [f"{name}ForCausalLM"], **changes}


def test_llama() -> None:
    config = model_config(GOOD)
    assert (config.heads, config.kv_heads, config.head_dim, config.layers) == (4, 2, 16, 4)
    assert (config.q_size, config.kv_size) == (64, 32)
    assert config.scale == 0.25
    assert config.windows == (0, 0, 0, 0)
    assert not config.tied
    assert config.local_rope == config.rope


def test_null_counts_as_absent() -> None:
    config = model_config({**GOOD, "num_key_value_heads": None, "head_dim": None, "rope_scaling": None})
    assert (config.kv_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "has no vocab_size"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 66}, "first must be a multiple"),
        ({"hidden_size": 10**12}, "allowed: a whole number from 1 to"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"head_dim": 15}, "even number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"rope_type": "twist"}}, "rope_type is 'twist'; supported"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of a 'linear' rope is 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"partial_rotary_factor": 0.01}, "rotary dimension is 0"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'.*; supported"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised in a way"),
        ({"architectures": ["BertModel"]}, "BertModel.*supported: .*LlamaForCausalLM"),
        ({"architectures": []}, "none given"),
        ({"architectures": "LlamaForCausalLM"}, "none given"),
        ({"architectures": None}, "none given"),
    ],
    ids=str,
)
def test_broken_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config({**GOOD, **changes})


@pytest.mark.parametrize("key", sorted(GOOD))
@pytest.mark.parametrize("value", [[], {}, "x", -1, True, 10**30, float("inf"), [[1]], {"a": []}], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Phi3", "Qwen2"])
def test_any_value_ends_in_a_config_or_a_sentence(name: str, key: str, value: Any) -> None:
    raw = family(name, use_sliding_window=True)
    raw[key] = value
    with pytest.raises(ConfigError, match=r"\w+ .+[.;]"):
        model_config(raw)


def test_unknown_keys_do_not_matter() -> None:
    assert model_config({**GOOD, "auto_map": {"AutoModel": "evil.py"}, "torch_dtype": "bfloat16"}) == model_config(GOOD)


def test_tables_name_classes_that_know_their_config() -> None:
    for name in MODELS:
        more = LATENT | {"n_routed_experts": 16, "num_experts_per_tok": 2} if name.startswith("Deepseek") else {}
        assert model_config({**GOOD, **more, "architectures": [name]}).architecture == name


def test_absent_keys_are_what_transformers_takes_for_them() -> None:
    small = {key: value for key, value in GOOD.items() if not key.startswith(("max_", "rms_", "rope_"))}
    mixtral = model_config(small | {"architectures": ["MixtralForCausalLM"]})
    assert (mixtral.rope.theta, mixtral.norm_eps, mixtral.max_positions) == (1e6, 1e-5, 131072)
    more = LATENT | {"n_routed_experts": 16, "num_experts_per_tok": 2}
    second, third = (model_config(family(name, **more)).experts for name in ("DeepseekV2", "DeepseekV3"))
    assert second is not None
    assert third is not None
    assert (second.shared, second.routing.scale, second.layers) == (48, 1.0, (True,) * 4)
    assert (third.shared, third.routing.scale, third.layers) == (24, 2.5, (False, False, False, True))
    none = model_config(family("DeepseekV3", **more, n_shared_experts=None)).experts
    assert none is not None
    assert none.shared == 0


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (family("Mistral", sliding_window=8), (8, 8, 8, 8)),
        (family("Mistral", sliding_window=None), (0, 0, 0, 0)),
        (family("Mistral"), (4096,) * 4),
        (family("Qwen2Moe", use_sliding_window=True, sliding_window=8, max_window_layers=3), (8, 0, 8, 0)),
        (family("Qwen2", use_sliding_window=False, sliding_window=8), (0, 0, 0, 0)),
        (family("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3), (0, 0, 0, 8)),
        (family("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=9), (0, 0, 0, 0)),
        (
            family(
                "Qwen3",
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            (8, 0, 8, 0),
        ),
        (family("Gemma3", sliding_window=8, sliding_window_pattern=2), (8, 0, 8, 0)),
        (family("Gemma3", sliding_window=8), (8, 8, 8, 8)),
        (family("Gemma3", sliding_window=8, layer_types=["full_attention"] * 4), (0, 0, 0, 0)),
        (family("Phi3", sliding_window=8), (8, 8, 8, 8)),
        (family("Phi3"), (0, 0, 0, 0)),
    ],
)
def test_windows(raw: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert model_config(raw).windows == windows


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (family("Mistral", sliding_window=0), "sliding_window is 0"),
        (family("Mistral", sliding_window="8"), "sliding_window is '8'"),
        (family("Qwen2", use_sliding_window=True, max_window_layers=-1), "max_window_layers is -1"),
        (family("Qwen3", use_sliding_window=True, max_window_layers="all"), "max_window_layers is 'all'"),
        (family("Gemma3", layer_types=["full_attention"]), "allowed: a list of 4 names"),
        (family("Gemma3", layer_types=["full_attention"] * 3 + ["chunked"]), "chunked.*allowed"),
        (family("Gemma3", layer_types=["full_attention"] * 3 + [["x"]]), "allowed: a list of 4"),
        (family("Gemma3", sliding_window_pattern=0), "sliding_window_pattern is 0"),
        (family("Gemma3", query_pre_attn_scalar=0), "query_pre_attn_scalar is 0"),
        (family("Gemma3", final_logit_softcapping=-30), "final_logit_softcapping is -30"),
        (family("Gemma3", rope_local_base_freq=0), "rope_local_base_freq is 0"),
        (family("Gemma3", use_bidirectional_attention=True), "only causal"),
        (family("Phi3", rope_scaling={"type": "su", "short_factor": [1.0]}), "holds 1 numbers"),
    ],
)
def test_broken_values_of_families(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(raw)


def test_gemma_defaults_are_those_of_its_published_configs() -> None:
    """They leave out what the 4b model needs: heads, head size, vocabulary, tying."""
    sparse = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config = model_config({"architectures": ["Gemma3ForCausalLM"], **sparse})
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.tied
    assert config.activation == "gelu_tanh"
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)
    assert [layer for layer, window in enumerate(config.windows) if not window] == [5, 11, 17, 23, 29]


def test_phi3_old_names_of_longrope() -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for kind in ("su", "yarn", "longrope"):
        config = model_config(family("Phi3", rope_scaling={"type": kind, **lists}, original_max_position_embeddings=64))
        assert config.rope.kind == "longrope"
        assert config.rope.original_positions == 64
