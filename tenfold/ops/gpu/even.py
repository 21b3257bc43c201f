"""Decodes whose contexts differ in length: which block of csrc/decode.cu reads what part of which, by csrc/even.cu.

A number of parts that is the same for all is right where contexts are about as long as each other. Among short ones a
long one then keeps few multiprocessors busy while the others are done, in every layer. Lengths are on the device, so
that is where they are shared out, once a step for all layers that see as much of their contexts.
"""

from typing import Any

import torch
from torch import Tensor

from tenfold.ops.gpu import nvrtc

MOST = 1024  # requests: one a thread
SPLITS = 64  # parts of a context, at most
WARPS = 32
MORE = 3  # rounds of blocks for parts: one that has none is gone in a moment, but many are not
MERGE = 10e6  # bytes that a GPU reads while the parts of a context are merged


def capacity(requests: int, kv_heads: int, room: int) -> int:
    """Parts that a launch has blocks for, of each KV head: as many as leave little of the last round of blocks idle.
    room: blocks that run at the same time.
    """
    return requests + MORE * max(1, room // kv_heads)


def share(
    memo: dict[Any, Any],
    layer: int,
    lengths: Tensor,
    kv_heads: int,
    room: int,
    *,
    window: int,
    least: int,
    tile_bytes: int,
) -> tuple[Tensor, bool]:
    """The parts [`capacity`, 4] int32 of a step's contexts (`csrc/even.cu`), and whether they were launched just now.
    They are kept in `memo` for layers of the kind; `layer` tells them apart: one that is seen again begins another
    forward of the same step. lengths [R] int32; least: tiles of a part; tile_bytes: what a block reads of a tile.

    Raises ValueError for more than `MOST` requests.
    """
    kind = "even", kv_heads, room, window, least
    known = memo.get(kind)
    if known is not None and known[0] != layer:
        return known[1], False
    items = run(lengths, kv_heads, room, window=window, least=least, tile_bytes=tile_bytes)
    memo[kind] = layer, items
    return items, True


def run(lengths: Tensor, kv_heads: int, room: int, *, window: int, least: int, tile_bytes: int) -> Tensor:
    """What `share` gives, launched."""
    requests = len(lengths)
    if not 0 < requests <= MOST:
        raise ValueError(f"{requests} requests cannot be shared out evenly; allowed: 1 to {MOST}.")
    items = torch.empty(capacity(requests, kv_heads, room), 4, dtype=torch.int32, device=lengths.device)
    kernel = nvrtc.load("even.cu", "even", (("HALF", 0), ("WARPS", WARPS), ("GATE", 0)))
    sizes = (requests, len(items), kv_heads, room, window, least)
    kernel((1, 1, 1), WARPS * 32, 0, [lengths, items, *sizes, MERGE / (room * tile_bytes)])
    return items
