"""Attention over packed pages, made of the operations that all `Kernels` have: the meaning, and the way where nothing
faster can run.

A query at position t sees the last `window` tokens as they were computed, itself among them, the sinks likewise, and
all others as they are stored. So a result never depends on how a prompt was cut into chunks. Two attentions over
scratch pages are merged by their log-sum-exp: a sliding window over what is exact, and over all that is older a causal
one whose queries stand `window` tokens back. What is older is unpacked in bands of at most OLD_TOKENS tokens, however
long contexts are: a band is a sliding window, too, whose queries stand still farther back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tenfold.ops.host import sent
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Kernels
from tenfold.ops.kv.layer import PackedLayer, ring_pages, room_page, room_pages
from tenfold.ops.kv.spec import PackedSpec
from tenfold.ops.oracle import rotate

OLD_TOKENS = 32768  # of all contexts of a step, in scratch pages at once; beside them as many as are new in the step


def attention(
    kernels: Kernels, qkv: Tensor, heads: Heads, layer: PackedLayer, step: Contexts, means: "Means | None" = None
) -> Tensor:
    """As `Kernels.attention_packed`. means: how tokens come and go, None: in plain operations."""
    spec, window, means = heads.spec, layer.spec.window, means or Means()
    layout = step.memo.get("packed")
    if layout is None:
        layout = step.memo["packed"] = Layout(layer.spec, layer.page_size, step)
    dtype = qkv.dtype if layer.exact_keys is None else layer.exact_keys.dtype
    keys, values = layout.pages("recent", layout.recent.count, spec, dtype)
    q = kernels.rope_write(qkv, heads, step.positions, layout.own.int(), keys, values)
    if step.shared:  # guesses of one sequence see each other
        means.store(kernels, qkv, heads, layer, layout, keys, values)
    fetch(layer, layout.before, keys, values)
    if not step.shared:  # a long chunk takes the places of what it reads back to
        means.store(kernels, qkv, heads, layer, layout, keys, values)
    if not layout.old:
        return layout.recent.attend(kernels, q, keys, values, replace(spec, window=window))[0]
    older, older_sums = attend_old(kernels, q, heads, layer, layout, means)
    rows = layout.old[0].scratch.rows
    if not window:  # a request that is idle has nothing old either
        return older if len(rows) == len(q) else torch.zeros_like(q).index_copy_(0, rows, older)
    out, sums = layout.recent.attend(kernels, q, keys, values, replace(spec, window=window))
    return means.merge(out, sums, older, older_sums, rows)


def attend_old(
    kernels: Kernels, q: Tensor, heads: Heads, layer: PackedLayer, layout: "Layout", means: "Means"
) -> tuple[Tensor, Tensor]:
    """q [T, heads * D] -> of the rows that have anything old, over all of it, [rows, heads * D], and log-sum-exp
    [rows, heads] float32. Several bands meet in float32.
    """
    spec, bands = heads.spec, layout.old
    keys, values = layout.pages("old", max(band.scratch.count for band in bands), spec, q.dtype)

    def of(band: Band) -> tuple[Tensor, Tensor]:
        means.load(heads, layer, band, keys, values)
        fetch(layer, band.sinks, keys, values)
        return band.scratch.attend(kernels, q, keys, values, replace(spec, window=band.width))

    out, sums = of(bands[0])
    if len(bands) == 1:
        return out, sums
    out = out.float()
    for band in bands[1:]:
        mixed, both = mix(out[band.within], sums[band.within], *of(band))
        out.index_copy_(0, band.within, mixed)
        sums.index_copy_(0, band.within, both)
    return out.to(q.dtype), sums


class Means:
    """How new tokens are stored, old ones read and two attentions merged: in plain operations. Kernels have others."""

    def store(
        self,
        kernels: Kernels,
        qkv: Tensor,
        heads: Heads,
        layer: PackedLayer,
        layout: "Layout",
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """New tokens, whose rotated keys and whose values are in the scratch: codes to pages, and those that are to be
        seen exact later to their rooms.
        """
        spec, step, new = heads.spec, layout.step, layout.own[layout.written.source]
        stored = keys
        if layer.spec.rotary == "pre" and spec.rotary_dim:
            stored, unused = torch.empty_like(keys), torch.empty_like(values)
            still = replace(heads, spec=replace(spec, rotary_dim=0))
            kernels.rope_write(qkv, still, step.positions, layout.own.int(), stored, unused)
        layer.keys.write(take(stored, new).flatten(1), layout.written.target)
        layer.values.write(take(values, new).flatten(1), layout.written.target)
        if layer.exact_keys is not None and layer.exact_values is not None:
            source = layout.own[layout.kept.source]
            put(layer.exact_keys, layout.kept.target, take(keys, source))
            put(layer.exact_values, layout.kept.target, take(values, source))

    def load(self, heads: Heads, layer: PackedLayer, band: "Band", keys: Tensor, values: Tensor) -> None:
        """What is old, as stored, to the scratch, keys rotated."""
        spec, stored = heads.spec, band.stored
        shape = (-1, spec.kv_heads, spec.head_dim)
        read = layer.keys.read(stored.source).view(shape)
        if layer.spec.rotary == "pre" and spec.rotary_dim:
            cos, sin = heads.rope[band.positions][:, None].chunk(2, dim=-1)
            read = rotate(read, cos, sin)
        put(keys, stored.target, read)
        put(values, stored.target, layer.values.read(stored.source).view(shape))

    def merge(self, out: Tensor, sums: Tensor, older: Tensor, older_sums: Tensor, rows: Tensor) -> Tensor:
        """out [T, heads * D] and log-sum-exp [T, heads] of all tokens, and of some rows over what is older -> over
        both. May overwrite `out`.
        """
        mixed, _ = mix(out[rows], sums[rows], older, older_sums)
        return out.index_copy(0, rows, mixed.to(out.dtype))


def mix(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries, [N, heads * D] and log-sum-exp [N, heads] each -> over both, in float32."""
    both = torch.logaddexp(sums, other_sums)
    first, second = ((s - both).exp()[..., None] for s in (sums, other_sums))
    shape = (sums.shape[1], -1)
    return (first * out.unflatten(1, shape) + second * other.unflatten(1, shape)).flatten(1), both


def fetch(layer: PackedLayer, moves: "Moves", keys: Tensor, values: Tensor) -> None:
    """From rooms to the scratch."""
    if layer.exact_keys is not None and layer.exact_values is not None:
        put(keys, moves.target, take(layer.exact_keys, moves.source))
        put(values, moves.target, take(layer.exact_values, moves.source))


def take(pages: Tensor, slots: Tensor) -> Tensor:
    """Tokens of pages [pages, kv_heads, page_size, D] at slots [N] -> [N, kv_heads, D]."""
    size = pages.shape[2]
    return pages[slots // size, :, slots % size]


def put(pages: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """The inverse of `take`."""
    size = pages.shape[2]
    pages[slots // size, :, slots % size] = tokens.to(pages.dtype)


# The moves of a step


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Tokens that go from one place to another: slots, or places among a step's new tokens, [N] int64 each."""

    source: Tensor
    target: Tensor


class Scratch:
    """Pages for some contexts, one behind the other, and the queries of a step that read them.

    lengths [R], counts [R]: of contexts, and of the queries at their ends; rows: places of the queries among the step's
    tokens.
    """

    def __init__(
        self, lengths: np.ndarray, counts: np.ndarray, rows: np.ndarray, page_size: int, device: torch.device
    ) -> None:
        each = np.maximum(1, -(-lengths // page_size))
        self.page_size = page_size
        self.first = np.cumsum(each) - each
        self.count = int(each.sum())
        self.device = device
        self.rows = self._tensor(rows, torch.int64)
        asked = np.flatnonzero(counts)
        columns = self.first[asked, None] + np.arange(each[asked].max(initial=1))
        self._table = self._tensor(np.minimum(columns, self.count - 1))
        self._starts = self._tensor(np.concatenate(([0], np.cumsum(counts[asked]))))
        self._lengths = self._tensor(np.maximum(1, lengths[asked]))
        self._longest = int(counts.max(initial=0)), int(lengths.max(initial=1))

    def _tensor(self, array: np.ndarray, dtype: torch.dtype = torch.int32) -> Tensor:
        return sent(array, self.device, dtype)

    def slots(self, request: np.ndarray, position: np.ndarray) -> np.ndarray:
        return self.first[request] * self.page_size + position

    def attend(
        self, kernels: Kernels, q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """q [T, heads * head_dim] -> results of its rows, likewise, and their log-sum-exp [rows, heads] float32."""
        lse = torch.empty(len(self.rows), spec.heads, dtype=torch.float32, device=q.device)
        own = q if len(self.rows) == len(q) else q[self.rows]
        tables = (self._table, self._starts, self._lengths)
        return kernels.attend(own, keys, values, *tables, spec, *self._longest, lse), lse


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of things in groups of so many: the group of each, and its place there."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Old tokens that are attended to together: of each query the last `width` (0: all) of those that no earlier band
    had. stored: from pages to the scratch, tokens at positions [N]; sinks: from rooms to the scratch; within: places of
    the scratch's rows among those of the first band.
    """

    scratch: Scratch
    stored: Moves
    positions: Tensor
    sinks: Moves
    within: Tensor
    width: int


def cut(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cut contexts into bands from their ends: how many tokens behind an end each begins, and its width, the same for
    all contexts: as wide as `most` tokens of them all allow, at least 1.
    """
    done, left = 0, np.sort(lengths[lengths > 0])
    while len(left):
        whole = np.cumsum(left) - left  # of the contexts that are shorter
        shares = (most - whole) // np.arange(len(left), 0, -1)
        longer = np.flatnonzero(left > shares)
        width = max(1, int(shares[longer[0]])) if len(longer) else int(left[-1])
        yield done, width
        done, left = done + width, left[left > width] - width


class Layout:
    """Where the tokens of a step come from and go to, the same for every layer. Reads lengths from the device.

    recent: scratch of the new tokens and before them those that their windows reach back to; own [T]: the slots of new
    tokens there. old: scratch of what is older than the windows of the last queries, None where nothing is.
    before: from rooms to `recent`; kept: new tokens to rooms; written: new tokens to pages; stored: from pages to
    `old`, tokens at old_positions; sinks: from rooms to `old`. tokens: how many are new.
    """

    def __init__(self, spec: PackedSpec, page_size: int, step: Contexts) -> None:
        self.spec, self.page_size, self.step = spec, page_size, step
        self.device = step.positions.device
        starts, lengths = step.query_start.cpu().numpy(), step.kv_lengths.cpu().numpy().astype(np.int64)
        counts = np.diff(starts).astype(np.int64)
        begins = np.maximum(0, lengths - counts)
        self._new(counts, begins, lengths)
        past = np.where(counts > 0, np.maximum(0, lengths - spec.window), 0)
        self.old: list[Band] = []
        for done, width in cut(past, OLD_TOKENS):
            self.old.append(self._band(counts, starts[1:], past - done, width))
        self._scratch: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def pages(self, name: str, count: int, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a scratch, the same for every layer; zeros at first: kernels may read beyond a context,
        and mask it after.
        """
        place = name, count, spec.kv_heads, spec.head_dim, dtype
        if place not in self._scratch:
            shape = (count, spec.kv_heads, self.page_size, spec.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
            self._scratch[place] = keys, values
        return self._scratch[place]

    def _new(self, counts: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> None:
        back = np.minimum(begins, max(0, self.spec.window - 1))
        request, index = spread(counts)
        self.recent = Scratch(back + counts, counts, np.arange(len(request)), self.page_size, self.device)
        self.own = self._tensor(self.recent.slots(request, back[request] + index))
        earlier, place = spread(back)
        target = self._tensor(self.recent.slots(earlier, place))
        self.before = Moves(self._rooms(earlier, (begins - back)[earlier] + place), target)
        position = begins[request] + index
        ring = ring_pages(self.spec, self.page_size) * self.page_size
        real = lengths[request] > 0  # others are idle
        kept = np.flatnonzero(real & ((position < self.spec.sinks) | (position >= lengths[request] - ring)))
        self.kept = Moves(self._tensor(kept), self._rooms(request[kept], position[kept]))
        self.tokens = len(request)
        written = self._tensor(np.flatnonzero(real))
        self.written = Moves(written, self.step.slots[written].long())

    def _band(self, counts: np.ndarray, ends: np.ndarray, left: np.ndarray, width: int) -> Band:
        """left [R]: the old tokens of each context that no earlier band had. Those at the end of the band are not seen
        by all queries, so it reads as many more at its beginning.
        """
        left = np.maximum(0, left)
        asking = np.minimum(counts, left)
        held = np.minimum(left, np.maximum(0, width + asking - 1))
        queries, place = spread(asking)
        rows = (ends - asking)[queries] + place
        scratch = Scratch(held, asking, rows, self.page_size, self.device)
        first = scratch.rows if not self.old else self.old[0].scratch.rows
        request, index = spread(held)
        position = (left - held)[request] + index
        positions, target = self._tensor(position), self._tensor(scratch.slots(request, index))
        pages = self.step.page_table[self._tensor(request), positions // self.page_size].long()
        stored = Moves(pages * self.page_size + positions % self.page_size, target)
        sinks = np.flatnonzero(position < self.spec.sinks)
        exact = Moves(self._rooms(request[sinks], position[sinks]), target[self._tensor(sinks)])
        within = torch.searchsorted(first, scratch.rows)
        return Band(scratch, stored, positions, exact, within, width if width < left.max() else 0)

    @cached_property
    def room_slots(self) -> Tensor:
        """[T] int32: where in the exact pages each new token goes, negative: nowhere."""
        places = torch.full((self.tokens,), -1, dtype=torch.int32, device=self.device)
        places[self.kept.source] = self.kept.target.int()
        return places

    def _rooms(self, request: np.ndarray, position: np.ndarray) -> Tensor:
        """Slots in the requests' rooms."""
        at, size = self._tensor(position), self.page_size
        if self.step.rooms is None:
            return at  # nobody reads them
        first = self.step.rooms[self._tensor(request)].long() * room_pages(self.spec, size)
        return (first + room_page(self.spec, size, at)) * size + at % size

    def _tensor(self, array: np.ndarray) -> Tensor:
        return sent(array, self.device, torch.int64)
