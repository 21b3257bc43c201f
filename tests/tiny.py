"""Variants of every model family, small enough to make in a test, and how to make one with transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB = 320

# Sizes shared by all; a variant overrides some.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}


LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "moe_intermediate_size": 24,
}


@dataclass(frozen=True)
class Tiny:
    """A variant of a family: prefix of its transformers classes, and config values.

    positions: max_model_len to run it with. shortest: sequences below it are not comparable, since transformers picks
    longrope's factors by the sequence at hand.
    """

    family: str
    values: dict[str, Any] = field(default_factory=dict)
    positions: int = 256
    shortest: int = 1

    @property
    def architecture(self) -> str:
        return f"{self.family}ForCausalLM"


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


TINY: dict[str, Tiny] = {
    "llama": Tiny("Llama"),
    "llama-tied": Tiny(
        "Llama", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}
    ),
    "llama-mha": Tiny("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": Tiny("Llama", {"num_key_value_heads": 1}),
    "llama-head-dim": Tiny("Llama", {"head_dim": 24}),
    "llama-bias": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Tiny("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": Tiny("Llama", rope("dynamic", factor=2.0)),
    "llama-llama3": Tiny(
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": Tiny("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-yarn-mscale": Tiny(
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.8, mscale_all_dim=0.4, beta_fast=16.0),
    ),
    "mistral": Tiny("Mistral", {"sliding_window": 8}),
    "mistral-full": Tiny("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": Tiny("Qwen2"),
    "qwen2-sliding": Tiny(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True}
    ),
    "qwen3": Tiny("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-sliding": Tiny(
        "Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    ),
    "gemma3": Tiny(
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-softcap": Tiny(
        "Gemma3",
        {
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": Tiny("Phi3", {"sliding_window": 8}),
    "phi3-partial": Tiny("Phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "phi3-short": Tiny("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}, positions=128),
    "phi3-long": Tiny("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, shortest=17),
    "mixtral": Tiny("Mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2-moe": Tiny(
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2-moe-even": Tiny(  # sizes that groups of 32 divide
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3-moe": Tiny(
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "head_dim": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3-moe-even": Tiny(
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": Tiny("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    "olmoe-clip": Tiny("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.9, "norm_topk_prob": True}),
    "deepseek-v2": Tiny(
        "DeepseekV2",
        {**LATENT, "n_routed_experts": 6, "num_experts_per_tok": 2, "q_lora_rank": None, "first_k_dense_replace": 1},
    ),
    "deepseek-v2-groups": Tiny(
        "DeepseekV2",
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "q_lora_rank": 20,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.8, mscale_all_dim=0.8),
        },
    ),
    "deepseek-v2-bias": Tiny(  # latent vectors have norms with an epsilon of their own
        "DeepseekV2",
        {
            **LATENT,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "q_lora_rank": 20,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-2,
        },
    ),
    "deepseek-v3": Tiny(
        "DeepseekV3",
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
}
# One variant a family, for tests that need not see them all.
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3")
FAMILIES = (*DENSE, *EXPERTS)


def make_checkpoint(tiny: Tiny, folder: Path) -> Path:
    import transformers

    prefix = "Gemma3Text" if tiny.family == "Gemma3" else tiny.family
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **json.loads(json.dumps(tiny.values))})
    model = getattr(transformers, tiny.architecture)(config)
    fill(model, seed=sum(map(ord, folder.name)))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def fill(model: Any, seed: int) -> None:
    """Weights large enough for attention and gates far from uniform; biases and norms differ from their defaults."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:  # experts lie in three dimensions
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def write_tokenizer(folder: Path, further: Sequence[str] = ()) -> None:
    """A byte-level tokenizer of VOCAB tokens: specials, the 256 bytes, a few merges, further specials, and unused
    names.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "the"), ("Ġ", "a"), ("l", "l")]
    names = specials + letters + [a + b for a, b in merges]
    names += further
    names += [f"<unused{i}>" for i in range(VOCAB - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([*specials, *further])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
