"""Offline rotation (QuaRot's incoherence): a model whose residual stream is turned by one random orthogonal matrix
gives the same logits, and its weights have fewer outliers to round.

Norms' weights are first folded into what follows them, since turning and scaling by feature do not commute. Then what
reads the stream is multiplied by Q on the right, and what writes it by Q transposed on the left. Nothing is subtracted:
RMS norms know no mean. Q is a Hadamard matrix of the largest power of two in the size, with random signs, times a
random orthogonal matrix for what is left of it.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.blocks import dequantize
from tenfold.ops.matrix import RawTensor
from tenfold.weights.checkpoint import Checkpoint, CheckpointError

FAMILIES = (
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Mixtral",
    "Qwen2Moe",
    "Qwen3Moe",
    "Olmoe",
    "DeepseekV2",
    "DeepseekV3",
)
TABLE, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")
ATTENTION = re.compile(r"self_attn\.(q_proj|k_proj|v_proj|q_a_proj|kv_a_proj_with_mqa)\.weight")
FEED = re.compile(
    r"(mlp|block_sparse_moe)\.((shared_experts?|experts\.\d+)\.)?(gate_proj|up_proj|w1|w3)\.weight"
    r"|(mlp|block_sparse_moe)\.((gate|shared_expert_gate)\.weight|experts\.gate_up_proj)"
)
WRITERS = re.compile(
    r"(self_attn\.o_proj|(mlp|block_sparse_moe)\.((shared_experts?|experts\.\d+)\.)?(down_proj|w2))\.(weight|bias)"
    r"|(mlp|block_sparse_moe)\.experts\.down_proj"
)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def orthogonal(size: int, seed: int = 0) -> Tensor:
    """Q [size, size] float64."""
    draw = torch.Generator().manual_seed(seed)
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rest = torch.linalg.qr(
        torch.randn(size // power, size // power, generator=draw, dtype=torch.float64)
    ).Q.contiguous()
    signs = torch.randint(0, 2, (size, 1), generator=draw).double() * 2 - 1
    return signs * torch.kron(hadamard / power**0.5, rest)


def check_family(source: Checkpoint, what: str) -> None:
    """Raises CheckpointError for a family of which it is not known what reads the stream behind each norm."""
    names = source.config.get("architectures") or [""]
    family = str(names[0]).removesuffix("ForCausalLM")
    if family not in FAMILIES:
        raise CheckpointError(f"{family or source.path} cannot be {what}; families that can: {', '.join(FAMILIES)}.")


class Rotated:
    """A checkpoint whose tensors are those of another, turned: float32, made when they are asked for, untied. Tensors
    of many experts [experts, rows, cols] are turned expert by expert. Raises CheckpointError for a family whose stream
    is not understood.
    """

    def __init__(self, source: Checkpoint, seed: int = 0) -> None:
        check_family(source, "rotated")
        self.source = source
        self.path: Path = source.path
        self.config: dict[str, Any] = {**source.config, "tie_word_embeddings": False, "torch_dtype": "float32"}
        self.chat_template, self.special, self.eos_ids = source.chat_template, source.special, source.eos_ids
        self.turn = orthogonal(source.config["hidden_size"], seed)

    def names(self) -> Iterable[str]:
        own = list(self.source.names())
        return own if HEAD in own else [*own, HEAD]

    def __contains__(self, name: str) -> bool:
        return name == HEAD or name in self.source

    def tokenizer(self) -> Any:
        return self.source.tokenizer()

    def tensor(self, name: str) -> RawTensor:
        data = self._turned(name)
        return RawTensor(name, "F32", tuple(data.shape), data)

    def _each(self, name: str, turned: Callable[[Tensor], Tensor]) -> Tensor:
        """float32 of what a tensor becomes; of many experts, of each, as all in float64 are large."""
        exact = dequantize(self.source.tensor(name), torch.float32)
        if exact.dim() == 3:
            return torch.stack([turned(own.double()).float() for own in exact])
        return turned(exact.double()).float()

    def _exact(self, name: str) -> Tensor:
        return self._each(name, lambda exact: exact)

    def _turned(self, name: str) -> Tensor:
        if name == TABLE:
            return self._each(name, lambda exact: exact @ self.turn)
        if name == HEAD:
            return self._read(HEAD if HEAD in self.source else TABLE, LAST_NORM)
        found = LAYER.fullmatch(name)
        place, rest = found.groups() if found else ("", name)
        if name == LAST_NORM or rest in NORMS:
            return torch.ones(self.source.tensor(name).shape)
        if ATTENTION.fullmatch(rest):
            return self._read(name, place + NORMS[0])
        if FEED.fullmatch(rest):
            return self._read(name, place + NORMS[1])
        if WRITERS.fullmatch(rest):
            return self._each(name, lambda exact: self.turn.T @ exact)
        return self._exact(name)

    def _read(self, name: str, norm: str) -> Tensor:
        """What reads the stream behind a norm."""
        weight = self._exact(norm).double()
        return self._each(name, lambda exact: (exact * weight) @ self.turn)
