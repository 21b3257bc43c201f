"""`PackedLayer`: what one layer of a packed KV cache holds, and where.

Every token has its codes and parameters in a page, as it has keys and values in a page of an ordinary cache; they are
written with the token and never change. Beside them, where the format has a window or sinks, each running sequence has
a *room* of exact pages: a ring of its most recent tokens, then one page of its sinks. A query reads the last `window`
tokens and the sinks from the room, everything else as codes.

    codes       [pages, kv_heads, page_size, bytes] uint8           `packing`, a head's codes of a token together
    parameters  [pages, spans, page_size, groups, 1 or 2]           of the groups of `span` neighbouring heads; float8
                                                                    e4m3 or float16: scale, then zero
    exact       [rooms * room_pages, kv_heads, page_size, head_dim] keys rotated; position p of room n lies in page
                                                                    n * room_pages + `room_page(p)`, at p % page_size
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.kv.quantize import STORED, Grouping, dequantize, from_bytes, quantize, to_bytes
from tenfold.ops.kv.spec import PackedSpec

MOST_GUESSES = 16  # tokens of a sequence that are written ahead and may turn out wrong
ROOM_SLACK = MOST_GUESSES + 16  # tokens of a ring beyond its window and a page: guesses, and steps in flight


def ring_pages(spec: PackedSpec, page_size: int) -> int:
    """Pages of a room's ring: its window, a page, and ROOM_SLACK tokens; 0 where nothing is kept exact."""
    if not spec.window and not spec.sinks:
        return 0
    return math.ceil((spec.window + ROOM_SLACK) / page_size) + 1


def room_pages(spec: PackedSpec, page_size: int) -> int:
    """Pages of a room. Raises ValueError where sinks do not fit in one page."""
    if spec.sinks > page_size:
        raise ValueError(
            f"The KV format {spec} keeps {spec.sinks} sinks, pages hold {page_size} tokens; allowed: as many sinks as "
            f"a page holds. Raise page_size, or take s{page_size}."
        )
    pages = ring_pages(spec, page_size)
    return pages + 1 if pages else 0


def room_page(spec: PackedSpec, page_size: int, position: Tensor) -> Tensor:
    """The page of a room that holds positions, of any shape, in its ring or for sinks."""
    pages = ring_pages(spec, page_size)
    return torch.where(position < spec.sinks, pages, position // page_size % max(1, pages))


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The keys, or the values, of a layer. grouping: on the device of the pages; turn [group, group]: the Hadamard
    matrix of a turned format, None otherwise.
    """

    codes: Tensor
    parameters: Tensor
    bits: float
    grouping: Grouping
    turn: Tensor | None = None

    def write(self, x: Tensor, slots: Tensor) -> None:
        """Store x [T, C] of tokens at slots [T] (page * page_size + offset; none negative)."""
        kv_heads, page_size = self.codes.shape[1:3]
        spans, _, groups, count = self.parameters.shape[1:]
        made = quantize(self._turned(x.float()), self.grouping, self.bits, self.kind)
        codes, _ = to_bytes(made, self.bits, kv_heads)
        pages, offsets = slots // page_size, slots % page_size
        self.codes[pages, :, offsets] = codes
        target = self._raw
        target[pages, :, offsets] = made.parameters.view(target.dtype).view(len(x), spans, groups, count)

    def read(self, slots: Tensor) -> Tensor:
        """What tokens at slots [T] were stored as, [T, C] float32."""
        kv_heads, page_size = self.codes.shape[1:3]
        pages, offsets = slots // page_size, slots % page_size
        parameters = self._raw[pages, :, offsets].flatten(1, 2)
        head_dim = len(self.grouping.group) // kv_heads
        stored = from_bytes(self.codes[pages, :, offsets], parameters, self.bits, head_dim, self.kind)
        return self._turned(dequantize(stored, self.grouping))

    @property
    def kind(self) -> str:
        """Of its parameters, as `quantize` names them."""
        return "e4m3" if self.parameters.dtype == STORED["e4m3"] else "fp16"

    @property
    def _raw(self) -> Tensor:
        """The parameters as whole numbers: indexing of float8 is not implemented everywhere."""
        return self.parameters.view(torch.uint8 if self.kind == "e4m3" else torch.int16)

    def _turned(self, x: Tensor) -> Tensor:
        """Multiplied by the matrix, which is its own inverse."""
        return x if self.turn is None else (x.unflatten(-1, (-1, len(self.turn))) @ self.turn).flatten(-2)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedLayer:
    """spec: what all layers share. exact_keys, exact_values: rooms, None where the format keeps nothing exact."""

    spec: PackedSpec
    keys: Side
    values: Side
    exact_keys: Tensor | None = None
    exact_values: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.keys.codes.shape[2]
