"""Kernels that feed wgmma through the tensor copy engine as plain C++: emulated_hopper.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tests.ops.gpu.emulated import Emulated
from tests.ops.gpu.emulated_copies import CODES, CopyEmulator, EmulatedClusters

CLUSTERS = 2  # that a device runs at the same time
BOX = r"\[(.+)\], \[(.+), \{(.+)\}\], \[(.+)\]"
MAP = "struct __align__(64) Map { u64 bytes[16]; };"


class Map(ctypes.Structure):
    """As in emulated_hopper.h."""

    _fields_ = [
        ("data", ctypes.c_ulonglong),
        *((name, ctypes.c_ulonglong * 5) for name in ("sizes", "strides", "box")),
        ("each", ctypes.c_ulonglong),
    ]


@dataclass(frozen=True)
class Boxes:
    """Stands in for `nvrtc.tensor_map`."""

    matrices: Tensor
    height: int | tuple[int, ...]
    width: int = 128

    def map(self) -> Map:
        m, each = self.matrices, self.matrices.itemsize
        strides = [stride * each for stride in reversed(m.stride())]
        assert strides[0] == each
        assert not any(stride % 16 for stride in strides[1:])
        sides = (self.height,) if isinstance(self.height, int) else self.height
        assert max(sides) <= 256
        box = [self.width // each, *reversed(sides)]
        five = ctypes.c_ulonglong * 5
        return Map(m.data_ptr(), five(*reversed(m.shape)), five(*strides), five(*box, *[1] * (5 - len(box))), each)


class EmulatedHopper(EmulatedClusters):
    def value(self, one: object) -> object:
        return one.map() if isinstance(one, Boxes) else super().value(one)


class HopperEmulator(CopyEmulator):
    """Stands in for `nvrtc.load`. together: blocks that run at the same time, where they are no cluster."""

    headers = (*CopyEmulator.headers, CODES, Path(__file__).parent / "emulated_hopper.h")
    instructions = CopyEmulator.instructions | {
        rf"cp\.async\.bulk\.tensor\S*multicast\S* {BOX}, (.+), .+": r"fetch_box(\1, \2, {\3}, \4, \5)",
        rf"cp\.async\.bulk\.tensor(?!\S*multicast)\S* {BOX}(?:, .+)?": r"fetch_box(\1, \2, {\3}, \4)",
    }
    start = "launch_hopper(grid_x, grid_y, grid_z, block_threads, dynamic, TOGETHER);"

    def __init__(self, folder: Path, seed: int = 0, together: int = 1) -> None:
        super().__init__(folder, seed)
        self.together = together

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        together = ("TOGETHER", max(self.together, dict(defines).get("CLUSTER", 1)))
        return EmulatedHopper(self.built(source, entry, [*defines, together]), CLUSTERS)

    def code(self, source: str) -> str:
        return super().code(source).replace(MAP, "")
