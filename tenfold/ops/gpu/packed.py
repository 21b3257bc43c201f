"""Decode steps over a packed KV cache in two launches a layer: csrc/packed_write.cu, then csrc/packed_decode.cu.

What the kernels need to know of a layer and of a rotary table is worked out once (`prepare`, `turns`) and stays where
it is, so steps can be captured. Steps with longer chunks run `kv.attend`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tenfold.ops.gpu import even, graphs, hopper, nvrtc
from tenfold.ops.gpu.decode import ENOUGH, EVEN, HEAD_DIMS, MOST_GROUP, Workspace, most_partial
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Kernels
from tenfold.ops.kv.attend import Band, Layout, Means, Moves
from tenfold.ops.kv.layer import PackedLayer, Side, ring_pages
from tenfold.ops.kv.packing import FLOAT8_BITS, packed_bytes
from tenfold.ops.kv.spec import PARAMETERS, PackedSpec, parameters_of

KEY_BITS = (2, 4, 8)
VALUE_BITS = (1.5, 2, 4, 8)
COLUMNS = 8  # of a product: query heads of a block times groups of a head
PLACES = 64  # tokens that the table of cosines and sines covers
WIDEST_SPAN = 512  # channels that a warp of the writing kernel holds
FEW_BYTES = 100  # of a token and head: up to them tiles have 64 tokens, above 32
MOST_BLOCKS = 8  # of a launch, for each multiprocessor: every one prepares queries again (H100, 2026-11-28)
WRITERS = 4  # warps of a block that writes
READERS = 8  # and of one that reads old tokens back
STAGES = 2  # of a ring: more were slower (H100, 2026-11-28)
BESIDE = 32  # tiles of 16 tokens, of a block: 5 us (H200, 2026-11-30)


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """heads: query heads of a block; tokens of a tile; stages of a warp's ring of tiles; warps of a block, blocks of a
    multiprocessor the kernel is compiled for; splits of a context at most (EVEN: as in `decode.DecodePlan`).
    """

    heads: int
    tokens: int
    stages: int
    warps: int
    blocks: int
    splits: int

    def __str__(self) -> str:
        how = f"s{self.splits}" if self.splits else "even"
        return f"packed:{self.heads}:{self.tokens}x{self.stages}:{self.warps}x{self.blocks}:{how}"


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels are compiled for: spec of the cache, groups of a span, and whether keys stand before rotary
    embedding, tokens are kept exact, and keys have something taken off.
    """

    spec: PackedSpec
    head_dim: int
    pre: bool
    exact: bool
    shift: bool

    @property
    def groups(self) -> int:
        return self.spec.span * self.head_dim // self.spec.group

    @property
    def pairs(self) -> int:
        """Registers of a lane for half of a token's keys, or where these share registers for all."""
        return 8 if self.merged else self.head_dim // 16

    @property
    def merged(self) -> bool:
        return self.spec.key_bits == 2 and self.head_dim == 64

    @property
    def token_bytes(self) -> int:
        """Of a token and head as a block reads it: all groups of its span."""
        spec = self.spec
        sides = (spec.key_bits, spec.value_bits)
        numbers = sum(map(parameters_of, sides)) * self.groups * PARAMETERS[spec.parameters]
        return numbers + sum(packed_bytes(self.head_dim, bits) for bits in sides)

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        spec = self.spec
        return (
            ("D", self.head_dim),
            ("KEY_BITS", int(spec.key_bits)),
            ("VALUE_BITS", int(spec.value_bits)),
            ("GROUPS", self.groups),
            ("NUMBER", PARAMETERS[spec.parameters]),
            ("PRE", int(self.pre)),
            ("EXACT", int(self.exact)),
            ("TURN", spec.group if spec.turned else 0),
            ("GATE", 0),
        )


def legal(spec: AttentionSpec, packed: PackedSpec, dtype: torch.dtype, page_size: int) -> bool:
    """Whether the kernels can run decode steps of these layers."""
    return not refusal(spec, packed, dtype, page_size)


@cache
def refusal(spec: AttentionSpec, packed: PackedSpec, dtype: torch.dtype, page_size: int) -> str:
    """What of these layers the kernels do not take, and what they do; empty where they can run decode steps."""
    width, pre = packed.span * spec.head_dim, packed.rotary == "pre" and spec.rotary_dim
    key_bits, value_bits, head_dims = (", ".join(map("{:g}".format, x)) for x in (KEY_BITS, VALUE_BITS, HEAD_DIMS))
    plain = packed.group <= spec.head_dim and not packed.window and not packed.sinks
    rules = (
        (dtype in nvrtc.HALF, f"{dtype}; allowed: bfloat16, float16"),
        (spec.head_dim in HEAD_DIMS, f"heads of {spec.head_dim} channels; allowed: {head_dims}"),
        (not spec.window, "a sliding window"),
        (page_size % 16 == 0, f"pages of {page_size} tokens; allowed: multiples of 16"),
        (packed.key_bits in KEY_BITS, f"keys of {packed.key_bits:g} bits; allowed: {key_bits}"),
        (packed.value_bits in VALUE_BITS, f"values of {packed.value_bits:g} bits; allowed: {value_bits}"),
        (width <= WIDEST_SPAN, f"groups over {width} channels; allowed: up to {WIDEST_SPAN}"),
        (
            width % packed.group == 0 and width // packed.group in (1, 2, 4, 8),
            f"groups of {packed.group} of {width} channels; allowed: 1, 2, 4 or 8 groups",
        ),
        (not pre or spec.rotary_dim == spec.head_dim, "keys before a rotation of part of a head; allowed: -post"),
        (not packed.turned or plain, "turned groups beside exact tokens, or wider than a head; allowed: w0s0"),
    )
    return next((what for holds, what in rules if not holds), "")


# Where codes lie among the lanes of a product, and the tables that follow from it


def channels(bits: float, head_dim: int) -> Tensor:
    """[4, pairs, 2] int64: the channel in each half of each register that a lane of a quad has of a token's keys: of
    the first half of the channels, their partners are in as many further registers; 2 bits of 64 channels: a channel
    and its partner.
    """
    q, half = torch.arange(4)[:, None, None], torch.arange(2)
    if bits == 2 and head_dim == 64:
        i = torch.arange(8)[:, None]
        return half * 32 + 8 * q + i
    i = torch.arange(head_dim // 16)[:, None]
    within = {2: i + 8 * half, 4: i // 4 * 8 + i % 4 + 4 * half, 8: 2 * i + half}[int(bits)]
    return head_dim // 8 * q + within


def levels(bits: float, pairs: int) -> Tensor:
    """[pairs] float32: what the code in a register is multiplied by, beside 2^-24: where in a mantissa it lies."""
    i = torch.arange(pairs)
    if bits == 2:
        return 4.0 ** torch.where(i % 8 < 5, i % 8, i % 8 - 5)
    return 16.0 ** (i % 2) if bits == 4 else torch.ones(pairs)


def rows() -> Tensor:
    """[16] int64: the token of 16 in each row of a product of scores."""
    r = torch.arange(8)
    place = r // 2 + r % 2 * 4
    return torch.cat((place, place + 8))


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """Rotations of a rotary table as the kernel multiplies with them, bytes.

    table: by every place of PLACES, the factor of codes' levels in them, as fragments of products: [cosines and sines,
    pairs / 2, PLACES / 16, 8 rows, 4 lanes, 2 registers, 2 rows, 2] float16. bases: by every PLACES-th position, with
    the table's own factor on cosines and sines: [positions, chunks of 4 registers, 4 lanes, 4 registers, 2] float16.
    """

    table: Tensor
    bases: Tensor


def turns(rope: Tensor, bits: float) -> Turns:
    """rope [P, head_dim] float32: cosines, then sines."""
    head_dim = rope.shape[1]
    which = channels(bits, head_dim).to(rope.device)
    pairs = which.shape[1]
    cosines, sines = rope.float().chunk(2, dim=1)
    frequency = which % (head_dim // 2)
    sign = torch.where(which < head_dim // 2, 1.0, -1.0) if bits == 2 and head_dim == 64 else torch.ones_like(which)

    def lanes(rows: Tensor, factor: Tensor) -> Tensor:
        """Positions [N] -> [N, 4, 2 * pairs, 2]."""
        turned = (cosines[rows][:, frequency], sines[rows][:, frequency] * sign)
        return torch.cat(turned, dim=2) * torch.cat((factor, factor))[:, None]

    place = (torch.arange(PLACES // 16)[:, None] * 16 + rows()).flatten().to(rope.device).clamp(max=len(rope) - 1)
    factor = 2.0**15 / levels(bits, pairs) if bits < FLOAT8_BITS else levels(bits, pairs)
    own = cosines[0][frequency].repeat(1, 2, 1)  # the cosine of 0 times the table's own factor
    table = lanes(place, factor.to(rope.device)) / own
    first = torch.arange(0, len(rope), PLACES, device=rope.device)
    bases = lanes(first, torch.ones(pairs, device=rope.device))
    # [16s, halves of rows, rows, lanes, cosines and sines, pairs of registers, registers, 2]
    fragments = table.half().view(PLACES // 16, 2, 8, 4, 2, pairs // 2, 2, 2).permute(4, 5, 0, 2, 3, 6, 1, 7)
    chunks = bases.half().unflatten(2, (-1, 4)).permute(0, 2, 1, 3, 4)
    return Turns(fragments.contiguous(), chunks.contiguous())


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A layer as the kernels read it. Of keys and of values: the group of each channel in its span [C] uint8, then
    clip, unit and shift of its grouping.
    """

    shape: Shape
    keys: tuple[Tensor, Tensor, Tensor, Tensor]
    values: tuple[Tensor, Tensor, Tensor, Tensor]


def prepare(layer: PackedLayer, spec: AttentionSpec) -> Prepared:
    """Reads from the device, once a layer."""
    packed = layer.spec
    groups = packed.span * spec.head_dim // packed.group

    def side(of: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        by = of.grouping
        own = (by.group % groups).to(torch.uint8)
        return (
            own.contiguous(),
            by.clip.float().contiguous(),
            by.unit.float().contiguous(),
            by.shift.float().contiguous(),
        )

    keys, values = side(layer.keys), side(layer.values)
    pre = packed.rotary == "pre" and spec.rotary_dim > 0
    shape = Shape(packed, spec.head_dim, pre, layer.exact_keys is not None, bool(keys[3].any()))
    return Prepared(shape, keys, values)


# Plans


def plan(spec: AttentionSpec, shape: Shape, requests: int, max_kv: int, sms: int) -> PackedPlan:
    """max_kv: the longest context there may be. Splits so that the last round of blocks is as full as can be; contexts
    of several requests are shared out by their lengths where some may be long.
    """
    heads = min(spec.heads // spec.kv_heads, COLUMNS // shape.groups)
    parts = -(-spec.heads // spec.kv_heads // heads)
    tokens = 64 if shape.token_bytes <= FEW_BYTES else 32
    many = () if shape.exact else ((8, 2),)  # exact tokens want more registers than so many warps leave
    warps, blocks = next(
        (w, b)
        for w, b in (*many, (6, 2), (8, 1), (4, 1))
        if hopper.fits(shared_bytes(shape, heads, tokens, STAGES, w), b) or w == 4
    )
    shared = PackedPlan(heads, tokens, STAGES, warps, blocks, EVEN)
    if requests > 1 and max_kv > even.LONGER and even_fits(shared, spec, shape, requests, sms):
        return shared
    pairs = requests * spec.kv_heads * parts
    units = -(-max_kv // tokens) + (shape.spec.window // 16 + 2 if shape.exact else 0)
    most = max(
        1,
        min(
            units // (2 * warps),
            MOST_BLOCKS * sms // pairs,
            most_partial(heads, spec.head_dim) // pairs,
            most_splits(shape, heads, tokens, STAGES, warps),
        ),
    )
    return PackedPlan(heads, tokens, STAGES, warps, blocks, splits(pairs, most, sms * blocks))


def kind(plan: PackedPlan, spec: AttentionSpec, shape: Shape, sms: int) -> even.Kind:
    """As `decode.kind`."""
    least = 2 * plan.warps * plan.tokens // 16
    sizes = (pairs_of(plan, spec), sms * plan.blocks, least, 16 * shape.token_bytes)
    return even.Kind(*sizes, enough=ENOUGH, beside=BESIDE)


def even_fits(plan: PackedPlan, spec: AttentionSpec, shape: Shape, requests: int, sms: int) -> bool:
    """As `decode.even_fits`."""
    merged = most_splits(shape, plan.heads, plan.tokens, plan.stages, plan.warps)
    return kind(plan, spec, shape, sms).fits(requests, most_partial(plan.heads, spec.head_dim), merged)


def pairs_of(plan: PackedPlan, spec: AttentionSpec) -> int:
    """Blocks that read a part of a context: one for each KV head and `heads` of its query heads."""
    return spec.kv_heads * -(-spec.heads // spec.kv_heads // plan.heads)


def splits(pairs: int, most: int, room: int) -> int:
    """The fewest splits whose rounds of `room` blocks take at most 4 % longer than those of the best number."""
    rounds = {s: math.ceil(pairs * s / room) / s for s in range(1, min(most, 2 * room) + 1)}
    best = min(rounds.values())
    return next(s for s, taken in rounds.items() if taken <= 1.04 * best)


def stage_bytes(shape: Shape, tokens: int) -> int:
    """STAGE in csrc/packed_decode.cu."""
    return tokens * shape.token_bytes + (32 * shape.pairs if shape.pre else 0)


def dynamic_bytes(shape: Shape, tokens: int, stages: int, warps: int) -> int:
    """Shared memory that a launch asks for: the table, and a ring for each warp."""
    table = PLACES * 32 * shape.pairs if shape.pre else 0
    return table + warps * stages * stage_bytes(shape, tokens)


def shared_bytes(shape: Shape, heads: int, tokens: int, stages: int, warps: int) -> int:
    """Shared memory of a block, with `Shared` of csrc/packed_decode.cu."""
    d, groups, pairs = shape.head_dim, shape.groups, shape.pairs
    queries = 16 * (d + 8) + 4 * heads * (d + 2 + groups) + 16 * pairs * (2 * heads + 2 * groups + 2)
    results = 4 * warps * (heads * (d + 4) + 16)
    return dynamic_bytes(shape, tokens, stages, warps) + queries + results + 64  # and what alignment may cost


def most_splits(shape: Shape, heads: int, tokens: int, stages: int, warps: int) -> int:
    """More would not find room for their weights when they are merged."""
    return dynamic_bytes(shape, tokens, stages, warps) // (8 * heads)


# Launches


def write(
    prepared: Prepared,
    layer: PackedLayer,
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    slots: Tensor,
    rooms: Tensor | None = None,
    room_slots: Tensor | None = None,
) -> Tensor:
    """Rotated queries [T, heads * head_dim]; keys and values of tokens whose slot is not negative go to pages and
    rooms. rooms [T] int32: the room of each token's request; or room_slots [T] int32: where in the exact pages a token
    goes, negative: nowhere.
    """
    shape, spec, q_norm, k_norm = prepared.shape, heads.spec, heads.q_norm, heads.k_norm
    kernel = nvrtc.load(
        "packed_write.cu",
        "packed_write",
        (("HALF", nvrtc.HALF[qkv.dtype]), ("SPAN", layer.spec.span), ("WARPS", WRITERS), *shape.defines),
    )
    out = qkv.new_empty(len(qkv), spec.heads * spec.head_dim)
    eps = next((n.eps for n in (q_norm, k_norm) if n is not None), 0.0)
    tasks = spec.heads + 2 * spec.kv_heads // layer.spec.span
    kernel(
        (len(qkv), -(-tasks // WRITERS), 1),
        WRITERS * 32,
        0,
        [
            *(qkv, heads.rope, positions, slots, rooms, room_slots),
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            *(out, *_stored(layer), layer.exact_keys, layer.exact_values, *prepared.keys, *prepared.values),
            *(float(eps), spec.heads, spec.kv_heads, layer.page_size, spec.rotary_dim),
            *(layer.spec.sinks, ring_pages(layer.spec, layer.page_size)),
        ],
        dependent=True,
    )
    return out


def run(
    plan: PackedPlan,
    workspace: Workspace,
    prepared: Prepared,
    layer: PackedLayer,
    queries: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    spec: AttentionSpec,
    rooms: Tensor | None = None,
    turned: Turns | None = None,
    lse: Tensor | None = None,
    shared: even.Shared | None = None,
) -> Tensor:
    """Attention of queries [R, heads * head_dim], rotated, one a request and all of it written before. A request of
    length 0 gets zeros. turned: of keys that are stored before rotary embedding. shared: what `share` gives.
    """
    assert (plan.splits == EVEN) == (shared is not None)
    shape = prepared.shape
    kernel = nvrtc.load("packed_decode.cu", "packed_decode", defines(plan, shape, queries.dtype, spec.softcap > 0))
    out = torch.empty_like(queries)
    group, pairs = spec.heads // spec.kv_heads, pairs_of(plan, spec)
    items = None if shared is None else shared.items
    key_groups, _, key_units, key_shifts = prepared.keys
    value_groups, _, value_units, value_shifts = prepared.values
    kernel(
        (plan.splits, pairs, len(queries)) if items is None else (pairs, len(items), 1),
        plan.warps * 32,
        dynamic_bytes(shape, plan.tokens, plan.stages, plan.warps),
        [
            queries,
            *((None, None) if turned is None else (turned.table, turned.bases)),
            *(*_stored(layer), layer.exact_keys, layer.exact_values, page_table, kv_lengths, rooms),
            *(key_groups, key_units, key_shifts, value_groups, value_units, value_shifts),
            *(out, lse, workspace.sums, workspace.counters, items, float(spec.scale), float(spec.softcap)),
            *(spec.kv_heads, group, pairs // spec.kv_heads, layer.spec.span, layer.page_size, page_table.shape[1]),
            *(layer.spec.window, layer.spec.sinks, ring_pages(layer.spec, layer.page_size)),
        ],
        dependent=shared is None or not shared.fresh,
    )
    return out


def share(
    plan: PackedPlan,
    spec: AttentionSpec,
    shape: Shape,
    kv_lengths: Tensor,
    sms: int,
    memo: dict[Any, Any],
    layer: int,
) -> even.Shared | None:
    """As `decode.share`."""
    return even.share(kind(plan, spec, shape, sms), kv_lengths, memo, layer) if plan.splits == EVEN else None


def read(
    prepared: Prepared, layer: PackedLayer, rope: Tensor, moves: Moves, positions: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Tokens from slots of pages to slots of scratch pages, as numbers of the type of these, keys rotated. positions
    [N] int64, of the tokens.
    """
    shape, kv_heads = prepared.shape, keys.shape[1]
    count, tasks = len(positions), 2 * kv_heads * len(positions)
    kernel = nvrtc.load(
        "packed_read.cu",
        "packed_read",
        (("HALF", nvrtc.HALF[keys.dtype]), ("SPAN", layer.spec.span), ("WARPS", READERS), *shape.defines),
    )
    key_groups, _, key_units, key_shifts = prepared.keys
    value_groups, _, value_units, value_shifts = prepared.values
    kernel(
        (-(-tasks // READERS), 1, 1),
        READERS * 32,
        0,
        [
            *(*_stored(layer), key_groups, key_units, key_shifts, value_groups, value_units, value_shifts),
            *(rope, moves.source, moves.target, positions, keys, values, count, kv_heads, layer.page_size),
        ],
    )


def merge(out: Tensor, sums: Tensor, older: Tensor, older_sums: Tensor, rows: Tensor) -> Tensor:
    """As `Means.merge`, into `out`."""
    heads = sums.shape[1]
    macros = (("HALF", nvrtc.HALF[out.dtype]), ("D", out.shape[1] // heads), ("WARPS", READERS))
    tasks = len(rows) * heads
    arguments: list[nvrtc.Argument] = [older, older_sums, sums, rows, out, len(rows), heads]
    nvrtc.load("merge.cu", "merge", macros)((-(-tasks // READERS), 1, 1), READERS * 32, 0, arguments)
    return out


@cache
def defines(plan: PackedPlan, shape: Shape, dtype: torch.dtype, cap: bool) -> tuple[tuple[str, int], ...]:
    """What packed_decode.cu is compiled with."""
    return (
        ("HALF", nvrtc.HALF[dtype]),
        ("HEADS", plan.heads),
        ("TOKENS", plan.tokens),
        ("STAGES", plan.stages),
        ("WARPS", plan.warps),
        ("BLOCKS", plan.blocks),
        ("SHIFT", int(shape.shift)),
        ("CAP", int(cap)),
        ("EVEN", int(plan.splits == EVEN)),
        *shape.defines,
    )


def _stored(layer: PackedLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layer.keys.codes, layer.keys.parameters, layer.values.codes, layer.values.parameters


@dataclass(frozen=True, slots=True)
class Chunks(Means):
    """`Means` in one launch each."""

    prepared: Prepared

    def store(
        self,
        kernels: Kernels,
        qkv: Tensor,
        heads: Heads,
        layer: PackedLayer,
        layout: Layout,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        step = layout.step
        write(self.prepared, layer, qkv, heads, step.positions, step.slots, room_slots=layout.room_slots)

    def load(self, heads: Heads, layer: PackedLayer, band: Band, keys: Tensor, values: Tensor) -> None:
        read(self.prepared, layer, heads.rope, band.stored, band.positions, keys, values)

    def merge(self, out: Tensor, sums: Tensor, older: Tensor, older_sums: Tensor, rows: Tensor) -> Tensor:
        return merge(out, sums, older, older_sums, rows)


class Packing:
    """Decode steps over the packed layers of one device. Plans, tables and the workspace are kept."""

    def __init__(self, device: torch.device, sms: int) -> None:
        self.device = device
        self.sms = sms
        self._prepared: WeakKeyDictionary[PackedLayer, Prepared] = WeakKeyDictionary()
        self._turns: dict[tuple[int, float], tuple[Tensor, Turns]] = {}
        self._plans: dict[tuple[AttentionSpec, Shape, int, int], PackedPlan] = {}
        self._workspaces: list[Workspace] = []

    def serves(self, qkv: Tensor, spec: AttentionSpec, layer: PackedLayer, step: Contexts) -> bool:
        """Whether the kernels can run this step: one token a request."""
        exact = layer.exact_keys
        return (
            step.max_query <= 1
            and len(step.kv_lengths) == len(qkv)
            and legal(spec, layer.spec, qkv.dtype, layer.page_size)
            and (exact is None or (step.rooms is not None and exact.dtype == qkv.dtype))
        )

    def __call__(self, qkv: Tensor, heads: Heads, layer: PackedLayer, step: Contexts) -> Tensor:
        """As `Kernels.attention_packed`, for steps that are served."""
        spec, prepared = heads.spec, self._layer(layer, heads.spec)
        chosen = self._plan(spec, prepared.shape, len(qkv), step.page_table.shape[1] * layer.page_size)
        about = (spec, prepared.shape, step.kv_lengths, self.sms, step.memo)
        shared = share(chosen, *about, layer.keys.codes.data_ptr())
        queries = write(prepared, layer, qkv, heads, step.positions, step.slots, rooms=step.rooms)
        turned = self._rotations(heads.rope, layer.keys.bits) if prepared.shape.pre else None
        workspace = self._sums(len(qkv), pairs_of(chosen, spec))
        read = (queries, step.page_table, step.kv_lengths, spec, step.rooms, turned)
        return run(chosen, workspace, prepared, layer, *read, shared=shared)

    def chunks(self, qkv: Tensor, spec: AttentionSpec, layer: PackedLayer) -> Means:
        """How steps with chunks store and read tokens."""
        exact = layer.exact_keys
        suits = legal(spec, layer.spec, qkv.dtype, layer.page_size) and (exact is None or exact.dtype == qkv.dtype)
        return Chunks(self._layer(layer, spec)) if suits else Means()

    def _layer(self, layer: PackedLayer, spec: AttentionSpec) -> Prepared:
        known = self._prepared.get(layer)
        if known is None:
            known = self._prepared[layer] = prepare(layer, spec)
        return known

    def _rotations(self, rope: Tensor, bits: float) -> Turns:
        place = rope.data_ptr(), bits
        known = self._turns.get(place)
        if known is None:  # the table is kept too: its place is not given to another one
            known = self._turns[place] = rope, turns(rope, bits)
        return known[1]

    def _plan(self, spec: AttentionSpec, shape: Shape, requests: int, max_kv: int) -> PackedPlan:
        place = spec, shape, requests, max_kv
        if place not in self._plans:
            self._plans[place] = plan(*place, self.sms)
        return self._plans[place]

    def _sums(self, requests: int, pairs: int) -> Workspace:
        """pairs: of a request, at most. Smaller workspaces are kept: captured steps may use them."""
        if not self._workspaces or self._workspaces[-1].pairs < requests * pairs:
            wanted = max(requests, graphs.LARGEST) * max(pairs, MOST_GROUP)
            self._workspaces.append(Workspace(self.device, wanted))
        return self._workspaces[-1]
