"""Files as bytes that no reader can step out of: memory-mapped checkpoints and small text files with a size limit."""

import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.weights.checkpoint import CheckpointError

# Reserve no swap for the private mapping: it is never written to, and reserving would refuse files larger than memory.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A whole file in memory, read on demand by the operating system; never written back.

    buffer: the bytes. data: the same bytes as a uint8 tensor, whose views keep the mapping alive. The mapping is
    private and writable because torch has no read-only tensors. Raises CheckpointError when the file cannot be opened
    or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError(f"{path} is empty; download it again.")
                self.buffer = map_private(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
        self.data = torch.frombuffer(self.buffer, dtype=torch.uint8)

    def slice(self, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """Bytes [offset, offset + nbytes) as a flat tensor: a view, or a copy where offset is not aligned for dtype."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} ends before byte {offset + nbytes}; it is cut short, download it again."
            )
        part = self.data[offset : offset + nbytes]
        return (part if offset % dtype.itemsize == 0 else part.clone()).view(dtype)


def map_private(descriptor: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | NORESERVE, prot=protection)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def read_text(path: Path, limit: int) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise CheckpointError(f"{path} is larger than {limit} bytes, which no real file of its kind is; not read.")
        return content.decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text; it is damaged, download it again.") from error


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming `source` for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not valid JSON ({str(error)[:100]}); it is damaged, download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds a JSON {type(value).__name__} where an object is needed; it is damaged.")
    return value


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """A file that holds one JSON object of at most `limit` bytes. Raises CheckpointError."""
    return parse_object(read_text(path, limit), str(path))
