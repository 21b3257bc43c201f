"""csrc/ring.cu as plain C++: emulated_ring.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tenfold.ops.gpu import nvrtc
from tests.ops.gpu.emulated import Emulated
from tests.ops.gpu.emulated_copies import CopyEmulator, without_assembler


class Map(ctypes.Structure):
    """As in emulated_ring.h."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("data", "rows", "row_bytes", "box_rows")]


@dataclass(frozen=True)
class Boxes:
    """Stands in for `nvrtc.tensor_map`: boxes of so many rows."""

    matrix: Tensor
    height: int

    def map(self) -> Map:
        m = self.matrix
        assert m.is_contiguous()
        return Map(m.data_ptr(), m.shape[0], m.shape[1] * m.itemsize, self.height)


class EmulatedRing(Emulated):
    def value(self, one: object) -> object:
        return one.map() if isinstance(one, Boxes) else super().value(one)


class RingEmulator(CopyEmulator):
    headers = (*CopyEmulator.headers, Path(__file__).parent / "emulated_ring.h")
    start = "launch(grid_x, grid_y, grid_z, block_threads, dynamic, CLUSTER);"

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        multiplying = ("WARPS", dict(defines)["ROWS"] // 16)
        return EmulatedRing(self.built(source, entry, [*defines, multiplying]))

    def code(self, source: str) -> str:
        code = nvrtc.expand((nvrtc.SOURCES / source).read_text())
        for header in ("fragments.h", "narrow.h"):
            code = code.replace(nvrtc.expand((nvrtc.SOURCES / header).read_text()), "")
        for text, other in (
            ("struct __align__(64) Map { u64 bytes[16]; };", ""),
            ("extern __shared__ unsigned char raw[];", "unsigned char *raw = emulated_memory;"),
            ('asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory")', "meet()"),
        ):
            assert text in code
            code = code.replace(text, other)
        return without_assembler(code)
