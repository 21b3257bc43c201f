"""`Step`: the one explicit argument of every forward. There is no prefill flag: a decode is a chunk of one token."""

from dataclasses import dataclass

from torch import Tensor

from tenfold.cache.store import KVStore
from tenfold.ops.kernels import Contexts


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Step(Contexts):
    """Inputs of one forward pass: the contexts of its requests, token_ids [T] int64, logits_rows [L] int64, the tokens
    whose logits are wanted, and the store that pages are of; all on the model's device.
    """

    token_ids: Tensor
    logits_rows: Tensor
    kv: KVStore
