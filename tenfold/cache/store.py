"""The KV store: memory for the keys and values of all layers, cut into pages. Who owns a page is decided in `pages.py`.

A layer is stored as computed or, where the format packs and the layer sees the whole context, packed; layers with a
sliding window need few tokens and stay as computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.kv.layer import MOST_GUESSES, PackedLayer, Side, ring_pages, room_pages
from tenfold.ops.kv.packing import FLOAT8_BITS, packed_bytes
from tenfold.ops.kv.quantize import STORED, UNMEASURED_UNIT, Grouping, hadamard, plain
from tenfold.ops.kv.spec import PARAMETERS, PackedSpec, parameters_of

Groupings = Sequence[tuple[Grouping, Grouping]]
"""Of every layer how its keys and its values are grouped."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What the cache of a model looks like. dtype: of keys and values that are stored as computed; packed: how others
    are stored, None where there are none; local: the layers that are not packed; one: keys are values too (latent
    attention), and are stored once.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int
    packed: PackedSpec | None = None
    local: frozenset[int] = frozenset()
    one: bool = False

    def __str__(self) -> str:
        as_computed = f"as computed in {str(self.dtype).removeprefix('torch.')}"
        if self.packed is None:
            return as_computed
        found = f"{self.packing} layer{'s' * (self.packing != 1)} as {self.packed}"
        return found + (f", {len(self.local)} with a sliding window {as_computed}" if self.local else "")

    def packs(self, layer: int) -> bool:
        return self.packed is not None and layer not in self.local

    @property
    def packing(self) -> int:
        """Layers that are packed."""
        return sum(map(self.packs, range(self.layers)))

    @property
    def exact_bytes(self) -> int:
        """Of a token in one layer that is stored as computed."""
        return (1 if self.one else 2) * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        packed = 0 if self.packed is None else self.packed.bytes_per_token(self.kv_heads, self.head_dim)
        return self.packing * packed + (self.layers - self.packing) * self.exact_bytes

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size

    @property
    def room_pages(self) -> int:
        """Exact pages of a running sequence in each packed layer. Raises ValueError where sinks do not fit."""
        return 0 if self.packed is None or not self.packing else room_pages(self.packed, self.page_size)

    @property
    def room_slack(self) -> int:
        """Tokens that may be written to a room behind a place and leave the window before the place whole."""
        assert self.packed is not None
        return ring_pages(self.packed, self.page_size) * self.page_size - self.packed.window - MOST_GUESSES

    @property
    def bytes_per_room(self) -> int:
        """Of what a running sequence has exact, in all layers."""
        return self.packing * self.room_pages * self.page_size * self.exact_bytes


class KVStore:
    """Keys and values of all layers. `layers[i]` is (keys, values), each [pages, kv_heads, page_size, head_dim], or a
    `PackedLayer`; where none is packed `keys[i]` and `values[i]` are these tensors.

    A slot number is `page * page_size + offset`. Contents of a page or a room nobody owns are undefined. rooms: of
    sequences that run at once and of those that may be continued. groupings: of every layer; without them neighbouring
    channels share a group.
    """

    def __init__(
        self,
        spec: KVSpec,
        pages: int,
        device: torch.device,
        rooms: int = 0,
        groupings: Groupings | None = None,
    ) -> None:
        self.spec = spec
        self.pages = pages
        self.rooms = rooms
        dense = spec.layers - spec.packing
        shape = (dense, pages, spec.kv_heads, spec.page_size, spec.head_dim)
        self._keys = torch.empty(shape, dtype=spec.dtype, device=device)
        self._values = self._keys if spec.one else torch.empty(shape, dtype=spec.dtype, device=device)
        self.keys = list(self._keys.unbind(0))
        self.values = list(self._values.unbind(0))
        self.layers: list[tuple[Tensor, Tensor] | PackedLayer] = []
        stored = zip(self.keys, self.values)
        if spec.packed is not None and spec.packing:
            self._packed = _Packed(spec, spec.packed, pages, rooms, device)
        for i in range(spec.layers):
            groups = groupings[i] if groupings else None
            self.layers.append(self._packed.layer(groups) if spec.packs(i) else next(stored))

    @property
    def tokens(self) -> int:
        """That it has room for."""
        return self.pages * self.spec.page_size

    @property
    def _stored(self) -> tuple[Tensor, ...]:
        """What is stored as computed."""
        return (self._keys,) if self.spec.one else (self._keys, self._values)

    def take_pages(self, other: "KVStore", pages: Tensor) -> None:
        """Whole pages of a store of the same shape on another device, to the same numbers; pages [N] int64 on the host.
        Stores that pack have no such copies.
        """
        for own, theirs in zip(self._stored, other._stored):
            own[:, pages.to(own.device)] = theirs[:, pages.to(theirs.device)].to(own.device)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages in every layer; `sources`, `targets` [N] int64 page numbers on the store's device."""
        for whole in (*self._stored, *(self._packed.pages if self.spec.packing else ())):
            whole[:, targets] = whole[:, sources]

    def fill(self, value: float) -> None:
        """Put a number everywhere; in packed pages, the largest codes and scales and zeros that are no numbers."""
        for tensor in (*self._stored, *(self._packed.rooms if self.spec.packing else ())):
            tensor.fill_(value)
        for tensor in self._packed.pages if self.spec.packing else ():
            tensor.fill_(-1 if tensor.dtype == torch.int16 else 0xFF)

    def copy_room(self, source: int, target: int) -> None:
        """Copy a whole room in every layer."""
        for whole in self._packed.rooms if self.spec.packing else ():
            whole[:, target] = whole[:, source]


class _Packed:
    """The memory of all packed layers: one allocation for each kind of thing, layers first.

    pages: what is copied with pages, [layers, pages, ...]; rooms: with rooms, [layers, rooms, ...].
    """

    def __init__(self, spec: KVSpec, packed: PackedSpec, pages: int, rooms: int, device: torch.device) -> None:
        self.spec, self.packed, self.device = spec, packed, device
        self._next = 0
        layers, heads = spec.packing, spec.kv_heads
        groups = packed.groups(heads, spec.head_dim) // (heads // packed.span)
        self.pages: list[Tensor] = []
        for bits in (packed.key_bits, packed.value_bits):
            codes = (layers, pages, heads, spec.page_size, packed_bytes(spec.head_dim, bits))
            numbers = (layers, pages, heads // packed.span, spec.page_size, groups, parameters_of(bits))
            self.pages.append(torch.empty(codes, dtype=torch.uint8, device=device))
            raw = torch.uint8 if PARAMETERS[packed.parameters] == 1 else torch.int16
            self.pages.append(torch.zeros(numbers, dtype=raw, device=device))
        exact = (layers, rooms, spec.room_pages, heads, spec.page_size, spec.head_dim)
        self.rooms = [torch.zeros(exact, dtype=spec.dtype, device=device) for _ in range(2 if spec.room_pages else 0)]

    def layer(self, groupings: tuple[Grouping, Grouping] | None) -> PackedLayer:
        """The next one."""
        i, packed = self._next, self.packed
        self._next += 1
        channels = self.spec.kv_heads * self.spec.head_dim
        unit = UNMEASURED_UNIT if packed.parameters == "e4m3" else 1.0
        own = groupings or tuple(
            plain(channels, packed.group, unit if bits == FLOAT8_BITS else 1.0)
            for bits in (packed.key_bits, packed.value_bits)
        )
        turn = hadamard(packed.group, self.device) if packed.turned else None

        def side(n: int, bits: float) -> Side:
            numbers = self.pages[2 * n + 1][i].view(STORED[packed.parameters])
            return Side(self.pages[2 * n][i], numbers, bits, own[n].to(self.device), turn)

        sides = side(0, packed.key_bits), side(1, packed.value_bits)
        if not self.rooms:
            return PackedLayer(packed, *sides)
        return PackedLayer(packed, *sides, *(whole[i].flatten(0, 1) for whole in self.rooms))
