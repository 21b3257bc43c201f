"""AWQ checkpoints in the GEMM layout (AutoAWQ): int4 groups with zeros.

A module holds 8 codes of neighbouring outputs in an int32, whose nibble i is output ORDER[i] of the 8:

    qweight int32 [cols, rows / 8]     qzeros int32 [groups, rows / 8]     scales float [groups, rows]

value = (code - zero) * scale.
"""

import torch
from torch import Tensor

from tenfold.ops.formats import Packed, store_nibbles
from tenfold.weights.foreign.linear import REAL, Files, Linear, Settings, count_groups, fields, packed_format

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACE = tuple(ORDER.index(i) for i in range(8))  # nibble of each output


def linears(settings: Settings, files: Files) -> list[Linear]:
    """Every quantised module. Raises CheckpointError for settings and tensors that are not understood."""
    settings.choice("bits" if "bits" in settings.raw else "w_bit", (4,), 4)
    version = settings.raw.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        settings.refuse("version", "gemm")
    group = settings.group("group_size" if "group_size" in settings.raw else "q_group_size", 128)
    settings.choice("zero_point", (True,), True)
    return [linear(files, module, group) for module in files.modules(".qweight")]


def linear(files: Files, module: str, group: int) -> Linear:
    cols, words = files.entry(f"{module}.qweight", ("I32",), (None, None)).shape
    rows, groups = words * 8, count_groups(cols, group)
    files.entry(f"{module}.scales", REAL, (groups, rows))
    files.entry(f"{module}.qzeros", ("I32",), (groups, words))
    names = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))

    def make(device: torch.device | str) -> Packed:
        words, zeros, scales = (files.read(name).to(device) for name in names)
        return Packed(
            store_nibbles(outputs(words)), scales.t().contiguous(), outputs(zeros).to(scales.dtype).contiguous()
        )

    return Linear(module, packed_format("int4", group, True, files), rows, cols, names, make)


def outputs(words: Tensor) -> Tensor:
    """Words [n, rows / 8] -> codes uint8 [rows, n]."""
    nibbles = fields(words, 4).unflatten(1, (-1, 8))
    return nibbles[:, :, list(PLACE)].flatten(1).t().contiguous()
