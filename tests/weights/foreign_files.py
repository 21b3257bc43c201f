"""Tiny quantised checkpoints in the layouts of other tools, written number by number from their descriptions.

Each writer rounds a dense weight, adds the tensors of its layout to a file, and returns the values that the layout's
formula gives, in float32: what a reader must find again, exactly.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
Writer = Callable[[State, str, Tensor], Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
EXPERTS = re.compile(r"experts?\.(\d+\.)?(gate|up|down)_proj$")
LINEARS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))


def words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] whole numbers, each below 2^bits -> int32 [n, ceil(m * bits / 32)], one after the other from the lowest
    bit on; order: number order[i] of as many is in place i.
    """
    if order is not None:
        numbers = numbers.reshape(len(numbers), -1, len(order))[:, :, order].reshape(len(numbers), -1)
    stream = ((numbers[:, :, None] >> np.arange(bits)) & 1).reshape(len(numbers), -1).astype(np.uint8)
    whole = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(whole, axis=1, bitorder="little").view(np.int32))


def whole_groups(weight: Tensor, group: int) -> tuple[np.ndarray, int]:
    """[rows, groups, columns of a group] float64 and the group size, all columns where it is -1."""
    size = weight.shape[1] if group == -1 else group
    return weight.double().numpy().reshape(weight.shape[0], -1, size), size


def rounded(weight: Tensor, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """Codes 0..2^bits - 1 [rows, cols], scales and zeros [rows, groups]; scales as `dtype` holds them."""
    values, _ = whole_groups(weight, group)
    top = 2**bits - 1
    if symmetric:
        scales = np.abs(values).max(axis=2) * 2 / top
        zeros = np.full(scales.shape, (top + 1) // 2)
    else:
        low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
        scales = (high - low) / top
        zeros = np.clip(np.rint(-low / scales), 1, top)
    scales = torch.from_numpy(scales).to(dtype).double().numpy()
    codes = np.clip(np.rint(values / scales[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(weight.shape).astype(np.int64), scales, zeros.astype(np.int64)


def formula(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> Tensor:
    """(code - zero) * scale in float32; groups: the group of each column."""
    difference = (codes - zeros[:, groups]).astype(np.float32)
    return torch.from_numpy(difference * scales[:, groups].astype(np.float32)).contiguous()


def gptq(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    shuffle: bool = False,
    index: bool = True,
) -> Writer:
    """shuffle: desc_act, where columns that matter most were rounded first and share their groups."""

    def write(state: State, module: str, weight: Tensor) -> Tensor:
        cols = weight.shape[1]
        size = cols if group == -1 else group
        # Projections that read the same input were ordered by the same statistics.
        permutation = np.random.default_rng(cols).permutation(cols) if shuffle else np.arange(cols)
        codes, scales, zeros = rounded(weight[:, permutation], group, bits, symmetric, torch.float16)
        back = np.argsort(permutation)
        codes, groups = codes[:, back], (np.arange(cols) // size)[back]
        stored = zeros.T - (1 if version == 1 else 0)
        state[f"{module}.qweight"] = words_down(codes.T, bits)
        state[f"{module}.qzeros"] = words(stored, bits)
        state[f"{module}.scales"] = torch.from_numpy(scales.T.copy()).half()
        if index:
            state[f"{module}.g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return formula(codes, scales, zeros, groups)

    return write


def words_down(numbers: np.ndarray, bits: int) -> Tensor:
    """Packed along the first dimension: [m, n] -> int32 [m * bits / 32, n]."""
    return words(numbers.T, bits).T.contiguous()


def awq(group: int = 32) -> Writer:
    def write(state: State, module: str, weight: Tensor) -> Tensor:
        codes, scales, zeros = rounded(weight, group, 4, False, torch.float16)
        state[f"{module}.qweight"] = words(codes.T, 4, AWQ_ORDER)
        state[f"{module}.qzeros"] = words(zeros.T, 4, AWQ_ORDER)
        state[f"{module}.scales"] = torch.from_numpy(scales.T.copy()).half()
        return formula(codes, scales, zeros, np.arange(weight.shape[1]) // group)

    return write


def packed(bits: int = 4, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Writer:
    """compressed-tensors, pack-quantized; group -1: by channel."""

    def write(state: State, module: str, weight: Tensor) -> Tensor:
        size = weight.shape[1] if group == -1 else group
        codes, scales, zeros = rounded(weight, group, bits, symmetric, dtype)
        state[f"{module}.weight_packed"] = words(codes, bits)
        state[f"{module}.weight_scale"] = torch.from_numpy(scales).to(dtype)
        state[f"{module}.weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            state[f"{module}.weight_zero_point"] = words_down(zeros, bits)
        return formula(codes, scales, zeros, np.arange(weight.shape[1]) // size)

    return write


def plain_int(bits: int = 8, group: int = -1, symmetric: bool = True) -> Writer:
    """compressed-tensors, int-quantized: signed codes, a byte each."""

    def write(state: State, module: str, weight: Tensor) -> Tensor:
        size = weight.shape[1] if group == -1 else group
        codes, scales, zeros = rounded(weight, group, bits, symmetric, torch.float32)
        middle = 1 << (bits - 1)
        state[f"{module}.weight"] = torch.from_numpy(codes - middle).to(torch.int8)
        state[f"{module}.weight_scale"] = torch.from_numpy(scales).float()
        if not symmetric:
            state[f"{module}.weight_zero_point"] = torch.from_numpy(zeros - middle).to(torch.int8)
        return formula(codes, scales, zeros, np.arange(weight.shape[1]) // size)

    return write


def fp8(by: str, scale: str = "weight_scale", dtype: torch.dtype = torch.float32) -> Writer:
    """Float8 e4m3 with scales by "tensor", "channel" or "block" (32 x 32 here, 128 x 128 in the wild)."""

    def write(state: State, module: str, weight: Tensor) -> Tensor:
        rows, cols = weight.shape
        height, width = {"tensor": (rows, cols), "channel": (1, cols), "block": (32, 32)}[by]
        tiles = weight.abs().reshape(rows // height, height, cols // width, width)
        scales = (tiles.amax(dim=(1, 3)) / 448).to(dtype)
        every = scales.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
        codes = (weight / every).clamp(-448, 448).to(torch.float8_e4m3fn)
        state[f"{module}.weight"] = codes
        state[f"{module}.{scale}"] = scales.reshape(1) if by == "tensor" else scales
        return codes.float() * every

    return write


def quantise(source: Path, folder: Path, settings: dict[str, Any], write: Writer, **more: Any) -> dict[str, Tensor]:
    """A copy of a dense checkpoint with the linears of its blocks quantised; returns the dense values of all tensors.

    more: writer of a linear by the end of its name, e.g. down_proj=..., or None to leave it dense.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    dense = load_file(source / "model.safetensors")
    state: State = {}
    values: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        writer = next((w for end, w in more.items() if module.endswith(end)), write)
        linear = module.endswith(LINEARS) or EXPERTS.search(module)
        if name.endswith(".weight") and linear and writer is not None:
            values[name] = writer(state, module, tensor.float())
        else:
            state[name] = values[name] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """The quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
    }
