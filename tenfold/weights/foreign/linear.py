"""What every method of quantisation gives (`Linear`), what it reads from (`Files`), and the checks they share.

Invariant: storages, shapes and settings are checked when a checkpoint is opened, before any weight is read, and codes,
scales and zeros are carried over without losing a bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tenfold.ops.formats import CODES, Format, Packed, is_format
from tenfold.ops.matrix import Deferred
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.safetensors import TensorEntry

REAL = ("F32", "F16", "BF16")
WHOLE = {2: 16, 3: 32, 4: 8, 8: 1}  # columns that whole words of our formats hold, by the bits of a code


@dataclass(frozen=True, slots=True)
class Files:
    """The tensors of a checkpoint under the text model's names. read(name) is the tensor, not copied; stored(name) is
    what the file calls it.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    read: Callable[[str], Tensor]
    stored: Callable[[str], str]

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {problem}. Download it again, or use the original weights or a GGUF file of this model."
        )

    def modules(self, ending: str) -> list[str]:
        """Modules that have a tensor of this ending, such as ".qweight"."""
        return [name.removesuffix(ending) for name in self.entries if name.endswith(ending)]

    def stored_module(self, module: str, ending: str) -> str:
        """What the file, and with it other tools' settings, call a module that has a tensor of this ending."""
        return self.stored(module + ending).removesuffix(ending)

    def entry(self, name: str, storages: tuple[str, ...], shape: tuple[int | None, ...] | None = None) -> TensorEntry:
        """A tensor's entry; shape: what it must be, None for any size. Raises CheckpointError."""
        if name not in self.entries:
            self.fail(f"the tensor {name} is missing, without which the weights beside it have no meaning")
        entry = self.entries[name]
        if entry.storage not in storages:
            self.fail(f"the tensor {name} is stored as {entry.storage}; expected {' or '.join(storages)}")
        sizes = entry.shape
        if shape is not None and (len(sizes) != len(shape) or any(w not in (None, n) for w, n in zip(shape, sizes))):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            self.fail(f"the tensor {name} has shape {list(sizes)}; expected [{wanted}]")
        return entry

    def has(self, *names: str) -> bool:
        return all(name in self.entries for name in names)


@dataclass(frozen=True, slots=True)
class Linear:
    """One quantised weight: the module whose `.weight` it is, the tensors that hold it, and how to make it.

    make(device) gives the tensors of `format`; where its columns do not fit the format the weight is made dense.
    """

    module: str
    format: Format
    rows: int
    cols: int
    tensors: tuple[str, ...]
    make: Callable[[torch.device | str], Packed]

    @property
    def storage(self) -> str:
        """The packed format, or F32 where the columns do not fit it."""
        return "F32" if self.format.obstacle(self.cols) else self.format.name

    def raw(self) -> Deferred:
        return Deferred(f"{self.module}.weight", self.storage, (self.rows, self.cols), self._tensors)

    def _tensors(self, device: torch.device | str) -> tuple[Tensor, ...]:
        packed = self.make(device)
        if is_format(self.storage):
            return packed.tensors()
        return (self.format.unpack(packed),)


@dataclass(frozen=True, slots=True)
class Settings:
    """An object of quantization_config, read key by key with checks. method: its name for people."""

    method: str
    source: Path
    raw: Mapping[str, Any]

    def refuse(self, key: str, allowed: str) -> NoReturn:
        raise CheckpointError(
            f"{self.source}: {key} is {str(self.raw.get(key))[:80]!r} in the quantization_config of {self.method}; "
            f"supported: {allowed}. Use the original weights or a GGUF file of this model."
        )

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.raw.get(key, default)
        value = default if value is None else value
        # True is 1 to Python, and not to the author of a config.
        if not any(value == option and type(value) is type(option) for option in allowed):
            self.refuse(key, ", ".join(str(option) for option in allowed))
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.choice(key, (True, False), default))

    def group(self, key: str, default: int | None = None) -> int:
        """A group size; -1 or nothing, for whole rows, becomes 0."""
        value = self.raw.get(key, default)
        if value is None or value == -1:
            return 0
        if type(value) is not int or not 1 <= value <= 1 << 16:
            self.refuse(key, "-1 or a whole number of columns")
        return value

    def names(self, key: str) -> list[str]:
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(key, "a list of module names")
        return value


def packed_format(
    kind: str, group: int, zero: bool, files: Files, order: bool = False, activations: int = 16
) -> Format:
    """The format of these parts. Raises CheckpointError for a group that no format has."""
    try:
        return Format(kind, group, zero, order, activations)
    except ValueError as error:
        files.fail(f"its weights cannot be read, {str(error)[0].lower()}{str(error)[1:].rstrip('.')}")


def fields(words: Tensor, bits: int) -> Tensor:
    """Fields of 2, 3, 4 or 8 bits of int32 words, lowest first; those of 3 bits run on from word to word.

    [n, m] -> uint8 [n, m * 32 / bits], rounded up for 3 bits.
    """
    flat = words.contiguous().view(torch.uint8)
    if bits == 8:
        return flat
    if bits == 3:
        low, middle, high = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 3)).int().unflatten(1, (-1, 3)).unbind(2)
        flat, count = low | (middle << 8) | (high << 16), 8
    else:
        count = 8 // bits
    return torch.stack([(flat >> bits * i) & ((1 << bits) - 1) for i in range(count)], dim=-1).flatten(1).byte()


def stream(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `fields`: uint8 [n, m] -> int32 [n, m * bits / 32]; m is a multiple of 32."""
    count, wide = (8, 3) if bits == 3 else (8 // bits, 1)
    shifts = bits * torch.arange(count, dtype=torch.int32, device=codes.device)
    joined = (codes.int().unflatten(1, (-1, count)) << shifts).sum(dim=2, dtype=torch.int32)
    return joined.view(torch.uint8).unflatten(1, (-1, 4))[..., :wide].flatten(1).contiguous().view(torch.int32)


def stored(codes: Tensor, bits: int) -> Tensor:
    """Codes counted from 0, uint8 [rows, cols], in the layout of our format of so many bits."""
    return signed(codes.contiguous()) if bits == 8 else CODES[f"int{bits}"].store(codes)


def check_cols(files: Files, module: str, cols: int, bits: int) -> None:
    """Raises CheckpointError for rows that do not end with a word."""
    if cols % WHOLE[bits]:
        files.fail(f"{module} has {cols} columns of {bits} bits; supported: multiples of {WHOLE[bits]}")


def signed(codes: Tensor) -> Tensor:
    """Codes 0..255 less 128, as int8."""
    return (codes ^ 128).view(torch.int8)


def count_groups(cols: int, group: int) -> int:
    return -(-cols // group) if group else 1
