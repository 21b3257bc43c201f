"""Checkpoints that `tenfold quantize` wrote: packed formats as kernels read them, a format of its own for each module.

`formats` of quantization_config names the packed format of every module (`ops/formats.py`); the file holds its tensors
as they are in memory, `<module>.codes`, `.scales` and, where the format has them, `.zeros` and `.order`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tenfold.ops.formats import Format, Packed, format_of
from tenfold.weights.foreign.linear import REAL, Files, Linear, Settings

METHOD = "tenfold"
VERSION = 1
CODES = {torch.int32: "I32", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}


def linears(settings: Settings, files: Files) -> list[Linear]:
    """Every quantised module. Raises CheckpointError for settings and tensors that are not understood."""
    settings.choice("version", (VERSION,))
    formats = settings.raw.get("formats")
    if not isinstance(formats, Mapping):
        settings.refuse("formats", "an object of module names and packed formats")
    for module in files.modules(".codes"):
        if module not in formats:
            files.fail(f"{module} has codes, and quantization_config names no format for it")
    return [linear(module, name, files) for module, name in formats.items()]


def linear(module: str, name: object, files: Files) -> Linear:
    try:
        format = format_of(str(name))
    except ValueError as error:
        files.fail(f"{module} has the format {str(name)[:80]!r}, {str(error)[0].lower()}{str(error)[1:].rstrip('.')}")
    known = format.codes
    stored = CODES[known.dtype]
    rows, words = files.entry(f"{module}.codes", (stored,), (None, None)).shape
    cols = words * known.dtype.itemsize * 8 // known.bits
    if words * known.dtype.itemsize * 8 % known.bits or format.obstacle(cols):
        files.fail(f"{module}.codes has {words} words a row, which are no whole columns of {format.name}")
    scale = files.entry(f"{module}.scales", REAL, (rows, format.groups(cols))).storage
    names = [f"{module}.codes", f"{module}.scales"]
    if format.zero:
        files.entry(f"{module}.zeros", (scale,), (rows, format.groups(cols)))
        names.append(f"{module}.zeros")
    if format.order:
        files.entry(f"{module}.order", ("I32",), (cols,))
        names.append(f"{module}.order")
        if not torch.equal(files.read(f"{module}.order").sort().values, torch.arange(cols, dtype=torch.int32)):
            files.fail(f"{module}.order does not name each of {cols} columns once")

    def make(device: torch.device | str) -> Packed:
        codes, scales, *rest = (files.read(part).to(device) for part in names)
        zeros = rest.pop(0) if format.zero else None
        return Packed(codes, scales, zeros, rest.pop(0) if format.order else None)

    return Linear(module, format, rows, cols, tuple(names), make)


def settings_of(formats: Mapping[str, Format]) -> dict[str, Any]:
    """The quantization_config of modules of these formats."""
    named = {module: format.name for module, format in formats.items()}
    return {"quant_method": METHOD, "version": VERSION, "formats": named}


def tensors(module: str, packed: Packed) -> dict[str, torch.Tensor]:
    """What a file holds of a module."""
    parts = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros, "order": packed.order}
    return {f"{module}.{part}": t.contiguous().cpu() for part, t in parts.items() if t is not None}
