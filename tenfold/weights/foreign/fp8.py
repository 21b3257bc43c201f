"""Checkpoints whose weights are float8 e4m3 as they lie (DeepSeek, Qwen, transformers' fp8; AutoFP8; fbgemm).

    weight float8_e4m3fn [rows, cols]
    weight_scale_inv [rows / 128, cols / 128] float32, bfloat16 or float8_e8m0: value = weight * scale of its block
    or weight_scale: one for the tensor, or [rows, 1]: value = weight * scale

A block's scale is repeated for each of its rows, which makes it a group scale of the block's columns.
"""

import torch
from torch import Tensor

from tenfold.ops.formats import Packed
from tenfold.weights.foreign.linear import REAL, Files, Linear, Settings, count_groups, packed_format

SCALES = (*REAL, "F8_E8M0")


def linears(settings: Settings, files: Files) -> list[Linear]:
    """Every quantised module. Raises CheckpointError for settings and tensors that are not understood."""
    settings.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = settings.raw.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        settings.refuse("weight_block_size", "two whole numbers, or none")
    found = []
    for name, entry in files.entries.items():
        if name.endswith(".weight") and entry.storage.startswith("F8_"):
            found.append(linear(files, name.removesuffix(".weight"), block))
    return found


def linear(files: Files, module: str, block: list[int] | None) -> Linear:
    weight = f"{module}.weight"
    rows, cols = files.entry(weight, ("F8_E4M3",), (None, None)).shape
    in_blocks = files.has(f"{weight}_scale_inv") or not files.has(f"{weight}_scale")
    scale = f"{weight}_scale_inv" if in_blocks else f"{weight}_scale"
    height, width = scale_block(files.entry(scale, SCALES).shape, block, rows, cols)
    if not height:
        files.fail(
            f"the tensor {scale} has shape {list(files.entries[scale].shape)}, which fits neither the blocks of "
            f"weight_block_size {block} of a weight {rows} x {cols} nor its rows"
        )
    format = packed_format("fp8", width, False, files, activations=8)

    def make(device: torch.device | str) -> Packed:
        codes, scales = (files.read(name).to(device) for name in (weight, scale))
        return Packed(codes, block_scales(scales.float(), rows, height))

    return Linear(module, format, rows, cols, (weight, scale), make)


def scale_block(shape: tuple[int, ...], block: list[int] | None, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns that share a scale, columns 0 for whole rows; (0, 0) where the shape fits nothing."""
    if block is not None and shape == (count_groups(rows, block[0]), count_groups(cols, block[1])):
        return block[0], block[1]
    if shape in ((), (1,), (1, 1)):
        return rows, 0
    return (1, 0) if shape in ((rows,), (rows, 1)) else (0, 0)


def row_scales(scales: Tensor, rows: int) -> Tensor:
    """Scales of a tensor, of rows or of groups of a row -> [rows, groups]."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows, 1).contiguous()
    return scales.reshape(rows, -1).contiguous()


def block_scales(scales: Tensor, rows: int, height: int) -> Tensor:
    """Scales of blocks of `height` rows -> [rows, groups]."""
    table = scales.reshape(count_groups(rows, height), -1)
    return table.repeat_interleave(height, dim=0)[:rows].contiguous()
