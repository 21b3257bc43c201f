"""`GGUFCheckpoint`: a GGUF file spoken of in Hugging Face's names, so that one model code serves both formats.

Invariant: what `tensor` returns equals what the Hugging Face checkpoint holds, up to the file's quantisation: Llama's
query and key rows are back in half-split order, Gemma's norms have 1 taken off, what makes keys and values of
DeepSeek's latent vectors is one matrix. Source: llama.cpp's converters.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from tenfold.ops.blocks import DENSE, dequantize
from tenfold.ops.matrix import Deferred, RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.gguf import GGUFFile, open_gguf
from tenfold.weights.tokenizer_gguf import build_tokenizer, end_tokens, special_tokens

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
GATED = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA = {**ATTENTION, **GATED, "ffn_norm": "post_attention_layernorm"}
# A layer's experts lie in one tensor of three dimensions, [experts, rows, cols], for each projection.
STACKS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
ROUTED = {"ffn_gate_inp": "mlp.gate"} | {name: f"mlp.experts.{projection}" for name, projection in STACKS.items()}
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# DeepSeek-V2 and V3; features that rotate together are neighbours in files as they are in folders.
LATENT = {
    **GATED,
    **ROUTED,
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# Files from 2025 on have the matrix of keys and values in two, one for each head: the part for keys turned over
# [heads, rank, plain], and that for values [heads, value, rank].
HALVES = ("attn_k_b", "attn_v_b")
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA3 = {
    **ATTENTION,
    **GATED,
    **HEAD_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One `general.architecture`. blocks: names inside a block; permuted: query and key rows stand in rotary pairs;
    unit_norms: 1 was added to the norms; config: what files do not say."""

    model_type: str
    architecture: str
    blocks: Mapping[str, str]
    permuted: bool = False
    unit_norms: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


SILU = {"hidden_act": "silu"}
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", LLAMA, permuted=True, config=SILU),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LLAMA, config=SILU),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**LLAMA, **HEAD_NORMS}, config=SILU),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", {**LLAMA, **ROUTED, **SHARED}, config=SILU),
    "qwen3moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**LLAMA, **HEAD_NORMS, **ROUTED},
        config={**SILU, "norm_topk_prob": True},
    ),
    "deepseek2": Family("deepseek_v2", "DeepseekV2ForCausalLM", LATENT, config=SILU),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", {**LLAMA, **HEAD_NORMS, **ROUTED}, config=SILU),
    "phi3": Family("phi3", "Phi3ForCausalLM", PHI3, config=SILU),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA3,
        unit_norms=True,
        config={"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
}

MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", {**LLAMA, **ROUTED}, permuted=True, config=SILU
)  # "llama" with experts
DEEPSEEK3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {**LATENT, "exp_probs_b": "mlp.gate.e_score_correction_bias"},
    config=SILU,
)  # "deepseek2" whose router has sigmoids
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
# Layers and experts of DeepSeek's own models to (groups of experts, those that take part): early files do not say.
GROUPS = {(60, 160): (8, 3), (61, 256): (8, 4)}

# Config keys whose value a file states as it is.
SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
OPTIONAL_NUMBERS = {
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
MOST_EXPERTS = 1 << 12
MOST_LAYERS = 99_999  # that BLOCK can tell apart
BLOCK = re.compile(r"blk\.(?P<layer>\d{1,5})\.(?P<name>\w+)\.(?P<kind>weight|bias)")


class GGUFCheckpoint:
    """A GGUF file, or a split set, as a `Checkpoint`. Raises CheckpointError for damage and unknown architectures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = open_gguf(path)
        self.metadata = self.files[0].metadata
        self.family = family_of(path, self.metadata)
        self._stored = {name: file for file in self.files for name in file.tensors}
        self._names: dict[str, str] = {}
        self._experts: dict[str, int] = {}  # which one of its stored tensor
        self._halves: dict[str, dict[str, str]] = {}  # names in the file of those of HALVES that are there
        for name in self._stored:
            self._name(name)
        self._check_halves()
        self.config = GGUFConfig(self).read()
        template = self.metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) and template else None
        self.special = special_tokens(self.metadata)
        self.eos_ids = end_tokens(self.metadata)
        self._tokenizer: Tokenizer | None = None

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str) -> RawTensor:
        if name not in self._names:
            raise CheckpointError(f"{self.path} holds no tensor {name}; it is incomplete or of another architecture.")
        stored = self._names[name]
        if stored in self._halves.get(name, {}).values():
            return self._joined(name)
        raw = self.stored(stored)
        if name in self._experts:
            return expert_of(name, raw, self._experts[name])
        data, storage = raw.data, raw.storage
        if ".ffn_gate_inp_shexp." in stored:
            return RawTensor(name, storage, (1, raw.shape[-1]), data.reshape(1, -1))
        if self.family.permuted and ".attn_q." in stored:
            data = half_split(data, self.config["num_attention_heads"], raw)
        elif self.family.permuted and ".attn_k." in stored:
            data = half_split(data, self.config["num_key_value_heads"], raw)
        elif self.family.unit_norms and stored.endswith("norm.weight"):
            data, storage = dequantize(raw) - 1.0, "F32"
        return RawTensor(name, storage, raw.shape, data)

    def stored(self, name: str) -> RawTensor:
        """A tensor under its own name in the file, untouched."""
        return self._stored[name].raw(name)

    def storages(self) -> dict[str, int]:
        """Bytes of each storage type in the file, largest first."""
        bytes_of: dict[str, int] = {}
        for name, file in self._stored.items():
            entry = file.tensors[name]
            bytes_of[entry.storage] = bytes_of.get(entry.storage, 0) + entry.nbytes
        return dict(sorted(bytes_of.items(), key=lambda item: -item[1]))

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = build_tokenizer(self.path, self.metadata)
        return self._tokenizer

    def _name(self, stored: str) -> None:
        """Note what a stored tensor is called. Raises CheckpointError for an unknown one."""
        own = self._translate(stored)
        if own is None:
            return
        block = BLOCK.fullmatch(stored)
        if block is not None and block["name"] in HALVES:
            self._halves.setdefault(own, {})[block["name"]] = stored
            self._names.setdefault(own, stored)
            return
        if block is None or block["name"] not in STACKS:
            self._names[own] = stored
            return
        shape = self._stored[stored].tensors[stored].shape
        if len(shape) != 3 or shape[0] > MOST_EXPERTS:
            raise CheckpointError(f"{self.path}: {stored} has the shape {list(shape)}; the file is damaged.")
        place, _, projection = own.removesuffix(".weight").rpartition(".")
        for i in range(shape[0]):
            one = f"{place}.{i}.{projection}.weight"
            self._names[one], self._experts[one] = stored, i

    def _check_halves(self) -> None:
        """Raises CheckpointError where one is there without the other, or the whole."""
        for own, halves in self._halves.items():
            if len(halves) < len(HALVES) and self._names[own] in halves.values():
                (missing,) = set(HALVES) - set(halves)
                (stored,) = halves.values()
                raise CheckpointError(f"{self.path} holds {stored} without its {missing}; it is incomplete.")

    def _joined(self, name: str) -> Deferred:
        """The matrix of which the file has halves, rows of each head keys first."""
        keys, values = (self.stored(self._halves[name][half]) for half in HALVES)
        c = self.config
        heads, plain, value, rank = (
            c[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
        )
        for raw, size in ((keys, heads * rank * plain), (values, heads * value * rank)):
            if math.prod(raw.shape) != size:
                raise CheckpointError(
                    f"{self.path}: {raw.name} has the shape {list(raw.shape)}, which {heads} heads that make {plain} "
                    f"features of keys and {value} of values out of {rank} cannot have; the file is damaged."
                )
        dense = keys.storage in DENSE and keys.storage == values.storage

        def make(device: torch.device | str) -> tuple[torch.Tensor]:
            pair = (raw.data if dense else dequantize(raw) for raw in (keys, values))
            to_keys, to_values = (part.to(device) for part in pair)
            turned = to_keys.view(heads, rank, plain).transpose(1, 2)
            return (torch.cat([turned, to_values.view(heads, value, rank)], 1).view(-1, rank),)

        return Deferred(name, keys.storage if dense else "F32", (heads * (plain + value), rank), make)

    def _translate(self, name: str) -> str | None:
        """Hugging Face's name, None for what belongs to the config. Raises CheckpointError for an unknown one."""
        if name in OUTSIDE:
            return OUTSIDE[name]
        if name in ROPE_TENSORS:
            return None
        block = BLOCK.fullmatch(name)
        if block is None or block["name"] not in self.family.blocks:
            raise CheckpointError(
                f"{self.path} holds the tensor {name}, which {self.family.architecture} does not have; "
                "it is a variant of this architecture that Tenfold cannot run."
            )
        own = self.family.blocks[block["name"]]
        kind = "" if own.endswith("_bias") else f".{block['kind']}"
        return f"model.layers.{int(block['layer'])}.{own}{kind}"


def family_of(path: Path, metadata: Mapping[str, Any]) -> Family:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        given = repr(name[:64]) if isinstance(name, str) else "not given"
        raise CheckpointError(
            f"{path}: the architecture of this GGUF file is {given}; Tenfold runs {', '.join(sorted(FAMILIES))}."
        )
    if name == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    if name == "deepseek2" and metadata.get("deepseek2.expert_gating_func") == SIGMOID:
        return DEEPSEEK3
    return FAMILIES[name]


def expert_of(name: str, raw: RawTensor, expert: int) -> RawTensor:
    """One expert's matrix of a tensor [experts, rows, cols]."""
    rows = raw.shape[1]
    data = raw.data[expert] if raw.data.dim() == 3 else raw.data[expert * rows : (expert + 1) * rows]
    return RawTensor(name, raw.storage, raw.shape[1:], data)


def half_split(data: torch.Tensor, heads: int, raw: RawTensor) -> torch.Tensor:
    """Rows (of a bias, elements) of each head from rotary pairs (2i, 2i + 1) to (i, i + head_dim / 2). A copy."""
    rows = raw.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(f"Tensor {raw.name} has {rows} rows for {heads} heads; the file is damaged.")
    return data.unflatten(0, (heads, rows // heads // 2, 2)).transpose(1, 2).reshape(data.shape)


class GGUFConfig:
    """Reads metadata into the keys of Hugging Face's config.json, the classic ones: rope_theta and rope_scaling."""

    def __init__(self, checkpoint: GGUFCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.metadata = checkpoint.metadata
        self.prefix = f"{self.metadata['general.architecture']}."

    def read(self) -> dict[str, Any]:
        family = self.checkpoint.family
        config: dict[str, Any] = {
            "model_type": family.model_type,
            "architectures": [family.architecture],
            **family.config,
        }
        config |= {key: self.whole(name) for name, key in SIZES.items()}
        if config["num_hidden_layers"] > MOST_LAYERS:  # before anything is made for each layer
            raise self.fail("block_count", config["num_hidden_layers"], f"at most {MOST_LAYERS}")
        config |= self.latent(config) if self.latents else self.heads(config)
        config["vocab_size"] = self.vocabulary()
        config["rms_norm_eps"] = self.number("attention.layer_norm_rms_epsilon", 1e-6)
        config.setdefault("rope_theta", 10000.0)
        config |= {
            key: self.number(name) for name, key in OPTIONAL_NUMBERS.items() if self.prefix + name in self.metadata
        }
        config["rope_scaling"] = self.rope_scaling(config)
        config["tie_word_embeddings"] = "lm_head.weight" not in self.checkpoint
        config["attention_bias"] = self.has_bias("self_attn.q_proj") or self.has_bias("self_attn.qkv_proj")
        config["mlp_bias"] = self.has_bias("mlp.down_proj")
        config |= self.experts(config)
        if self.latents:
            config |= self.groups(config)
        config |= self.windows(config)
        if family.model_type == "gemma3_text":
            config["query_pre_attn_scalar"] = self.query_scalar(config)
        config |= self.token_ids()
        return config

    def fail(self, name: str, value: Any, allowed: str) -> CheckpointError:
        given = "missing" if value is None else f"{value!r:.60}"
        return CheckpointError(
            f"{self.checkpoint.path}: the metadata {self.prefix}{name} is {given}, where {allowed} is needed; "
            "the file is damaged."
        )

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(self.prefix + name, default)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; a list with one for each layer counts where all are equal."""
        value = self.get(name, default)
        if isinstance(value, list) and value and all(layer == value[0] for layer in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self.fail(name, value, f"a whole number from {least}, the same for all layers,")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 3e38:
            raise self.fail(name, value, "a finite number from 0")
        return shortest(value)

    def has_bias(self, projection: str) -> bool:
        return f"model.layers.0.{projection}.bias" in self.checkpoint

    @property
    def latents(self) -> bool:
        """Whether keys and values are made from latent vectors."""
        return "attn_kv_a_mqa" in self.checkpoint.family.blocks

    def heads(self, config: Mapping[str, Any]) -> dict[str, int]:
        return {
            "num_key_value_heads": self.whole("attention.head_count_kv", config["num_attention_heads"]),
            "head_dim": self.head_dim(config),
        }

    def latent(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Sizes of latent attention. Later files speak of what is cached, and of a head in keys that end in _mla."""
        rotary = self.whole("rope.dimension_count")
        key, value = (
            self.whole(f"attention.{kind}_length_mla", self.whole(f"attention.{kind}_length"))
            for kind in ("key", "value")
        )
        if key <= rotary:
            raise self.fail("attention.key_length", key, f"more than the {rotary} features that rotate")
        found = {
            "kv_lora_rank": self.whole("attention.kv_lora_rank"),
            "qk_rope_head_dim": rotary,
            "qk_nope_head_dim": key - rotary,
            "v_head_dim": value,
            "head_dim": rotary,
            "num_key_value_heads": config["num_attention_heads"],
        }
        if self.prefix + "attention.q_lora_rank" in self.metadata:
            found["q_lora_rank"] = self.whole("attention.q_lora_rank")
        if self.number("attention.temperature_scale", 0.0):
            raise CheckpointError(
                f"{self.checkpoint.path} makes attention sharper as a text grows ({self.prefix}attention."
                "temperature_scale), which Tenfold cannot do; use a model without."
            )
        return found

    def groups(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """How the router of a DeepSeek picks experts, and which layers have some."""
        experts = self.whole("expert_count")
        if self.get("expert_gating_func", SOFTMAX) not in (0, SOFTMAX, SIGMOID):
            raise self.fail("expert_gating_func", self.get("expert_gating_func"), "1 (softmax) or 2 (sigmoid)")
        groups, kept = GROUPS.get((config["num_hidden_layers"], experts), (1, 1))
        found: dict[str, Any] = {
            "n_routed_experts": experts,
            "n_shared_experts": self.whole("expert_shared_count", 0, least=0),
            "first_k_dense_replace": self.whole("leading_dense_block_count", 0, least=0),
            "routed_scaling_factor": self.number("expert_weights_scale", 0.0) or 1.0,
            "norm_topk_prob": self.get("expert_weights_norm", False),
            "n_group": self.whole("expert_group_count", groups),
            "topk_group": self.whole("expert_group_used_count", kept),
        }
        found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
        if found["norm_topk_prob"] not in ((True, False) if self.checkpoint.family is DEEPSEEK3 else (False,)):
            raise self.fail("expert_weights_norm", found["norm_topk_prob"], "false beside a softmax")
        return found

    def head_dim(self, config: Mapping[str, Any]) -> int:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        default = max(1, hidden // heads)
        size = self.whole("attention.key_length", default)
        if self.whole("attention.value_length", size) != size:
            raise self.fail("attention.value_length", self.get("attention.value_length"), f"the key length {size}")
        return size

    def vocabulary(self) -> int:
        """Rows of the embedding; the token list may be shorter than it, never longer."""
        rows = self.shape("token_embd.weight")[0]
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > rows:
            raise CheckpointError(
                f"{self.checkpoint.path} lists {len(tokens)} tokens for {rows} embeddings; the file is damaged."
            )
        return rows

    def shape(self, stored: str) -> tuple[int, ...]:
        file: GGUFFile | None = self.checkpoint._stored.get(stored)
        if file is None:
            raise CheckpointError(
                f"{self.checkpoint.path} holds no tensor {stored}; it is not a language model, or incomplete."
            )
        return file.tensors[stored].shape

    def factors(self, stored: str) -> list[float]:
        """A rope tensor as a list: divisors of the rotary frequencies."""
        raw = self.checkpoint.stored(stored)
        if len(raw.shape) != 1 or raw.storage not in DENSE or raw.shape[0] > 1 << 14:
            raise CheckpointError(f"{self.checkpoint.path}: {stored} is not a list of numbers; the file is damaged.")
        return [float(value) for value in raw.data.tolist()]

    def rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Hugging Face's rope_scaling. Files made of Llama 3 hold ready factors instead: rope_type "factors"."""
        stored = self.checkpoint._stored
        rotary = self.whole("rope.dimension_count", config["head_dim"])
        if rotary != config["head_dim"]:
            config["partial_rotary_factor"] = rotary / config["head_dim"]
        if "rope_freqs.weight" in stored:
            return {"rope_type": "factors", "factors": self.factors("rope_freqs.weight")}
        if "rope_factors_long.weight" in stored and "rope_factors_short.weight" in stored:
            return self.longrope(config)
        kind = self.get("rope.scaling.type", "linear")  # as llama.cpp reads files that do not say
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0))
        if kind == "none" or factor in (0.0, 1.0):
            return None
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            return scaling | self.yarn(config, factor)
        if kind == "linear":
            return scaling
        raise self.fail("rope.scaling.type", kind, "none, linear, yarn or longrope")

    def yarn(self, config: Mapping[str, Any], factor: float) -> dict[str, Any]:
        original = self.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
        scaling: dict[str, Any] = {"original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            if f"{self.prefix}rope.scaling.yarn_{name}" in self.metadata:
                scaling[name] = self.number(f"rope.scaling.yarn_{name}")
        if self.prefix + "rope.scaling.attn_factor" in self.metadata:
            # Here the file's factor multiplies YaRN's own; Hugging Face's attention_factor is the product.
            scaling["attention_factor"] = self.number("rope.scaling.attn_factor") * (0.1 * np.log(factor).item() + 1.0)
        if self.latents and (times := self.number("rope.scaling.yarn_log_multiplier", 0.0)):
            # A tenth of it is in the file; the rotary table's own is left as it is where both are the same.
            scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * times, 6)
        return scaling

    def longrope(self, config: dict[str, Any]) -> dict[str, Any]:
        longest = config["max_position_embeddings"]
        original = self.whole("rope.scaling.original_context_length", longest)
        config["original_max_position_embeddings"] = original
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": self.factors("rope_factors_long.weight"),
            "short_factor": self.factors("rope_factors_short.weight"),
            "factor": longest / original,
            "original_max_position_embeddings": original,
        }
        if self.prefix + "rope.scaling.attn_factor" in self.metadata:
            scaling["attention_factor"] = self.number("rope.scaling.attn_factor")
        return scaling

    def experts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of a file of a family with experts."""
        if "ffn_gate_inp" not in self.checkpoint.family.blocks:
            return {}
        count = self.whole("expert_count")
        found = {"num_experts": count, "num_local_experts": count}
        found["num_experts_per_tok"] = self.whole("expert_used_count")
        found["moe_intermediate_size"] = self.whole("expert_feed_forward_length", config["intermediate_size"])
        if self.prefix + "expert_shared_feed_forward_length" in self.metadata:
            found["shared_expert_intermediate_size"] = self.whole("expert_shared_feed_forward_length")
        return found

    def windows(self, config: dict[str, Any]) -> dict[str, Any]:
        """Sliding window keys; a Llama-family file that has a window holds a Mistral."""
        if not self.get("attention.sliding_window"):
            return {"sliding_window": None}
        found: dict[str, Any] = {"sliding_window": self.whole("attention.sliding_window")}
        if config["model_type"] == "llama":
            return found | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        if config["model_type"] == "gemma3_text":
            layers = config["num_hidden_layers"]
            slides = self.pattern(layers)
            found["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
        return found

    def pattern(self, layers: int) -> list[bool]:
        """Which layers slide: a truth value for each, or every n-th layer does not (n is 6 in silent files)."""
        value = self.get("attention.sliding_window_pattern", 6)
        if isinstance(value, list) and len(value) == layers and all(isinstance(slide, bool) for slide in value):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(
                "attention.sliding_window_pattern", value, "a whole number from 1, or one truth value a layer,"
            )
        return [bool((layer + 1) % value) for layer in range(layers)]

    def query_scalar(self, config: Mapping[str, Any]) -> float:
        """Gemma 3 scales by head_dim^-0.5, its 27B model (62 layers) by (hidden / heads)^-0.5; files do not say."""
        if scale := self.number("attention.scale", 0.0):
            return scale**-2
        if config["num_hidden_layers"] == 62:
            return config["hidden_size"] / config["num_attention_heads"]
        return config["head_dim"]

    def token_ids(self) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        found = {f"{key}_token_id": self.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
        return {key: value for key, value in found.items() if isinstance(value, int)}


def shortest(value: float) -> float:
    """A float32 of the file as the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
