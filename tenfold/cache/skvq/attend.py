"""What attention over a cache means whose old tokens are stored otherwise than its recent ones.

Every query sees the tokens older than its own window as they are stored, all others as they were computed. That is
what decoding a sequence token by token sees, for all of its queries at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A sequence of S tokens as a format keeps it. keys, values [kv_heads, S, head_dim] float32, rotated; old_keys,
    old_values [Q, S] bool: which keys and values the query of each row sees so, instead of as they were computed.
    """

    keys: Tensor
    values: Tensor
    old_keys: Tensor
    old_values: Tensor


def left_window(queries: Tensor, length: int, window: int, sinks: int) -> Tensor:
    """[Q, length] bool: which tokens have left the window of the queries at positions [Q], and are no sinks.

    A query sees the `window` most recent tokens as computed, itself among them; with a window of 0 not even itself.
    """
    places = torch.arange(length, device=queries.device)
    return (places <= queries[:, None] - window) & (places >= sinks)


def attend(q: Tensor, queries: Tensor, keys: Tensor, values: Tensor, seen: Seen, spec: AttentionSpec) -> Tensor:
    """Causal attention of q [kv_heads, group, Q, head_dim] at positions queries [Q], all float32 and rotated; keys,
    values [kv_heads, S, head_dim] as computed -> like q.
    """
    scores = torch.where(seen.old_keys, q @ seen.keys[:, None].mT, q @ keys[:, None].mT)
    weights = weigh(scores, queries, spec)
    old = weights.masked_fill(~seen.old_values, 0.0)
    return old @ seen.values[:, None] + (weights - old) @ values[:, None]


def weigh(products: Tensor, queries: Tensor, spec: AttentionSpec) -> Tensor:
    """The weights of causal attention, from products of queries at positions queries [Q] and keys, [..., Q, S]."""
    scores = products * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    places = torch.arange(scores.shape[-1], device=scores.device)
    hidden = places > queries[:, None]
    if spec.window:
        hidden |= places <= queries[:, None] - spec.window
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1)
