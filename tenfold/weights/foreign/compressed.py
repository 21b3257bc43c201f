"""compressed-tensors checkpoints (llm-compressor, Neural Magic, Red Hat AI): linears of 2 to 8 bits and of float8 e4m3.

`config_groups` say how the modules they target, by their names in the file, are stored; a module holds, for `cols`
inputs and `rows` outputs,

    pack-quantized   weight_packed int32 [rows, cols * bits / 32], codes counted from 0, lowest bits first, one after
                     the other without gaps
                     weight_zero_point int32 [rows * bits / 32, groups], packed along the rows, where not symmetric
                     weight_g_idx int32 [cols], the group of each column, with actorder "group"
    the others       weight int8 or float8_e4m3fn [rows, cols]; weight_zero_point int8 like the scales
    all              weight_scale: one for the tensor, [rows, 1], [rows, groups] or one for each block of the matrix

value = (code - zero) * scale. Formats are named by each group, or for all of them. Activations: weights of float8, and
of 4 bits without zeros, with float8 activations keep the permission to round activations to e4m3, a scale a token;
scales of activations that were fixed when the checkpoint was made, and int8 activations, are left out, as 16-bit
activations are the more exact.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.formats import CODES, Format, Packed
from tenfold.weights.foreign.fp8 import block_scales, row_scales
from tenfold.weights.foreign.gptq import column_order, gptq_codes
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
    stream,
)

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
FLOAT8 = "float-quantized"
PLAIN = ("naive-quantized", "int-quantized", FLOAT8)
MIXED = "mixed-precision"
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups. block: rows and columns of a scale of strategy "block"."""

    targets: tuple[str, ...]
    format: str
    kind: str
    strategy: str
    size: int
    block: tuple[int, int]
    symmetric: bool
    activations: int


def linears(settings: Settings, files: Files) -> list[Linear]:
    """Every quantised module. Raises CheckpointError for settings and tensors that are not understood."""
    if settings.raw.get("sparsity_config") and settings.raw["sparsity_config"].get("format", "dense") != "dense":
        settings.refuse("sparsity_config", "none; weights that are sparse as well")
    if settings.raw.get("transform_config"):
        settings.refuse("transform_config", "none; rotations of activations")
    settings.choice("quantization_status", ("compressed",), "compressed")
    groups = read_groups(settings)
    named = {target: group for group in reversed(groups) for target in group.targets}
    ignored = settings.names("ignore")
    ignored_names, ignored_patterns = set(ignored), [name for name in ignored if name.startswith("re:")]
    found = []
    for ending, read in ((".weight_packed", packed_linear), (".weight_scale", plain_linear)):
        for module in files.modules(ending):
            if ending == ".weight_scale" and files.has(f"{module}.weight_packed"):
                continue
            stored = files.stored_module(module, ending)
            if stored in ignored_names or any(matches(name, stored, settings) for name in ignored_patterns):
                files.fail(f"{stored} is quantised and in the list of what is not, `ignore`")
            found.append(read(named.get(stored) or group_of(stored, groups, settings, files), files, module))
    return found


def read_groups(settings: Settings) -> list[Group]:
    raw = settings.raw.get("config_groups")
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(group, Mapping) for group in raw.values()):
        settings.refuse("config_groups", "objects that describe how modules are stored")
    return [read_group(name, group, settings) for name, group in raw.items()]


def read_group(name: str, raw: Mapping[str, Any], settings: Settings) -> Group:
    inner = replace(settings, method=f"{settings.method}, {name}", raw=raw)
    weights, acts = raw.get("weights"), raw.get("input_activations")
    if not isinstance(weights, Mapping) or not (acts is None or isinstance(acts, Mapping)):
        inner.refuse("weights", "an object with num_bits, type and strategy")
    outer = settings.raw.get("format")
    form = raw.get("format") or (outer if outer != MIXED else None)
    if form not in (PACKED, *PLAIN):
        replace(inner, raw={"format": form}).refuse("format", ", ".join((PACKED, *PLAIN)))
    read = replace(inner, raw=weights)
    kind = read_kind(read)
    if kind == "fp8" and form == PACKED:
        read.refuse("type", f"int in {PACKED}")
    size = read.group("group_size")
    unnamed = "group" if size else "channel" if weights.get("group_size") == -1 else "tensor"
    strategy = read.choice("strategy", STRATEGIES, unnamed)
    block = weights.get("block_structure")
    if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        read.refuse("block_structure", "two whole numbers")
    symmetric = read.flag("symmetric", True)
    eights = acts is not None and (acts.get("num_bits"), acts.get("type")) == (8, "float")
    eights &= kind == "fp8" or (kind == "int4" and symmetric)  # that kernels multiply by float8
    return Group(
        targets=tuple(inner.names("targets")),
        format=str(form),
        kind=kind,
        strategy=strategy,
        size=size if strategy == "group" else 0,
        block=(block[0], block[1]) if strategy == "block" and block else (0, 0),
        symmetric=symmetric,
        activations=8 if eights else 16,
    )


def read_kind(weights: Settings) -> str:
    kind = weights.choice("type", ("int", "float"), "int")
    bits = weights.choice("num_bits", (2, 3, 4, 8) if kind == "int" else (8,), 8)
    return "fp8" if kind == "float" else f"int{bits}"


def group_of(stored: str, groups: list[Group], settings: Settings, files: Files) -> Group:
    """The group that targets a module which none names: by pattern first, then by its class, Linear. stored: the name
    in the file.
    """
    if len(groups) == 1:
        return groups[0]
    for group in groups:
        if any(t.startswith("re:") and matches(t, stored, settings) for t in group.targets):
            return group
    for group in groups:
        if "Linear" in group.targets:
            return group
    files.fail(f"{stored} is quantised and no group of config_groups targets it")


def matches(target: str, stored: str, settings: Settings) -> bool:
    """Whether a target or an entry of `ignore` means a module: its name in the file, or a pattern after "re:"."""
    if not target.startswith("re:"):
        return target == stored
    try:
        return re.match(target.removeprefix("re:"), stored) is not None
    except re.error:
        settings.refuse("config_groups", "targets with valid regular expressions")


def packed_linear(group: Group, files: Files, module: str) -> Linear:
    if group.format != PACKED or group.strategy not in ("channel", "group", "tensor"):
        files.fail(f"{module} has packed weights, and its group describes {group.format} by {group.strategy}")
    bits = CODES[group.kind].bits
    files.entry(f"{module}.weight_shape", ("I64", "I32"), (2,))
    rows, words = files.entry(f"{module}.weight_packed", ("I32",), (None, None)).shape
    cols = int(files.read(f"{module}.weight_shape")[1])
    if words != -(-cols * bits // 32):
        files.fail(f"{module}.weight_packed has {words} words a row, too few or many for {cols} columns")
    check_cols(files, module, cols, bits)
    count = count_groups(cols, group.size)
    names = [f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_shape"]
    check_scale(group, files, module, rows, cols)
    if not group.symmetric:
        if group.strategy == "tensor":
            files.fail(f"{module} has one zero for the whole tensor, which is not known in {PACKED}")
        files.entry(f"{module}.weight_zero_point", ("I32",), (-(-rows * bits // 32), count))
        names.append(f"{module}.weight_zero_point")
    order = None
    if files.has(f"{module}.weight_g_idx"):
        files.entry(f"{module}.weight_g_idx", ("I32",), (cols,))
        order = column_order(files.read(f"{module}.weight_g_idx"), group.size, files, module)
        names.append(f"{module}.weight_g_idx")
    format = packed_format(group.kind, group.size, not group.symmetric, files, order is not None, group.activations)

    def make(device: torch.device | str) -> Packed:
        words, scales = (files.read(name).to(device) for name in names[:2])
        columns = None if order is None else order.to(device)
        scales = row_scales(scales, rows)
        zeros = None
        if not group.symmetric:
            stored = files.read(f"{module}.weight_zero_point").to(device)
            codes = fields(stored.t(), bits)[:, :rows].t().contiguous()
            zeros = (signed(codes) if bits == 8 else codes).to(scales.dtype)
        return Packed(gptq_codes(words, bits, columns, cols), scales, zeros, columns)

    return Linear(module, format, rows, cols, tuple(names), make)


def plain_linear(group: Group, files: Files, module: str) -> Linear:
    storage = "F8_E4M3" if group.kind == "fp8" else "I8"
    rows, cols = files.entry(f"{module}.weight", (storage,), (None, None)).shape
    names = [f"{module}.weight", f"{module}.weight_scale"]
    check_scale(group, files, module, rows, cols)
    if f"{module}.weight_zero_point" in files.entries:
        names.append(f"{module}.weight_zero_point")
    if not group.symmetric:
        if group.kind == "fp8" or group.strategy == "block":
            files.fail(f"{module} has zeros, which are not known for {group.kind} by {group.strategy}")
        files.entry(f"{module}.weight_zero_point", ("I8",), files.entries[f"{module}.weight_scale"].shape)
    format = plain_format(group, files)
    if group.kind != "fp8":
        check_cols(files, module, cols, format.bits)

    def make(device: torch.device | str) -> Packed:
        codes, scales = (files.read(name).to(device) for name in names[:2])
        scales = block_scales(scales, rows, group.block[0]) if group.strategy == "block" else row_scales(scales, rows)
        if group.kind == "fp8":
            return Packed(codes, scales.float())
        zeros = None
        if not group.symmetric:
            zeros = row_scales(files.read(f"{module}.weight_zero_point").to(device), rows).to(torch.int16)
            zeros = (zeros + format.codes.middle).to(scales.dtype)
        return Packed(format.codes.store(codes + format.codes.middle), scales, zeros)

    return Linear(module, format, rows, cols, tuple(names), make)


def plain_format(group: Group, files: Files) -> Format:
    size = group.block[1] if group.strategy == "block" else group.size
    return packed_format(group.kind, size, not group.symmetric, files, activations=group.activations)


def tensors(module: str, format: Format, packed: Packed) -> dict[str, Tensor]:
    """What a file holds of a module, of a format without zeros and order: pack-quantized, or float8 as it lies."""
    if format.kind == "fp8":
        return {f"{module}.weight": packed.codes.contiguous(), f"{module}.weight_scale": packed.scales.contiguous()}
    codes = format.codes.load(packed.codes)
    counted = (codes.int() - format.codes.lowest).to(torch.uint8)
    return {
        f"{module}.weight_packed": stream(counted, format.bits),
        f"{module}.weight_scale": packed.scales.contiguous(),
        f"{module}.weight_shape": torch.tensor(codes.shape),
    }


def settings_of(formats: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
    """The quantization_config of modules of these formats, by their names in the file; ignored: linears that are none
    of them.
    """
    targets: dict[Format, list[str]] = {}
    for module, format in formats.items():
        targets.setdefault(format, []).append(module)
    groups = {}
    for i, (format, modules) in enumerate(sorted(targets.items(), key=lambda item: item[0].name)):
        strategy = {"strategy": "group", "group_size": format.group} if format.group else {"strategy": "channel"}
        kind = "float" if format.kind == "fp8" else "int"
        weights = {"num_bits": format.bits, "type": kind, "symmetric": True, "dynamic": False, **strategy}
        eight = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
        acts = eight if format.activations == 8 else None
        form = FLOAT8 if format.kind == "fp8" else PACKED
        groups[f"group_{i}"] = {"targets": modules, "format": form, "weights": weights, "input_activations": acts}
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": MIXED if len(forms) > 1 else forms.pop(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
    }


def check_scale(group: Group, files: Files, module: str, rows: int, cols: int) -> None:
    name = f"{module}.weight_scale"
    found = files.entry(name, REAL).shape
    block_rows, block_cols = group.block
    shapes_of: dict[str, list[tuple[int, ...]]] = {
        "tensor": [(), (1,), (1, 1)],
        "channel": [(rows, 1), (rows,)],
        "group": [(rows, count_groups(cols, group.size))],
        "block": [(count_groups(rows, block_rows), count_groups(cols, block_cols))],
    }
    wanted = shapes_of[group.strategy]
    if found not in wanted:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        files.fail(f"the tensor {name} has shape {list(found)}; expected {shapes}, by {group.strategy}")
