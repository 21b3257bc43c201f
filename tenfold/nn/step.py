"""`Step`: the one explicit argument of every forward. There is no prefill flag: a decode is a chunk of one token."""

from dataclasses import dataclass

from torch import Tensor

from tenfold.cache.store import KVStore
from tenfold.ops.kernels import Contexts


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What stands in for the embeddings of a step's picture tokens. rows [M] int64: these tokens; features [M, D], in
    the compute type; places [M, 3] int64: their time, row and column, None where they count on like text.
    """

    rows: Tensor
    features: Tensor
    places: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Step(Contexts):
    """Inputs of one forward pass: the contexts of its requests, token_ids [T] int64, logits_rows [L] int64, the tokens
    whose logits are wanted, the store that pages are of, and what is seen in pictures; all on the model's device.
    """

    token_ids: Tensor
    logits_rows: Tensor
    kv: KVStore
    seen: Seen | None = None
