"""The text side: a BERT, then a bidirectional LSTM over its last hidden states.

BERT is that of Devlin et al. 2018 (arXiv 1810.04805), without the pooler. The LSTM sees packed sequences, so padding
is no input to it, backwards either.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tenfold.models.sentiment.attention import Block

# As config.json of a BERT names what a TextShape begins with, in its order.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings"),
)


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of the encoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int = 512
    eps: float = 1e-12

    def check(self) -> None:
        """Raises ValueError."""
        sizes = (("vocab", 1), ("width", 1), ("layers", 0), ("heads", 1), ("inner", 1), ("positions", 1))
        for name, least in sizes:
            if getattr(self, name) < least:
                raise ValueError(f"{name} of the text encoder is {getattr(self, name)}; allowed: from {least}.")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width of the text encoder is {self.width}; allowed: a multiple of twice its heads ({self.heads})."
            )

    @classmethod
    def of_bert(cls, told: Mapping[str, object]) -> "TextShape":
        """From the config.json of a Hugging Face checkpoint. Raises ValueError for another family, a kind of BERT that
        is computed in another way, and sizes that are missing.
        """
        if told.get("model_type") != "bert":
            raise ValueError(f"The text encoder is a {told.get('model_type')!r}; allowed: bert.")
        for name, allowed in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if told.get(name, allowed) != allowed:
                raise ValueError(f"{name} of the text encoder is {told[name]!r}; allowed: {allowed}.")
        lacking = [name for name in SIZES if not isinstance(told.get(name), int)]
        if lacking:
            raise ValueError(f"The config of the text encoder has no whole number for {', '.join(lacking)}.")
        vocab, width, layers, heads, inner, positions = (int(str(told[name])) for name in SIZES)
        return cls(vocab, width, layers, heads, inner, positions, float(str(told.get("layer_norm_eps", 1e-12))))


class Bert(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, shape: TextShape, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocab, shape.width)
        self.places = nn.Embedding(shape.positions, shape.width)
        self.kind = nn.Parameter(torch.zeros(shape.width))  # of the first of two texts, which all tokens are
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, shape.inner, shape.eps, dropout) for _ in range(shape.layers)
        )
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """ids [B, L] int64, real [B, L] bool -> [B, L, d]; what padding becomes means nothing."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.norm(self.words(ids) + self.places(places) + self.kind))
        sees = real[:, None, None, :]
        for block in self.blocks:
            x = block(x, sees)
        return x


class BiLstm(nn.Module):
    """[B, L, d] to [B, L, d]: half of the width in each direction."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width // 2, layers, batch_first=True, dropout=between, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """lengths [B] int64, on the CPU, from 1. Padding comes out as zeros."""
        if bool((lengths == x.shape[1]).all()):
            whole: Tensor = self.lstm(x)[0]  # nothing to pack, and packing takes longer than a few steps
            return whole
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return out


# Names of a Hugging Face BERT to ours.
RENAMES = (
    (r"^bert\.", ""),
    (r"^embeddings\.word_embeddings\.", "words."),
    (r"^embeddings\.position_embeddings\.", "places."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.self\.(query|key|value)\.", r".\1."),
    (r"\.attention\.output\.dense\.", ".attended."),
    (r"\.attention\.output\.LayerNorm\.", ".attention_norm."),
    (r"\.intermediate\.dense\.", ".up."),
    (r"\.output\.dense\.", ".down."),
    (r"\.output\.LayerNorm\.", ".mlp_norm."),
)


def from_bert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `Bert` from the tensors of a Hugging Face checkpoint; what it has no place for is left out."""
    found = {renamed(name, RENAMES): tensor for name, tensor in tensors.items()}
    kinds = found.pop("embeddings.token_type_embeddings.weight", None)
    if kinds is not None:
        found["kind"] = kinds[0]
    own = ("words.", "places.", "norm.", "blocks.", "kind")
    return {name: tensor.float() for name, tensor in found.items() if name.startswith(own)}


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """A name after all replacements of a table, in order."""
    for pattern, instead in table:
        name = re.sub(pattern, instead, name)
    return name
