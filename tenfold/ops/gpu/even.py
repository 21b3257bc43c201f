"""Decodes whose contexts differ in length: which block of an attention kernel reads what part of which (csrc/even.cu).

A number of parts that is the same for all is right where contexts are about as long as each other. Among short ones a
long one then keeps few multiprocessors busy while the others are done, in every layer. Lengths are on the device, so
that is where they are shared out, once a step for all layers of a kind.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.gpu import nvrtc

LONGER = 1024  # tokens: where a context may be longer, others of the step may be much shorter
MOST = 1024  # requests: one a thread
WARPS = 32
SPLITS = 2 * WARPS  # parts of a context, at most: every warp weighs two numbers of them
MORE = 3  # rounds of blocks for parts: one that has none is gone in a moment, but many are not
MERGE = 10e6  # bytes that a GPU reads while the parts of a context are merged


@dataclass(frozen=True, slots=True)
class Kind:
    """What parts are for. pairs: blocks that read a part, of different heads; room: blocks that run at the same time;
    least: tiles of 16 tokens of a part; tile_bytes: what a block reads of one; window: of a layer, 0 for none; enough:
    the share of `room` blocks that together are as fast as all; beside: tiles that a block could read while it does
    everything else.
    """

    pairs: int
    room: int
    least: int
    tile_bytes: int
    window: int = 0
    enough: float = 1.0
    beside: float = 0.0

    def capacity(self, requests: int) -> int:
        """Parts that a launch has blocks for: as many as leave little of the last round of blocks idle."""
        return requests + MORE * max(1, self.room // self.pairs)

    def fits(self, requests: int, parts: int, splits: int) -> bool:
        """Whether so many contexts can be shared out. parts: of all pairs, that there is memory for; splits: of one
        context, that a block can merge.
        """
        return requests <= MOST and self.capacity(requests) * self.pairs <= parts and splits >= SPLITS


@dataclass(frozen=True, slots=True)
class Shared:
    """items [`Kind.capacity`, 4] int32: what each block reads, as csrc/even.cu has it. fresh: it was launched just now,
    so nothing may be read of it before that has ended.
    """

    items: Tensor
    fresh: bool = True


def share(kind: Kind, lengths: Tensor, memo: dict[Any, Any], layer: int) -> Shared:
    """The parts of a step's contexts, lengths [R] int32. They are kept in `memo` for layers of the kind; `layer` tells
    these apart: one that is seen again begins another forward of the same step.

    Raises ValueError for more than `MOST` requests.
    """
    first, known = memo.get(kind, (layer, None))
    if known is None or first == layer:
        made = Shared(run(kind, lengths))
        memo[kind] = layer, replace(made, fresh=False)
        return made
    found: Shared = known
    return found


def run(kind: Kind, lengths: Tensor) -> Tensor:
    """The items that `share` gives, launched."""
    requests = len(lengths)
    if not 0 < requests <= MOST:
        raise ValueError(f"{requests} requests cannot be shared out evenly; allowed: 1 to {MOST}.")
    items = torch.empty(kind.capacity(requests), 4, dtype=torch.int32, device=lengths.device)
    kernel = nvrtc.load("even.cu", "even", (("HALF", 0), ("WARPS", WARPS), ("GATE", 0)))
    sizes = (requests, len(items), kind.pairs, kind.room, kind.window, kind.least)
    merge = MERGE / (kind.room * kind.tile_bytes)
    kernel((1, 1, 1), WARPS * 32, 0, [lengths, items, *sizes, float(kind.enough), merge, float(kind.beside)])
    return items
