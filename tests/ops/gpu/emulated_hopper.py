"""Kernels that feed wgmma through the tensor copy engine as plain C++: emulated_hopper.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tests.ops.gpu.emulated import Emulated
from tests.ops.gpu.emulated_copies import CODES, CopyEmulator

MAP = "struct __align__(64) Map { u64 bytes[16]; };"


class Map(ctypes.Structure):
    """As in emulated_hopper.h."""

    _fields_ = [
        ("data", ctypes.c_ulonglong),
        ("sizes", ctypes.c_ulonglong * 4),
        ("strides", ctypes.c_ulonglong * 4),
        *((name, ctypes.c_ulonglong) for name in ("height", "width", "each")),
    ]


@dataclass(frozen=True)
class Boxes:
    """Stands in for `nvrtc.tensor_map`: boxes of so many rows, and bytes of one."""

    matrices: Tensor
    height: int
    width: int = 128

    def map(self) -> Map:
        m, each = self.matrices, self.matrices.itemsize
        strides = [stride * each for stride in reversed(m.stride())]
        assert strides[0] == each
        assert not any(stride % 16 for stride in strides[1:])
        assert self.height <= 256
        quads = ctypes.c_ulonglong * 4
        return Map(m.data_ptr(), quads(*reversed(m.shape)), quads(*strides), self.height, self.width, each)


class EmulatedHopper(Emulated):
    def value(self, one: object) -> object:
        return one.map() if isinstance(one, Boxes) else super().value(one)


class HopperEmulator(CopyEmulator):
    """Stands in for `nvrtc.load`. together: blocks that run at the same time, where they are no cluster."""

    headers = (*CopyEmulator.headers, CODES, Path(__file__).parent / "emulated_hopper.h")
    start = "launch_hopper(grid_x, grid_y, grid_z, block_threads, dynamic, TOGETHER);"

    def __init__(self, folder: Path, seed: int = 0, together: int = 1) -> None:
        super().__init__(folder, seed)
        self.together = together

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        together = ("TOGETHER", max(self.together, dict(defines).get("CLUSTER", 1)))
        return EmulatedHopper(self.built(source, entry, [*defines, together]))

    def code(self, source: str) -> str:
        return super().code(source).replace(MAP, "")
