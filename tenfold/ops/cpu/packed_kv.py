"""What the compiled kernels have to know of a layer of a packed cache, as the structs of csrc/packed.h.

Made once a layer: everything in it stays where it is as long as the layer lives.
"""

from dataclasses import dataclass
from struct import Struct

import torch
from torch import Tensor

from tenfold.ops.kernels import Contexts
from tenfold.ops.kv.layer import MOST_GUESSES, PackedLayer, Side, ring_pages
from tenfold.ops.kv.packing import packed_bytes

CHANNELS_ALIGN = 16  # TF_CHANNELS_ALIGN
MOST_CHANNELS = 1024  # of a head; LONGEST_HEAD in csrc/heads.h
MOST_QUERIES = MOST_GUESSES + 1  # of a request in a step: a room keeps what the first sees when all are written
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum tf_type
_SIDE = "6P4i"
_LAYER = Struct(f"@{_SIDE}{_SIDE}2P11i")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A layer as the kernels read it. struct: the bytes of a tf_packed_layer, in memory that does not move; keep: what
    it points to beside the pages.
    """

    struct: Tensor
    keep: tuple[Tensor, ...]

    @property
    def address(self) -> int:
        return self.struct.data_ptr()


def served(layer: PackedLayer, head_dim: int, step: Contexts) -> bool:
    """Whether the kernels can run this step: few tokens of each request, and heads of whole units of codes."""
    exact = layer.exact_keys
    return (
        step.max_query <= MOST_QUERIES
        and head_dim % 8 == 0
        and head_dim <= MOST_CHANNELS
        and (exact is None or (step.rooms is not None and exact.dtype in TYPES))
    )


def prepare(layer: PackedLayer, head_dim: int) -> Prepared:
    """layer: contiguous, on the CPU. Raises ValueError for another layout."""
    spec, exact = layer.spec, (layer.exact_keys, layer.exact_values)
    kv_heads, page_size = layer.keys.codes.shape[1:3]
    keys, values = (_side(side, kv_heads, head_dim, spec.span) for side in (layer.keys, layer.values))
    for tensor in (layer.keys.codes, layer.keys.parameters, layer.values.codes, layer.values.parameters, *exact):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"Packed pages or rooms of shape {tuple(tensor.shape)} are not contiguous; the CPU kernels take only "
                "contiguous ones. Make the cache with KVStore."
            )
    data = _LAYER.pack(
        *keys.fields,
        *values.fields,
        *(0 if tensor is None else tensor.data_ptr() for tensor in exact),
        page_size,
        0 if exact[0] is None else TYPES[exact[0].dtype],
        spec.window,
        spec.sinks,
        ring_pages(spec, page_size),
        spec.span,
        spec.rotary == "pre",
        spec.group if spec.turned else 0,
        layer.keys.kind == "fp16",
        kv_heads,
        head_dim,
    )
    struct = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Prepared(struct, (*keys.keep, *values.keep))


@dataclass(frozen=True, slots=True, eq=False)
class _Fields:
    """Of a tf_packed_side, and what they point to."""

    fields: tuple[int, ...]
    keep: tuple[Tensor, ...]


def _side(side: Side, kv_heads: int, head_dim: int, span: int) -> _Fields:
    grouping = side.grouping
    groups, numbers = side.parameters.shape[3:]
    first = torch.arange(kv_heads)[:, None] // span * groups
    group = _filled((grouping.group.view(kv_heads, head_dim) - first).int())
    shift = _filled(grouping.shift.float().view(kv_heads, head_dim))
    keep = (group, shift, grouping.unit.float().contiguous(), grouping.clip.float().contiguous())
    pages = (side.codes.data_ptr(), side.parameters.data_ptr())
    sizes = (round(2 * side.bits), packed_bytes(head_dim, side.bits), groups, numbers)
    return _Fields((*pages, *(t.data_ptr() for t in keep), *sizes), keep)


def _filled(x: Tensor) -> Tensor:
    """[kv_heads, head_dim] -> [kv_heads, TF_CHANNELS_ALIGN whole], zeros behind."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % CHANNELS_ALIGN)).contiguous()
