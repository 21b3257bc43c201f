"""GPTQ checkpoints (AutoGPTQ, GPTQModel): groups of 2, 3, 4 or 8 bits, with or without columns ordered by activation.

A module holds, for `cols` inputs and `rows` outputs, codes in words of int32, lowest bits first and, where they have
three bits, from one word on into the next:

    qweight int32 [cols * bits / 32, rows]     qzeros int32 [groups, rows * bits / 32]
    scales  float [groups, rows]               g_idx  int32 [cols], the group of each column

value = (code - zero) * scale. The first version of the file format stores zeros less one, within their bits, and
`gptq_v2` as they are. Where g_idx is not c // group (desc_act), columns are stored sorted by group and the format gets
an order, so nothing is recomputed; a g_idx whose groups have other sizes is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tenfold.ops.formats import Packed, interleave
from tenfold.weights.foreign.linear import (
    REAL,
    Files,
    Linear,
    Settings,
    check_cols,
    count_groups,
    fields,
    packed_format,
    signed,
    stored,
)

BITS = (2, 3, 4, 8)


def linears(settings: Settings, files: Files) -> list[Linear]:
    """Every quantised module. Raises CheckpointError for settings and tensors that are not understood."""
    if settings.raw.get("is_marlin_format"):
        settings.refuse("is_marlin_format", "false (the plain layout)")
    return [
        linear(module_settings(settings, files.stored_module(module, ".qweight")), files, module)
        for module in files.modules(".qweight")
    ]


def module_settings(settings: Settings, stored: str) -> Settings:
    """The settings of one module, by its name in the file: `dynamic` may hold others for names that match a pattern."""
    dynamic = settings.raw.get("dynamic")
    if not isinstance(dynamic, Mapping):
        return settings
    for pattern, changes in dynamic.items():
        if not isinstance(pattern, str) or not isinstance(changes, Mapping) or pattern.startswith("-:"):
            continue
        if matches(pattern.removeprefix("+:"), stored, settings):
            return replace(settings, raw={**settings.raw, **changes})
    return settings


def matches(pattern: str, module: str, settings: Settings) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        settings.refuse("dynamic", "regular expressions of module names")


def linear(settings: Settings, files: Files, module: str) -> Linear:
    bits = settings.choice("bits", BITS)
    group, symmetric = settings.group("group_size", 128), settings.flag("sym", True)
    version = settings.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    words, rows = files.entry(f"{module}.qweight", ("I32",), (None, None)).shape
    cols = words * 32 // bits
    check_cols(files, module, cols, bits)
    groups = count_groups(cols, group)
    files.entry(f"{module}.scales", REAL, (groups, rows))
    files.entry(f"{module}.qzeros", ("I32",), (groups, -(-rows * bits // 32)))
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    order = None
    if files.has(f"{module}.g_idx"):
        files.entry(f"{module}.g_idx", ("I32",), (cols,))
        names.append(f"{module}.g_idx")
        order = column_order(files.read(f"{module}.g_idx"), group, files, module)
    format = packed_format(f"int{bits}", group, not symmetric, files, order is not None)

    def make(device: torch.device | str) -> Packed:
        words, zeros, scales = (files.read(name).to(device) for name in names[:3])
        points = fields(zeros, bits)[:, :rows].t()
        if version == "gptq":
            points = (points + 1) & ((1 << bits) - 1)
        if symmetric and not bool((points == 1 << (bits - 1)).all()):
            files.fail(f"{module} is said to be symmetric and has zeros other than {1 << (bits - 1)}")
        columns = None if order is None else order.to(device)
        shifted = signed(points.contiguous()) if bits == 8 else points
        return Packed(
            gptq_codes(words.t(), bits, columns, cols),
            scales.t().contiguous(),
            None if symmetric else shifted.to(scales.dtype).contiguous(),
            columns,
        )

    return Linear(module, format, rows, cols, tuple(names), make)


def gptq_codes(words: Tensor, bits: int, order: Tensor | None, cols: int) -> Tensor:
    """Words [rows, words of a row] in the layout of our formats."""
    if order is None and bits == 4:
        return interleave(words.contiguous())
    codes = fields(words, bits)[:, :cols]
    return stored(codes if order is None else codes.index_select(1, order), bits)


def column_order(groups: Tensor, group: int, files: Files, module: str) -> Tensor | None:
    """Columns sorted by group, int32; None where they are sorted already. Raises CheckpointError."""
    cols = len(groups)
    expected = torch.arange(cols, dtype=torch.int32) // (group or cols)
    if torch.equal(groups, expected):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], expected):
        files.fail(f"{module}.g_idx does not give {group or cols} columns to every group, in the way of desc_act")
    return order.to(torch.int32)
