"""Making GGUF files for tests: a writer of the container, and a converter with llama.cpp's names and layouts."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenfold.ops.blocks import DENSE, dequantize, quantize
from tenfold.ops.matrix import RawTensor
from tenfold.weights.gguf import STORAGES
from tenfold.weights.hf import HFCheckpoint

NUMBERS = {storage: number for number, storage in STORAGES.items()}
ARRAY_KINDS = {"uint32": 4, "int32": 5, "float32": 6, "bool": 7, "uint64": 10, "int64": 11, "float64": 12}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> tuple[int, bytes]:
    """A metadata value -> (its type's number, its bytes). Whole numbers become uint32, floats float32."""
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, (str, bytes)):
        return 8, string(value)
    if isinstance(value, np.ndarray):
        return 9, struct.pack("<IQ", ARRAY_KINDS[value.dtype.name], len(value)) + value.tobytes()
    items = [typed(item) for item in value]
    return 9, struct.pack("<IQ", items[0][0] if items else 8, len(items)) + b"".join(data for _, data in items)


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: list[RawTensor], version: int = 3, alignment: int = 32, tail: int = 0
) -> bytes:
    """A whole file; `tail` bytes are left out at its end."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = typed(value)
        out += string(key) + struct.pack("<I", kind) + data
    blobs, offset = [], 0
    for raw in tensors:
        blob = raw.data.contiguous().view(torch.uint8).numpy().tobytes()
        shape = raw.shape[::-1]
        out += string(raw.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", NUMBERS[raw.storage], offset)
        blobs.append(blob + bytes(-len(blob) % alignment))
        offset += len(blobs[-1])
    whole = out + bytes(-len(out) % alignment) + b"".join(blobs)
    return whole[: len(whole) - tail]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: list[RawTensor], **options: Any) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "model.layers.": "blk.",
}


def gguf_name(name: str, arch: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("post_attention_layernorm", "post_attention_norm" if arch == "gemma3" else "ffn_norm")


def interleaved(data: torch.Tensor, heads: int) -> torch.Tensor:
    """Half-split rows of each head as rotary pairs, what llama.cpp's converter does to Llama's queries and keys."""
    split = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return split.transpose(1, 2).reshape(data.shape)


EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.0\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
STACKS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def stacks(hf: HFCheckpoint, storage: str) -> list[RawTensor]:
    """Each projection of all experts of a layer in one tensor."""
    found = []
    for name in hf.names():
        first = EXPERT.fullmatch(name)
        if first is None:
            continue
        names = [name.replace(".experts.0.", f".experts.{i}.") for i in range(len(list(hf.names())))]
        each = [hf.tensor(one).data.float() for one in names if one in hf]
        own = f"{first[1].replace('model.layers.', 'blk.')}.ffn_{STACKS[first[2]]}_exps.weight"
        flat = quantize(RawTensor(own, "F32", (len(each) * len(each[0]), each[0].shape[1]), torch.cat(each)), storage)
        shape = (len(each), *each[0].shape)
        data = flat.data.view(shape) if flat.storage in DENSE else flat.data
        found.append(RawTensor(own, flat.storage, shape, data))
    return found


def converted(hf: HFCheckpoint, arch: str, storage: str) -> list[RawTensor]:
    tensors = stacks(hf, storage)
    for name in hf.names():
        if ".experts." in name:
            continue
        raw = hf.tensor(name)
        data = raw.data.float()
        if arch == "llama" and "q_proj" in name:
            data = interleaved(data, hf.config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            data = interleaved(data, hf.config["num_key_value_heads"])
        if arch == "gemma3" and name.endswith("norm.weight"):
            data = data + 1
        own = RawTensor(gguf_name(name, arch), "F32", raw.shape, data)
        rounded = data.dim() == 2 and "ffn_gate_inp" not in own.name  # routers stay as they are
        tensors.append(quantize(own, storage) if rounded else own)
    return tensors


def split(tensors: list[RawTensor], config: Mapping[str, Any]) -> list[RawTensor]:
    """attn_kv_b as later files have it: the keys' part of each head turned over, the values' apart."""
    found = []
    for raw in tensors:
        if not raw.name.endswith("attn_kv_b.weight"):
            found.append(raw)
            continue
        plain = config["qk_nope_head_dim"]
        each = dequantize(raw).view(config["num_attention_heads"], -1, raw.shape[1])
        for half, part in (("attn_k_b", each[:, :plain].transpose(1, 2)), ("attn_v_b", each[:, plain:])):
            own = raw.name.replace("attn_kv_b", half)
            flat = part.reshape(-1, part.shape[-1])
            made = quantize(RawTensor(own, "F32", tuple(flat.shape), flat), raw.storage)
            data = made.data.view(part.shape) if made.storage in DENSE else made.data
            found.append(RawTensor(own, made.storage, tuple(part.shape), data))
    return found


def latent_metadata(config: Mapping[str, Any], apart: bool) -> dict[str, Any]:
    """What a file of DeepSeek-V2 or V3 says beside the rest. apart: as later files, whose keys and values are two."""
    plain, rotary, rank = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
    scaling = config.get("rope_scaling") or {}
    lengths = {"key_length": plain + rotary, "value_length": config["v_head_dim"]}
    if apart:
        lengths = {f"{key}_mla": value for key, value in lengths.items()}
        lengths |= {"head_count_kv": 1, "key_length": rank + rotary, "value_length": rank}
    found = {f"attention.{key}": value for key, value in lengths.items()} | {
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rotary,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
    }
    if config.get("q_lora_rank"):
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if (config.get("n_group") or 1) > 1:
        found |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if config["model_type"] == "deepseek_v3":
        found |= {"expert_weights_norm": True, "expert_gating_func": 2}
    if scaling.get("rope_type") == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"],
        }
    return {f"deepseek2.{key}": value for key, value in found.items()}


def metadata_of(hf: HFCheckpoint, arch: str) -> dict[str, Any]:
    config = hf.config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    partial = config.get("partial_rotary_factor", 1.0)
    found = {
        "general.architecture": arch,
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
        f"{arch}.rope.dimension_count": int(head_dim * partial),
    }
    if config.get("sliding_window"):
        found[f"{arch}.attention.sliding_window"] = config["sliding_window"]
    if config.get("final_logit_softcapping"):
        found[f"{arch}.final_logit_softcapping"] = float(config["final_logit_softcapping"])
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        found[f"{arch}.expert_count"] = experts
        found[f"{arch}.expert_used_count"] = config["num_experts_per_tok"]
    for key, name in (("moe", "expert"), ("shared_expert", "expert_shared")):
        if config.get(f"{key}_intermediate_size"):
            found[f"{arch}.{name}_feed_forward_length"] = config[f"{key}_intermediate_size"]
    return found | tokenizer_metadata(hf.path)


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """The byte-level tokenizer of a folder as GGUF metadata."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    special = {token["id"] for token in saved["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(vocab))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in saved["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }


def to_gguf(
    folder: Path,
    path: Path,
    arch: str,
    storage: str = "F32",
    extra: Mapping[str, Any] | None = None,
    more: list[RawTensor] | None = None,
) -> Path:
    """A Hugging Face folder as a GGUF file: matrices in `storage`, vectors in F32."""
    hf = HFCheckpoint(folder)
    metadata = {**metadata_of(hf, arch), **(extra or {})}
    return write_gguf(path, metadata, [*converted(hf, arch, storage), *(more or [])])
