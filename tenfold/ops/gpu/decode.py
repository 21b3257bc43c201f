"""Attention of decode steps in one launch: csrc/decode.cu (norm, rotary, page write, split-KV attention, merge)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.attention import unified_max
from tenfold.ops.gpu import even, hopper, nvrtc
from tenfold.ops.kernels import SOFTMAX, AttentionSpec, Heads

HEAD_DIMS = (64, 128)
MOST_GROUP = 8
TILE = 16  # tokens
REGISTERS = 2  # tiles of a warp under way that registers hold; of more, all are in shared memory
ALIGNMENT = 16  # bytes that may lie before the ring
LARGEST_CLUSTER = 8  # blocks: what every GPU with clusters can do, and 16 were slower
SHORT = 2048  # tokens
ENOUGH = 0.85  # of the blocks there is room for: they read as fast as all of them (H200, 2026-11-30)
EVEN = 0  # splits of a plan that shares contexts out by their lengths
SUMS = 1 << 22  # floats that splits of all pairs may leave


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """warps of a block, blocks of a multiprocessor the kernel is compiled for, splits of a context at most (EVEN: as
    many as make parts of all contexts about as long), the softmax: one of SOFTMAX, and whether splits merge in a
    cluster. depth: tiles that a warp has under way. Two take the registers of a multiprocessor's other warps, more come
    through shared memory.
    """

    warps: int
    blocks: int
    splits: int
    softmax: str
    cluster: bool
    depth: int = 1

    def __str__(self) -> str:
        shape = f"{self.warps}x{self.blocks}" + f"x{self.depth}" * (self.depth > 1)
        how = f"s{self.splits}:{'cluster' if self.cluster else 'global'}" if self.splits else "even"
        return f"decode:{self.softmax}:{shape}:{how}"


def legal(spec: AttentionSpec, dtype: torch.dtype, page_size: int) -> bool:
    """Whether the kernel can run these layers."""
    group = spec.heads // spec.kv_heads
    return (
        dtype in nvrtc.HALF and spec.head_dim in HEAD_DIMS and group <= MOST_GROUP and page_size % TILE == 0
    )  # a tile of tokens never crosses a page


def sizes(spec: AttentionSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Warps of small and of large blocks, and how many of these a multiprocessor has."""
    return (4, 3 if spec.head_dim > 64 else 4), (8, 1 if spec.head_dim > 64 else 2)


def plan(spec: AttentionSpec, requests: int, max_kv: int, sms: int, softmax: str = "lazy") -> DecodePlan:
    """What was fastest on an H100 for as many pairs of request and KV head (2026-11-28), and for contexts of more than
    4,096 tokens on an H200 (2026-11-29). max_kv: longest context there may be; shorter ones find their number of splits
    on the device.

    Contexts of several requests may differ, and where some may be longer than `even.LONGER` they are shared out by
    their lengths. Else many pairs fill the GPU by themselves. Fewer need splits: their merge takes about a microsecond
    in a cluster and three through global memory, but a cluster waits until one part of the GPU has room for all its
    blocks.
    """
    pairs = requests * spec.kv_heads
    seen = min(max_kv, spec.window + TILE) if spec.window else max_kv
    small, large = sizes(spec)
    longest = -(-seen // (TILE * large[0]))
    shared = DecodePlan(*small, EVEN, softmax, False)
    few = pairs <= sms // 8 and seen <= SHORT
    if requests > 1 and seen > even.LONGER and not few and even_fits(shared, spec, requests, sms):
        return shared
    if pairs > 1.5 * sms:
        if pairs <= 2 * sms:  # two blocks on every multiprocessor
            return DecodePlan(4, 2, 1, softmax, False)
        if small[1] * sms < pairs <= 4 * sms:  # four rounds, or all at once: larger blocks would leave a few over
            rounds = DecodePlan(4, 1, 1, softmax, False, 3)
            return rounds if spec.head_dim > 64 and fits(rounds, spec) else DecodePlan(2, 4, 1, softmax, False)
        return DecodePlan(*small, 1, softmax, False)
    if longest == 1 or (pairs > sms // 2 and seen <= 2 * SHORT):
        return DecodePlan(*large, 1, softmax, False)
    if pairs > sms // 8 or seen > SHORT:
        warps, blocks = small if pairs > sms // 8 or seen > 2 * SHORT else large
        splits = min(sms * blocks // pairs, -(-seen // (TILE * 2 * warps)), most_splits(spec.head_dim, warps))
        return DecodePlan(warps, blocks, max(1, splits), softmax, False)
    splits = 1 << (min(LARGEST_CLUSTER, sms // 2 // pairs, longest).bit_length() - 1)
    return DecodePlan(*large, splits, softmax, splits > 1)


def most_partial(heads: int, head_dim: int) -> int:
    """Splits of all pairs whose results a `Workspace` can hold; heads: query heads of each."""
    return SUMS // (heads * (head_dim + 2) + 3)


def most_splits(head_dim: int, warps: int) -> int:
    """More would not find room for their weights in shared memory when they are merged."""
    return (warps - 1) * head_dim // 2


def shared_bytes(plan: DecodePlan, spec: AttentionSpec) -> int:
    """Shared memory that a block uses: what `Shared` in csrc/decode.cu takes."""
    group, d = spec.heads // spec.kv_heads, spec.head_dim
    quads = group * d // 4
    merged = 0 if plan.cluster else max(1, plan.warps * 32 // quads) * quads * 16
    return 20 * (d + 8) + 4 * plan.warps * (d + group * d + 2 * group) + merged + 4


def ring_bytes(plan: DecodePlan, spec: AttentionSpec) -> int:
    """Dynamic shared memory of a block: tiles under way and their barriers."""
    return plan.warps * plan.depth * (stage_bytes(spec) + 8) if plan.depth > REGISTERS else 0


def stage_bytes(spec: AttentionSpec) -> int:
    """Of a tile's keys and values."""
    return 2 * TILE * spec.head_dim * 2


def fits(plan: DecodePlan, spec: AttentionSpec) -> bool:
    """Whether a multiprocessor holds the plan's blocks."""
    ring = ring_bytes(plan, spec)
    return not ring or hopper.fits(ring + shared_bytes(plan, spec) + ALIGNMENT, plan.blocks)


def padding(plan: DecodePlan, spec: AttentionSpec) -> int:
    """Shared memory that nobody uses, so that a multiprocessor holds the plan's two or four blocks and no more: blocks
    come as the kernel before ends, here earlier and there later, and the multiprocessors that are free first must not
    take more than their part.
    """
    if plan.blocks not in (2, 4) or plan.splits != 1 or plan.depth > REGISTERS:
        return 0
    return max(0, int(hopper.SHARED_SM / (plan.blocks + 0.5)) - hopper.RESERVED - shared_bytes(plan, spec))


def kind(plan: DecodePlan, spec: AttentionSpec, sms: int) -> even.Kind:
    """What a plan with EVEN splits wants of contexts."""
    sizes = (spec.kv_heads, sms * plan.blocks, 2 * plan.warps, stage_bytes(spec))
    return even.Kind(*sizes, window=spec.window, enough=ENOUGH)


def even_fits(plan: DecodePlan, spec: AttentionSpec, requests: int, sms: int) -> bool:
    """Whether a `Workspace` holds the parts that a plan with EVEN splits makes of so many contexts."""
    parts = most_partial(spec.heads // spec.kv_heads, spec.head_dim)
    return kind(plan, spec, sms).fits(requests, parts, most_splits(spec.head_dim, plan.warps))


class Workspace:
    """Partial results of splits and arrival counters; `recomputed` [1] int64 counts query heads whose unified maximum
    did not hold, of its own or with others. Kept at one place for graphs.
    """

    def __init__(self, device: torch.device, pairs: int, recomputed: Tensor | None = None) -> None:
        """pairs: of a request and a KV head, at most."""
        self.pairs = pairs
        self.sums = torch.empty(SUMS, dtype=torch.float32, device=device)
        self.counters = torch.zeros(pairs, dtype=torch.int32, device=device)
        own = torch.zeros(1, dtype=torch.int64, device=device)
        self.recomputed = own if recomputed is None else recomputed


def share(
    plan: DecodePlan, spec: AttentionSpec, kv_lengths: Tensor, sms: int, memo: dict[Any, Any], layer: int
) -> even.Shared | None:
    """`even.share` for a plan with EVEN splits."""
    return even.share(kind(plan, spec, sms), kv_lengths, memo, layer) if plan.splits == EVEN else None


def run(
    plan: DecodePlan,
    workspace: Workspace,
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    lse: Tensor | None = None,
    out: Tensor | None = None,
    shared: even.Shared | None = None,
) -> Tensor:
    """As `Kernels.attention` for one token a request -> [R, heads * head_dim]. A request of length 0 is idle: its
    result is zeros; a negative slot writes nothing. heads.phi is used by "unified" and "paper"; without it "unified"
    would be wrong often, so run "lazy". shared: what `share` gives.
    """
    assert (plan.splits == EVEN) == (shared is not None)
    requests, spec, phi = qkv.shape[0], heads.spec, heads.phi
    q_norm, k_norm = heads.q_norm, heads.k_norm
    group = spec.heads // spec.kv_heads
    softmax = plan.softmax if phi is not None or plan.softmax in ("online", "lazy") else "lazy"
    kernel = nvrtc.load(
        "decode.cu",
        "decode",
        (
            ("HALF", nvrtc.HALF[qkv.dtype]),
            ("D", spec.head_dim),
            ("GROUP", group),
            ("WARPS", plan.warps),
            ("BLOCKS", plan.blocks),
            ("DEPTH", plan.depth),
            ("SOFTMAX", SOFTMAX.index(softmax)),  # the kernel knows them by this order
            ("CLUSTER", int(plan.cluster)),
            ("EVEN", int(shared is not None)),
            ("GATE", 0),
        ),
    )
    out = qkv.new_empty(requests, spec.heads * spec.head_dim) if out is None else out
    guard = unified_max.guard(qkv.dtype).high
    eps = next((n.eps for n in (q_norm, k_norm) if n is not None), 0.0)
    items = None if shared is None else shared.items
    kernel(
        (plan.splits, spec.kv_heads, requests) if items is None else (spec.kv_heads, len(items), 1),
        plan.warps * 32,
        ring_bytes(plan, spec) or padding(plan, spec),
        [
            *(qkv, heads.rope, positions, slots, keys, values, page_table, kv_lengths),
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            *(phi, out, lse, workspace.sums, workspace.counters, items, workspace.recomputed),
            *(float(eps), float(spec.scale), float(spec.softcap), -guard, guard),
            *(spec.kv_heads, keys.shape[2], page_table.shape[1], spec.rotary_dim, spec.window),
        ],
        dependent=shared is None or not shared.fresh,
        cluster=plan.splits if plan.cluster else 1,
    )
    return out
