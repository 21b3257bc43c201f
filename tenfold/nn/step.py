"""`Step`: the one explicit argument of every forward. There is no prefill flag: a decode is a chunk of one token."""

from dataclasses import dataclass

from torch import Tensor

from tenfold.cache.store import KVStore


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Inputs of one forward pass over T tokens of R requests, packed one request after the other.

    Shapes and types, all on the model's device and contiguous:
    token_ids [T] int64 · positions [T] int32, place in the request's sequence · slots [T] int32, where each token's K
    and V go (page * page_size + offset) · page_table [R, P] int32 · query_start [R+1] int32, request r owns tokens
    query_start[r]:query_start[r+1] · kv_lengths [R] int32, tokens of r in the cache after this step · logits_rows [L]
    int64, the tokens whose logits are wanted · max_query, max_kv: host integers, the longest of each · decodes: host
    integer, leading requests that have one token each (there may be more) · shared: whether a request may read what
    another one of this step writes (a sequence's guesses are requests of their own).
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    logits_rows: Tensor
    max_query: int
    max_kv: int
    kv: KVStore
    decodes: int = 0
    shared: bool = False
