"""Pack weights for the CPU kernels: what a file stores (`RawTensor`) becomes tiles of 16 rows (layout: csrc/linear.h).

Nothing is requantised: a packed matrix holds exactly the values of its file. Parts are stacked by rows and keep their
own format, so query, key and value may differ in format.
"""

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.cpu import arms, memory
from tenfold.ops.cpu.lib import prototype
from tenfold.ops.matrix import Matrix, RawTensor

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F32", "F16", "BF16")
"""Storages that can be packed, in the order of enum tf_format."""
TILE = 16  # rows
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_COLS = {name: 1 if name in _DENSE else 256 if name.endswith("_K") else 32 for name in FORMATS}


class Segment(Structure):
    """tf_segment."""

    _fields_ = (
        ("format", c_int32),
        ("row0", c_int32),
        ("rows", c_int32),
        ("tile0", c_int32),
        ("tiles", c_int32),
        ("reserved", c_int32),
        ("tile_bytes", c_int64),
        ("data", c_void_p),
    )


class Description(Structure):
    """tf_matrix."""

    _fields_ = (
        ("rows", c_int32),
        ("cols", c_int32),
        ("tiles", c_int32),
        ("segments", c_int32),
        ("segment", c_void_p),
    )


@cache
def _functions() -> tuple[Any, Any, Any]:
    return (
        prototype("tf_tile_bytes", c_int64, c_int, c_int),
        prototype("tf_raw_row_bytes", c_int64, c_int, c_int),
        prototype("tf_pack", None, c_int, c_void_p, c_int64, c_int, c_int, c_void_p),
    )


@cache
def _rows_function() -> Any:
    return prototype("tf_matrix_rows", None, c_void_p, c_void_p, c_int, c_float, c_void_p)


def pack(parts: Sequence[RawTensor]) -> Matrix:
    """One Matrix of the parts stacked by rows; its handle is the address of a tf_matrix that lives as long as it.

    Matrix.format joins the formats with "+", e.g. "q4_1" or "q4_k+q6_k". Raises ValueError for a storage that cannot
    be packed, parts of different width, and data that does not have the size its shape asks for.
    """
    if not parts:
        raise ValueError("A matrix needs at least one tensor; none was given.")
    cols = parts[0].shape[-1]
    sources = [_checked(part, cols) for part in parts]
    rows = [part.shape[0] for part in parts]
    tile_bytes = [_functions()[0](FORMATS.index(part.storage), cols) for part in parts]
    sizes = [-(-n // TILE) * size for n, size in zip(rows, tile_bytes)]
    data = memory.weights.empty(max(1, sum(sizes)))
    description = _describe(parts, rows, cols, tile_bytes, data.data_ptr())
    offset = 0
    for part, source, size in zip(parts, sources, sizes):
        stride = source.stride(0) * source.element_size()
        target = data.data_ptr() + offset
        _functions()[2](FORMATS.index(part.storage), source.data_ptr(), stride, part.shape[0], cols, target)
        offset += size
    formats = "+".join(dict.fromkeys(part.storage.lower() for part in parts))
    matrix = Matrix(formats, sum(rows), cols, (data, description), handle=description.data_ptr())
    arms.apply(matrix)
    return matrix


def copy(matrix: Matrix) -> Matrix:
    """The same matrix in memory of its own."""
    data, description = (t.clone() for t in matrix.data)
    moved = data.data_ptr() - matrix.data[0].data_ptr()
    first = description.data_ptr() + sizeof(Description)
    header = Description.from_address(description.data_ptr())
    header.segment = first
    for i in range(header.segments):
        Segment.from_address(first + i * sizeof(Segment)).data += moved
    return Matrix(matrix.format, matrix.rows, matrix.cols, (data, description), description.data_ptr(), matrix.arms)


def _checked(part: RawTensor, cols: int) -> Tensor:
    """The data of a part, rows contiguous."""
    name, storage = part.name, part.storage
    if storage not in FORMATS:
        raise ValueError(f"{name} is stored as {storage}; the CPU kernels take {', '.join(FORMATS)}.")
    if len(part.shape) != 2 or part.shape[1] != cols or cols < 1:
        raise ValueError(f"{name} has shape {part.shape}; expected (rows, {cols}) as in the tensors stacked with it.")
    if cols % _BLOCK_COLS[storage]:
        raise ValueError(f"{name} has {cols} columns; {storage} needs a multiple of {_BLOCK_COLS[storage]}.")
    row_bytes = _functions()[1](FORMATS.index(storage), cols)
    expected = _DENSE.get(storage, torch.uint8)
    width = row_bytes // expected.itemsize
    data = part.data
    if data.dtype != expected or data.numel() != part.shape[0] * width or data.device.type != "cpu":
        raise ValueError(
            f"{name} has {tuple(data.shape)} of {data.dtype} on {data.device} for {part.shape} stored as {storage}; "
            f"expected {part.shape[0]} x {width} of {expected} on cpu."
        )
    data = data.reshape(part.shape[0], width)
    return data if data.stride(1) == 1 else data.contiguous()


def _describe(
    parts: Sequence[RawTensor], rows: Sequence[int], cols: int, tile_bytes: Sequence[int], address: int
) -> Tensor:
    """A tensor that holds a tf_matrix and, behind it, its segments."""
    buffer = torch.zeros(sizeof(Description) + len(parts) * sizeof(Segment), dtype=torch.uint8)
    first = buffer.data_ptr() + sizeof(Description)
    row = tile = 0
    for i, (part, n, size) in enumerate(zip(parts, rows, tile_bytes)):
        tiles = -(-n // TILE)
        segment = Segment.from_address(first + i * sizeof(Segment))
        segment.format, segment.row0, segment.rows = FORMATS.index(part.storage), row, n
        segment.tile0, segment.tiles, segment.tile_bytes, segment.data = tile, tiles, size, address
        row, tile, address = row + n, tile + tiles, address + tiles * size
    description = Description.from_address(buffer.data_ptr())
    description.rows, description.cols, description.tiles = row, cols, tile
    description.segments, description.segment = len(parts), first
    return buffer


def rows(matrix: Matrix, ids: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * W[ids]` as numbers: ids [n] int64, each in 0..rows-1 (not checked here) -> [n, cols] float32."""
    ids = ids.contiguous()
    out = torch.empty(ids.numel(), matrix.cols)
    _rows_function()(matrix.handle, ids.data_ptr(), ids.numel(), scale, out.data_ptr())
    return out


def unpack(matrix: Matrix) -> Tensor:
    """All rows of a packed matrix as numbers, [rows, cols] float32."""
    return rows(matrix, torch.arange(matrix.rows))
