"""The GGUF container, versions 2 and 3: metadata and a directory of tensors, over a memory map.

Invariant: every count, length, offset, type and shape is checked against the format and the size of the file before
it is used, so that a truncated, oversized or lying file raises CheckpointError with a sentence, and nothing outside
it is read.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from tenfold.ops.blocks import BLOCKS, DENSE, row_bytes
from tenfold.ops.matrix import RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.mapped import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # metadata entries
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 10  # bytes of a key or of a tensor's name
MAX_STRING = 1 << 26  # bytes of a string value
MAX_ARRAY = 1 << 23  # values in an array
MAX_DEPTH = 4  # arrays of arrays
MAX_DIMENSIONS = 4
MAX_SHARDS = 1 << 10
DEFAULT_ALIGNMENT = 32

# Metadata value types: 8 is a string, 9 an array, 7 a byte that is 0 or 1, the others are numbers.
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
# Storage types by number; those without a decoder here are named for the error message only.
STORAGES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. shape: its last dimension is contiguous; offset: bytes from the start of the file."""

    name: str
    storage: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """One GGUF file. metadata: keys to int, float, bool, str or a list. tensors: names to entries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        reader = Reader(self.file)
        tensor_count, entry_count = reader.header()
        self.metadata = dict(reader.entries(entry_count))
        self.tensors = dict(reader.directory(tensor_count, alignment(reader, self.metadata)))

    def raw(self, name: str) -> RawTensor:
        """The tensor as stored; `name` must be in `tensors`."""
        entry = self.tensors[name]
        if entry.storage in DENSE:
            data = self.file.slice(entry.offset, entry.nbytes, DENSE[entry.storage]).view(entry.shape)
        else:
            data = self.file.slice(entry.offset, entry.nbytes, torch.uint8)
            data = data.view(-1, row_bytes(entry.storage, entry.shape[-1]))
        return RawTensor(name, entry.storage, entry.shape, data)


class Reader:
    """A position in the file that moves over checked fields."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.buffer = file.buffer
        self.position = 0

    def fail(self, problem: str, remedy: str = "it is damaged, download it again") -> NoReturn:
        raise CheckpointError(f"{self.file.path} is not a usable GGUF file: {problem}; {remedy}.")

    def take(self, nbytes: int) -> int:
        """Move over nbytes, which must lie inside the file; returns where they start."""
        start = self.position
        if nbytes > self.file.size - start:
            self.fail(f"it ends at byte {self.file.size}, where {nbytes} more from byte {start} were announced")
        self.position = start + nbytes
        return start

    def u32(self) -> int:
        return int(U32.unpack_from(self.buffer, self.take(4))[0])

    def u64(self) -> int:
        return int(U64.unpack_from(self.buffer, self.take(8))[0])

    def string(self, limit: int) -> str:
        size = self.u64()
        if size > limit:
            self.fail(f"a string of {size} bytes stands at byte {self.position}, where at most {limit} are allowed")
        return self.text(self.take(size), self.position)

    def text(self, start: int, end: int) -> str:
        try:
            return self.buffer[start:end].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"the string at byte {start} is not UTF-8")

    def header(self) -> tuple[int, int]:
        """Check magic and version -> (number of tensors, number of metadata entries)."""
        if self.file.size < 24 or self.buffer[:4] != MAGIC:
            self.fail("it does not start as one", "pick a file that ends in .gguf and was downloaded completely")
        self.take(4)
        version = self.u32()
        if version & 0xFFFF == 0 and version:
            self.fail("it is in big-endian byte order", "use the little-endian file of this model")
        if version not in VERSIONS:
            self.fail(f"its version is {version}, readable are 2 and 3", "convert it with a current llama.cpp")
        tensors, entries = self.u64(), self.u64()
        if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
            self.fail(f"it announces {tensors} tensors and {entries} metadata entries")
        return tensors, entries

    def entries(self, count: int) -> Iterator[tuple[str, Any]]:
        seen = set()
        for _ in range(count):
            key = self.string(MAX_NAME)
            if key in seen:
                self.fail(f"the metadata key {key!r} stands in it twice")
            seen.add(key)
            yield key, self.value(self.u32())

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return self.numbers(kind, 1)[0]
        if kind == BOOL:
            return self.flags(1)[0]
        if kind == STRING:
            return self.string(MAX_STRING)
        if kind != ARRAY:
            self.fail(f"a metadata value at byte {self.position} has the unknown type {kind}")
        if depth == MAX_DEPTH:
            self.fail(f"its metadata nests arrays deeper than {MAX_DEPTH}")
        return self.array(self.u32(), self.u64(), depth + 1)

    def array(self, kind: int, count: int, depth: int) -> list[Any]:
        if count > MAX_ARRAY:
            self.fail(f"an array of {count} values stands at byte {self.position}")
        if kind in NUMBERS:
            return self.numbers(kind, count)
        if kind == BOOL:
            return self.flags(count)
        if kind == STRING:
            return self.strings(count)
        return [self.value(kind, depth) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.buffer, dtype, count, start).tolist()

    def flags(self, count: int) -> list[bool]:
        start = self.take(count)
        flags = self.buffer[start : start + count]
        if flags.strip(b"\0\1"):
            self.fail(f"a truth value before byte {self.position} is neither 0 nor 1")
        return [flag == 1 for flag in flags]

    def strings(self, count: int) -> list[str]:
        """An array of strings. A vocabulary has 10^5 and more: this loop is most of the time to open a file."""
        buffer, position, size = self.buffer, self.position, self.file.size
        unpack = U64.unpack_from
        found = []
        for _ in range(count):
            start = position + 8
            if start > size:
                self.take(size)
            position = start + unpack(buffer, position)[0]
            if position > size:
                self.take(position - self.position)
            found.append(buffer[start:position])
        self.position = position
        try:
            return [text.decode("utf-8") for text in found]
        except UnicodeDecodeError:
            self.fail(f"a string before byte {position} is not UTF-8")

    def directory(self, count: int, alignment: int) -> Iterator[tuple[str, TensorEntry]]:
        entries: dict[str, TensorEntry] = {}
        for _ in range(count):
            entry = self.tensor_entry(alignment)
            if entry.name in entries:
                self.fail(f"the tensor {entry.name!r} stands in it twice")
            entries[entry.name] = entry
        base = -(-self.position // alignment) * alignment
        previous_end, previous = base, ""
        for entry in sorted(entries.values(), key=lambda entry: entry.offset):
            start, end = base + entry.offset, base + entry.offset + entry.nbytes
            if start < previous_end:
                self.fail(f"the tensors {previous!r} and {entry.name!r} overlap")
            if end > self.file.size:
                self.fail(
                    f"the tensor {entry.name!r} ends at byte {end} of {self.file.size}",
                    "it is cut short, download it again",
                )
            previous_end, previous = end, entry.name
            yield entry.name, TensorEntry(entry.name, entry.storage, entry.shape, start, entry.nbytes)

    def tensor_entry(self, alignment: int) -> TensorEntry:
        """One line of the directory; its offset still counts from the start of the tensor data."""
        name = self.string(MAX_NAME)
        dimensions = self.u32()
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.u64() for _ in range(dimensions))[::-1]
        storage = self.storage(name, self.u32())
        offset = self.u64()
        if min(shape) < 1 or math.prod(shape) > self.file.size * 8:
            self.fail(f"the tensor {name!r} has the shape {list(shape)}")
        if storage in BLOCKS and shape[-1] % BLOCKS[storage].elements:
            self.fail(f"the rows of {name!r} have {shape[-1]} values, which {storage} cannot store")
        if offset % alignment:
            self.fail(f"the tensor {name!r} is not aligned to {alignment} bytes")
        nbytes = math.prod(shape[:-1]) * row_bytes(storage, shape[-1])
        return TensorEntry(name, storage, shape, offset, nbytes)

    def storage(self, name: str, number: int) -> str:
        storage = STORAGES.get(number, f"type {number}")
        if storage not in BLOCKS and storage not in DENSE:
            readable = ", ".join([*DENSE, *BLOCKS])
            self.fail(f"the tensor {name!r} is stored as {storage}", f"pick a file of this model in one of {readable}")
        return storage


def alignment(reader: Reader, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value < 8 or value > 1 << 20 or value & (value - 1):
        reader.fail(f"its general.alignment is {str(value)[:40]}, where a power of two from 8 is allowed")
    return value


def open_gguf(path: Path) -> list[GGUFFile]:
    """The file, or all files of a split model in order, whichever of them is named. Raises CheckpointError."""
    shard = SHARD.fullmatch(path.name)
    if shard is None:
        file = GGUFFile(path)
        if file.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{path} is one part of a split model but is not named like one; give it back its name ending in "
                "-00001-of-0000N.gguf, next to the other parts."
            )
        return [file]
    count = int(shard["count"])
    if not 1 <= int(shard["number"]) <= count <= MAX_SHARDS:
        raise CheckpointError(f"{path} is named as part {int(shard['number'])} of {count}, which cannot be.")
    paths = parts(path)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is part of a split model whose parts {', '.join(missing[:4])} are missing beside it."
        )
    files = [GGUFFile(part) for part in paths]
    check_shards(files)
    return files


def parts(path: Path) -> list[Path]:
    """All parts of a split file, by the name of one of them, there or not; itself where it is not split."""
    shard = SHARD.fullmatch(path.name)
    if shard is None:
        return [path]
    count = int(shard["count"])
    return [path.with_name(f"{shard['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def check_shards(files: list[GGUFFile]) -> None:
    """Parts must number themselves as their names do, and share no tensor."""
    seen: dict[str, Path] = {}
    for number, file in enumerate(files):
        given = (file.metadata.get("split.no"), file.metadata.get("split.count"))
        if given != (number, len(files)):
            raise CheckpointError(
                f"{file.path} says it is part {given[0]} of {given[1]} (from 0), its name {number} of {len(files)}. "
                "Its name was changed, or it belongs to another model."
            )
        for name in file.tensors:
            if name in seen:
                raise CheckpointError(
                    f"{file.path} and {seen[name].name} both hold the tensor {name!r}; download them again."
                )
            seen[name] = file.path
