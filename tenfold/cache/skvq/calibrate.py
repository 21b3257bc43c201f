"""Which channels share a group, and how far a group is clipped, from keys and values of a text.

Two passes over the same text, both sums over its windows, so that a run can stop anywhere and its result never depends
on where: `Extremes` sees the range of every channel and makes groups of them; `ClipSearch` then sees, for every group
and clip factor, how far the attention output moves when only that group is stored. Everything is deterministic.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tenfold.cache.skvq.attend import left_window, weigh
from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.kv.quantize import Grouping, rounded
from tenfold.ops.oracle import rotate

CLIPS = tuple(0.5 + 0.05 * i for i in range(11))  # ascending, the last one is no clipping
ROUNDS = 16  # of clustering at most
EVERY = 4  # of how many queries one counts for the clip factors
LARGEST_ZERO = 64.0  # of what E4M3 holds, that a group's largest number of the text takes: room for 7 times more

Turn = Callable[[Tensor], Tensor]
"""Rotary embedding of x [kv_heads, S, head_dim] at its tokens' positions; for keys kept rotated, no change."""


class Extremes:
    """Smallest and largest value of every channel, [C] float32 each."""

    def __init__(self, channels: int) -> None:
        self.low = np.full(channels, np.inf, dtype=np.float32)
        self.high = np.full(channels, -np.inf, dtype=np.float32)

    def add(self, x: Tensor) -> None:
        """x [T, C]."""
        self.low = np.minimum(self.low, x.amin(0).float().cpu().numpy())
        self.high = np.maximum(self.high, x.amax(0).float().cpu().numpy())

    def grouping(self, group: int, span: int, shift: Tensor, reorder: bool = True) -> Grouping:
        """Groups of `group` channels inside spans of `span` channels, nothing clipped. shift [C]: what is taken off the
        values that were seen. reorder: cluster; else neighbours. Raises ValueError.
        """
        off = shift.cpu().numpy()
        low, high = self.low - off, self.high - off
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("The model's keys or values are not finite; its weights are damaged, or need --dtype.")
        parts = []
        for start in range(0, len(low), span):
            own = slice(start, start + span)
            count = span // group
            labels = cluster(np.stack((low[own], high[own]), 1), count) if reorder else np.arange(span) // group
            parts.append(labels + start // group)
        groups = np.concatenate(parts)
        largest = np.zeros(len(low) // group, dtype=np.float32)
        np.maximum.at(largest, groups, np.maximum(np.abs(low), np.abs(high)))
        unit = np.exp2(np.ceil(np.log2(np.maximum(largest, 1e-20) / LARGEST_ZERO)))
        return Grouping(
            torch.from_numpy(groups).long(),
            torch.ones(len(largest)),
            torch.from_numpy(unit.astype(np.float32)),
            shift.float().cpu(),
        )


def cluster(points: np.ndarray, count: int) -> np.ndarray:
    """KMeans with clusters of equal size: points [N, D] -> labels [N] int64, N / count of each.

    It starts from cuts of the points by their spread, and keeps the best round; points choose in the order of how much
    they would lose by their second choice.
    """
    size = len(points) // count
    labels = np.empty(len(points), dtype=np.int64)
    labels[np.argsort(points[:, 1] - points[:, 0], kind="stable")] = np.arange(len(points)) // size
    best, least = labels, np.inf
    for _ in range(ROUNDS if count > 1 else 0):
        centres = np.stack([points[labels == i].mean(0) for i in range(count)])
        distance = ((points[:, None] - centres) ** 2).sum(-1)
        total = float(distance[np.arange(len(points)), labels].sum())
        if total >= least * (1 - 1e-6):
            break
        best, least = labels, total
        labels = assign(distance, size)
    return best


def assign(distance: np.ndarray, size: int) -> np.ndarray:
    """distance [N, K] -> labels [N], each used `size` times."""
    nearest = np.sort(distance, 1)
    left = np.full(distance.shape[1], size)
    labels = np.empty(len(distance), dtype=np.int64)
    for i in np.argsort(nearest[:, 0] - nearest[:, 1], kind="stable"):
        labels[i] = np.argmin(np.where(left > 0, distance[i], np.inf))
        left[labels[i]] -= 1
    return labels


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Attention of one layer over one window of the text, positions 0 to S - 1.

    q [S, heads, head_dim] rotated; keys [S, kv_heads, head_dim] not rotated, values likewise; all float32.
    turn: rotates keys.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    spec: AttentionSpec
    turn: Turn

    @classmethod
    def of(cls, qkv: Tensor, heads: Heads, positions: Tensor) -> "Sample":
        """What `Kernels.attention` gets for a whole sequence; keys after their norm, where there is one."""
        spec = heads.spec
        parts = qkv.float().view(len(qkv), -1, spec.head_dim)
        q, k, v = parts.split([spec.heads, spec.kv_heads, spec.kv_heads], 1)
        q, k = (_normed(x, norm) for x, norm in ((q, heads.q_norm), (k, heads.k_norm)))
        cos, sin = (x[None] for x in heads.rope[positions].chunk(2, -1)) if spec.rotary_dim else (None, None)

        def turn(x: Tensor) -> Tensor:
            return x if cos is None or sin is None else rotate(x, cos, sin)

        return cls(turn(q.transpose(0, 1)).transpose(0, 1), k, v, spec, turn)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


class ClipSearch:
    """Squared error of the attention output for each group and each of CLIPS, [G, clips] float64, of the keys or the
    values of one layer. rotary: "pre" where what is stored is rotated after it, "post" before.
    """

    def __init__(self, grouping: Grouping, bits: float, parameters: str, of_keys: bool, rotary: str = "pre") -> None:
        self.base = grouping
        self.bits = bits
        self.parameters = parameters
        self.of_keys = of_keys
        self.rotary = rotary
        self.losses = np.zeros((len(grouping.clip), len(CLIPS)))

    def add(self, sample: Sample, window: int, sinks: int) -> None:
        """Tokens that have left the window count as stored, in one group at a time."""
        keys, values = (x.transpose(0, 1) for x in (sample.keys, sample.values))
        turned = sample.turn(keys)
        source = values if not self.of_keys else turned if self.rotary == "post" else keys
        queries = torch.arange(0, keys.shape[1], EVERY, device=keys.device)
        old = left_window(queries, keys.shape[1], window, sinks)
        heads = sample.q[queries].unflatten(1, (sample.spec.kv_heads, -1)).permute(1, 2, 0, 3).float()
        products = heads @ turned[:, None].mT
        weights = weigh(products, queries, sample.spec)
        grouping = self.base.to(keys.device)
        flat = source.transpose(0, 1).flatten(1)
        for at, clip in enumerate(CLIPS):
            clipped = replace(grouping, clip=torch.full_like(grouping.clip, clip))
            wrong = rounded(flat, clipped, self.bits, self.parameters) - flat
            error = wrong.unflatten(1, keys.shape[::2]).transpose(0, 1)
            if not self.of_keys:  # output channels are sums over the same channel of values
                own = weights.masked_fill(~old, 0.0) @ error[:, None]
                squares = own.double().square().sum((1, 2)).flatten()
                self.losses[:, at] += np.bincount(
                    grouping.group.cpu().numpy(), squares.cpu().numpy(), len(grouping.clip)
                )
                continue
            for group, row in enumerate(grouping.order):
                touched = (row // keys.shape[2]).unique()
                own = torch.where((grouping.group == group).view(len(keys), 1, -1), error, 0.0)[touched]
                if self.rotary == "pre":
                    own = sample.turn(own)
                moved = torch.where(old, heads[touched] @ own[:, None].mT, 0.0)
                changed = weigh(products[touched] + moved, queries, sample.spec) - weights[touched]
                self.losses[group, at] += float((changed @ values[touched][:, None]).double().square().sum())

    def grouping(self) -> Grouping:
        """With the factor of least error for each group; the least clipping among equals."""
        best = len(CLIPS) - 1 - np.argmin(self.losses[:, ::-1], 1)
        return replace(self.base, clip=torch.tensor(CLIPS)[torch.from_numpy(best)].float())
