"""Kernels with bulk copies as plain C++, whose copies arrive in any order, at once or late: emulated_copies.h."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from tests.ops.gpu.emulated import HEADER, Emulator

CODES = Path(__file__).parent / "emulated_codes.h"


class CopyEmulator(Emulator):
    """Stands in for `nvrtc.load`. seed: decides what comes first."""

    headers: tuple[Path, ...] = (HEADER, Path(__file__).parent / "emulated_copies.h")

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__(folder)
        self.seed = seed

    def built(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> ctypes.CDLL:
        library = super().built(source, entry, defines)
        ctypes.c_ulonglong.in_dll(library, "seed").value = self.seed
        return library
