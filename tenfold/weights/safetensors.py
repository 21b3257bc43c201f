"""The safetensors container: a JSON header and the tensors' bytes, over a memory map.

Invariant: types, shapes and offsets are checked against each other and the size of the file before use; a damaged
or lying header raises CheckpointError with a sentence, and nothing outside the file is ever read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tenfold.ops.blocks import DENSE
from tenfold.ops.matrix import RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.mapped import MappedFile, parse_object

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMENSIONS = 16
# Bits of every type the format knows; those outside DENSE are checked but cannot be read as weights.
BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "C64": 64},
    **{"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
# Types that are read beside DENSE, as parts of quantised weights.
PARTS = {
    **{"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu},
}
WRITTEN = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies; offset: bytes from the start of the file."""

    storage: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One safetensors file. tensors: names to entries. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        header = self.header()
        header.pop("__metadata__", None)
        self.tensors = {name: self.entry(name, value) for name, value in header.items()}
        self.check_overlap()

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is not a usable safetensors file: {problem}; download it again.")

    def header(self) -> dict[str, Any]:
        """The JSON header; also sets where the data starts."""
        if self.file.size < 8:
            self.fail(f"it has {self.file.size} bytes, too few for a header")
        size = int.from_bytes(self.file.buffer[:8], "little")
        if size > MAX_HEADER or size > self.file.size - 8:
            self.fail(f"it announces a header of {size} bytes in a file of {self.file.size}")
        self.start = 8 + size
        return parse_object(self.file.buffer[8 : self.start], f"The header of {self.path}")

    def entry(self, name: str, value: Any) -> TensorEntry:
        if not isinstance(value, dict):
            self.fail(f"the tensor {name[:80]!r} is not described by an object")
        storage: Any = value.get("dtype")
        shape: Any = value.get("shape")
        offsets: Any = value.get("data_offsets")
        if not isinstance(storage, str) or storage not in BITS:
            self.fail(f"the tensor {name[:80]!r} has the unknown type {str(storage)[:40]!r}")
        if not whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
            self.fail(f"the tensor {name[:80]!r} has the shape {str(shape)[:80]}")
        if not whole_numbers(offsets) or len(offsets) != 2:
            self.fail(f"the tensor {name[:80]!r} has the offsets {str(offsets)[:80]}")
        begin, end = offsets
        if not begin <= end <= self.file.size - self.start:
            self.fail(f"the tensor {name[:80]!r} ends at byte {self.start + end} of {self.file.size}")
        if math.prod(shape) * BITS[storage] != (end - begin) * 8:
            self.fail(f"the tensor {name[:80]!r} of shape {shape} and type {storage} has {end - begin} bytes")
        return TensorEntry(storage, tuple(shape), self.start + begin, end - begin)

    def check_overlap(self) -> None:
        previous_end, previous = 0, ""
        for name, entry in sorted(self.tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset < previous_end:
                self.fail(f"the tensors {previous[:80]!r} and {name[:80]!r} overlap")
            previous_end, previous = entry.offset + entry.nbytes, name

    def raw(self, name: str) -> RawTensor:
        """The tensor, not copied; `name` must be in `tensors`. Raises CheckpointError for types that are no weights."""
        entry = self.tensors[name]
        if entry.storage not in DENSE:
            raise CheckpointError(
                f"{self.path}: the tensor {name} is stored as {entry.storage}; readable are {', '.join(DENSE)}. "
                "Use the original weights or a GGUF file of this model."
            )
        data = self.file.slice(entry.offset, entry.nbytes, DENSE[entry.storage]).view(entry.shape)
        return RawTensor(name, entry.storage, entry.shape, data)

    def part(self, name: str) -> Tensor:
        """A tensor of any type in DENSE and PARTS, not copied; `name` must be in `tensors`. Raises CheckpointError."""
        entry = self.tensors[name]
        dtype = {**DENSE, **PARTS}.get(entry.storage)
        if dtype is None:
            raise CheckpointError(f"{self.path}: the tensor {name} is stored as {entry.storage}, which is not read.")
        return self.file.slice(entry.offset, entry.nbytes, dtype).view(entry.shape)


def whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A small safetensors file, the same bytes for the same numbers; of types in WRITTEN."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    at = 0
    for name, tensor in sorted(tensors.items()):
        parts.append(tensor.detach().cpu().contiguous().numpy().tobytes())
        header[name] = {
            "dtype": WRITTEN[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(parts[-1])],
        }
        at += len(parts[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
