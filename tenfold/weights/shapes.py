"""`shape:NAME`: random weights of a published model's shape, for speed and memory only, never for quality.

Invariant: tensors are drawn when they are asked for, one at a time, on the device where they will stay; opening such a
model allocates nothing. What is drawn depends on the tensor's name and on the kind of device alone.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.blocks import quantize
from tenfold.ops.matrix import Deferred, RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.hf_config import normalise

PREFIX = "shape:"
SPREAD = 0.02  # standard deviation of the weights, as models are initialised and about as they end

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape(
    family: str,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    theta: float,
    eps: float,
    **more: Any,
) -> dict[str, Any]:
    """A Hugging Face config that transformers and vLLM read, too. family: prefix of its transformers classes."""
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": re.sub(r"(?<=.)(?=[A-Z])", "_", family).lower(),  # Qwen3Moe is qwen3_moe
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


def seeing(text: dict[str, Any], token_id: int, **vision: int) -> dict[str, Any]:
    """The config of a LLaVA-OneVision around a text model, as `hf_config.normalise` would give it. vision: where its
    tower differs from that of the published ones.
    """
    whole = {"model_type": "llava_onevision", "image_token_index": token_id, "vision_config": SIGLIP | vision}
    return {**text, "composite": "llava_onevision", "whole": whole, "processor": {}}


SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

TIED = {"tie_word_embeddings": True}

QWEN3_MOE = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}

# Sizes as the models' own config.json files give them. "tiny" and what begins with it are no published models: they
# are for trying things out.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": shape("Llama", 32000, 4096, 11008, 32, 32, 32, 4096, 1e4, 1e-5),
    "llama-2-13b": shape("Llama", 32000, 5120, 13824, 40, 40, 40, 4096, 1e4, 1e-5),
    "llama-2-70b": shape("Llama", 32000, 8192, 28672, 80, 64, 8, 4096, 1e4, 1e-5),
    "llama-3-8b": shape("Llama", 128256, 4096, 14336, 32, 32, 8, 8192, 5e5, 1e-5),
    "llama-3-70b": shape("Llama", 128256, 8192, 28672, 80, 64, 8, 8192, 5e5, 1e-5),
    "llama-3.1-8b": shape("Llama", 128256, 4096, 14336, 32, 32, 8, 131072, 5e5, 1e-5, rope_scaling=LLAMA3_ROPE),
    "llama-3.2-1b": shape(
        "Llama",
        *(128256, 2048, 8192, 16, 32, 8, 131072, 5e5, 1e-5),
        head_dim=64,
        rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
        **TIED,
    ),
    "llama-3.2-3b": shape(
        "Llama",
        *(128256, 3072, 8192, 28, 24, 8, 131072, 5e5, 1e-5),
        head_dim=128,
        rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
        **TIED,
    ),
    "mistral-7b": shape("Mistral", 32768, 4096, 14336, 32, 32, 8, 32768, 1e6, 1e-5, head_dim=128, sliding_window=None),
    "qwen2.5-0.5b": shape("Qwen2", 151936, 896, 4864, 24, 14, 2, 32768, 1e6, 1e-6, **TIED),
    "qwen2.5-1.5b": shape("Qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, 1e6, 1e-6, **TIED),
    "qwen2.5-7b": shape("Qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, 1e6, 1e-6),
    "qwen2.5-32b": shape("Qwen2", 152064, 5120, 27648, 64, 40, 8, 131072, 1e6, 1e-5),
    "qwen3-0.6b": shape("Qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, 1e6, 1e-6, head_dim=128, **TIED),
    "qwen3-1.7b": shape("Qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, 1e6, 1e-6, head_dim=128, **TIED),
    "qwen3-4b": shape("Qwen3", 151936, 2560, 9728, 36, 32, 8, 40960, 1e6, 1e-6, head_dim=128, **TIED),
    "qwen3-8b": shape("Qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, 1e6, 1e-6, head_dim=128),
    "qwen3-14b": shape("Qwen3", 151936, 5120, 17408, 40, 40, 8, 40960, 1e6, 1e-6, head_dim=128),
    "qwen3-32b": shape("Qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, 1e6, 1e-6, head_dim=128),
    "smollm2-135m": shape("Llama", 49152, 576, 1536, 30, 9, 3, 8192, 1e5, 1e-5, **TIED),
    "smollm2-1.7b": shape("Llama", 49152, 2048, 8192, 24, 32, 32, 8192, 1.3e5, 1e-5, **TIED),
    "llava-onevision-7b": seeing(shape("Qwen2", 152000, 3584, 18944, 28, 28, 4, 32768, 1e6, 1e-6), 151646),
    "llava-onevision-0.5b": seeing(shape("Qwen2", 152000, 896, 4864, 24, 14, 2, 32768, 1e6, 1e-6, **TIED), 151646),
    "mixtral-8x7b": shape(
        "Mixtral",
        *(32000, 4096, 14336, 32, 32, 8, 32768, 1e6, 1e-5),
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    ),
    "qwen1.5-moe-a2.7b": shape(
        "Qwen2Moe",
        *(151936, 2048, 5632, 24, 16, 16, 8192, 1e6, 1e-6),
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "qwen3-30b-a3b": shape("Qwen3Moe", *(151936, 2048, 6144, 48, 32, 4, 40960, 1e6, 1e-6), head_dim=128, **QWEN3_MOE),
    "olmoe-1b-7b": shape(
        "Olmoe", *(50304, 2048, 1024, 16, 16, 16, 4096, 1e4, 1e-5), num_experts=64, num_experts_per_tok=8
    ),
    "deepseek-v2-lite": shape(
        "DeepseekV2",
        *(102400, 2048, 10944, 27, 16, 16, 163840, 1e4, 1e-6),
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    ),
    "tiny": shape("Llama", 512, 64, 128, 2, 4, 2, 2048, 1e4, 1e-5),
    "tiny-moe": shape(
        "Qwen3Moe",
        *(512, 64, 128, 2, 4, 2, 2048, 1e4, 1e-5),
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "tiny-vlm": seeing(
        shape("Qwen2", 512, 128, 256, 2, 4, 2, 2048, 1e4, 1e-5),
        token_id=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
}

GATED = ("gate_proj", "up_proj", "down_proj")
# Of families with experts: what names of their tensors begin with, the key of their number, and their projections.
EXPERTS = {
    "mixtral": ("block_sparse_moe", "num_local_experts", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", "num_experts", GATED),
    "qwen3_moe": ("mlp", "num_experts", GATED),
    "olmoe": ("mlp", "num_experts", GATED),
    "deepseek_v2": ("mlp", "n_routed_experts", GATED),
}

# What may follow a name: `shape:llama-3-8b@layers=4,positions=40960`.
CHANGES = {"layers": "num_hidden_layers", "positions": "max_position_embeddings", "vocab": "vocab_size"}
# And of a model with experts `mixed=BITS`: what they are stored in by turns, and for how many one after the other.
MIXED: dict[str, dict[str, int]] = {
    "4": {"int8g128": 1, "int4g128": 4, "int3g128z": 2, "int2g128z": 1},
    "4.5": {"fp8a8": 1, "int4g128a8": 7},
    "5": {"fp8a8": 1, "int4g128a8": 3},
}
MIX, EXPERT = "mixed_bits", re.compile(r"\.experts\.(\d+)\.")


def is_shape(name: str) -> bool:
    return name.startswith(PREFIX)


def shape_config(name: str) -> dict[str, Any]:
    """The config that `shape:NAME[@KEY=N,...]` means. Raises CheckpointError for an unknown name or change."""
    base, _, changes = name.removeprefix(PREFIX).partition("@")
    if base not in SHAPES:
        raise CheckpointError(f"There is no shape {base[:80]!r}; known: {', '.join(SHAPES)}.")
    config = dict(SHAPES[base])
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key == "mixed" and config["model_type"] in EXPERTS and value in MIXED:
            config[MIX] = value
            continue
        if key not in CHANGES or not value.isdecimal() or not 1 <= int(value) <= 1 << 24:
            raise CheckpointError(
                f"{change[:80]!r} does not change a shape; allowed: {', '.join(CHANGES)}, each with a whole number, "
                f"as in {PREFIX}{base}@layers=4,positions=8192, and for a model with experts mixed=N, the bits of "
                f"experts in several formats, N of {', '.join(MIXED)}."
            )
        config[CHANGES[key]] = int(value)
    return config


def at_least_positions(name: str, tokens: int) -> str:
    """The same shape for contexts of `tokens` tokens: speed does not depend on how far a model was trained."""
    have = shape_config(name)["max_position_embeddings"]
    return name if have >= tokens else f"{name}{',' if '@' in name else '@'}positions={tokens}"


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the family, in the order models ask for them."""
    hidden, family = config["hidden_size"], config["model_type"]
    attention = latent_attention(config) if config.get("kv_lora_rank") else plain_attention(config)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        dense = family not in EXPERTS or layer < config.get("first_k_dense_replace", 0)
        block = {
            "input_layernorm.weight": (hidden,),
            **attention,
            "post_attention_layernorm.weight": (hidden,),
            **(gated("mlp", hidden, config["intermediate_size"]) if dense else experts(config)),
        }
        found |= {f"model.layers.{layer}.{name}": size for name, size in block.items()}
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    if "composite" in config:
        found |= siglip(config["whole"]["vision_config"]) | {
            "projector.newline": (hidden,),
            **biased("projector.linear_1", hidden, config["whole"]["vision_config"]["hidden_size"]),
            **biased("projector.linear_2", hidden, hidden),
        }
    return found


Tensors = dict[str, tuple[int, ...]]


def siglip(config: Mapping[str, Any]) -> Tensors:
    """A vision tower, under our names."""
    hidden, inner, patch = (config[key] for key in ("hidden_size", "intermediate_size", "patch_size"))
    found: Tensors = {
        "vision.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "vision.embeddings.patch_embedding.bias": (hidden,),
        "vision.embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        block: Tensors = {f"layer_norm{i}.{part}": (hidden,) for i in (1, 2) for part in ("weight", "bias")}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= biased(f"self_attn.{name}", hidden, hidden)
        block |= biased("mlp.fc1", inner, hidden) | biased("mlp.fc2", hidden, inner)
        found |= {f"vision.encoder.layers.{layer}.{name}": size for name, size in block.items()}
    return found


def biased(name: str, rows: int, cols: int) -> Tensors:
    return {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}


def plain_attention(config: Mapping[str, Any]) -> Tensors:
    hidden, family = config["hidden_size"], config["model_type"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found: Tensors = {
        f"self_attn.{name}_proj.weight": (size, hidden) for name, size in (("q", q), ("k", kv), ("v", kv))
    }
    found["self_attn.o_proj.weight"] = (hidden, q)
    if family in ("qwen2", "qwen2_moe"):
        found |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
    if family in ("qwen3", "qwen3_moe"):
        found |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if family == "olmoe":
        found |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}
    return found


def latent_attention(config: Mapping[str, Any]) -> Tensors:
    """Of DeepSeek-V2 without compressed queries."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rotary, plain, value = (config[name] for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    return {
        "self_attn.q_proj.weight": (heads * (plain + rotary), hidden),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rotary, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (plain + value), rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }


def gated(name: str, hidden: int, inner: int, names: Iterable[str] = GATED) -> Tensors:
    """A gated feed-forward layer."""
    gate, up, down = names
    sizes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    return {f"{name}.{projection}.weight": size for projection, size in sizes.items()}


def experts(config: Mapping[str, Any]) -> Tensors:
    """A router, its experts, and those that see every token."""
    hidden, family = config["hidden_size"], config["model_type"]
    name, count, names = EXPERTS[family]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    found: Tensors = {f"{name}.gate.weight": (config[count], hidden)}
    for i in range(config[count]):
        found |= gated(f"{name}.experts.{i}", hidden, inner, names)
    if shared := config.get("shared_expert_intermediate_size"):
        found |= {**gated("mlp.shared_expert", hidden, shared), "mlp.shared_expert_gate.weight": (1, hidden)}
    if shared := config.get("n_shared_experts"):
        found |= gated("mlp.shared_experts", hidden, shared * inner)
    return found


def draw(name: str, size: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The tensor of a name; norms are ones."""
    if len(size) == 1 and "norm" in name and name.endswith(".weight"):
        return torch.ones(size, dtype=torch.bfloat16, device=device)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0.0, SPREAD, generator=generator)


class ShapeCheckpoint:
    """Random weights as a `Checkpoint`, bfloat16 but for experts of mixed bits. It has no tokenizer, so it takes and
    gives token ids only.
    """

    chat_template: str | None = None

    def __init__(self, name: str) -> None:
        self.path = Path(name)
        self.config = normalise(shape_config(name), name)
        self.special: dict[str, str] = {}
        self.eos_ids: tuple[int, ...] = ()
        self._shapes = tensor_shapes(self.config)
        mix = MIXED.get(self.config.get(MIX, ""), {})
        self._turns = [storage for storage, times in mix.items() for _ in range(times)]

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def tensor(self, name: str) -> RawTensor:
        if name not in self._shapes:
            raise CheckpointError(f"{self.path} holds no tensor {name}; it is of another architecture.")
        size, expert = self._shapes[name], EXPERT.search(name)
        if expert is None or not self._turns:
            return Deferred(name, "BF16", size, lambda device: (draw(name, size, device),))
        storage = self._turns[int(expert[1]) % len(self._turns)]

        def rounded(device: torch.device | str) -> tuple[Tensor, ...]:
            raw = quantize(RawTensor(name, "BF16", size, draw(name, size, device)), storage)
            return raw.data, *raw.extras

        return Deferred(name, storage, size, rounded)

    def tokenizer(self) -> Any:
        raise CheckpointError(
            f"{self.path} has random weights and no tokenizer, so there is no text to exchange with it; "
            "it is for `tenfold plan`, `tune`, `explain` and `bench`. Name a real model here."
        )
