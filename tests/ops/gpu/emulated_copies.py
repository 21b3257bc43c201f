"""Kernels with bulk copies as plain C++, whose copies arrive in any order, at once or late: emulated_copies.h."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from tests.ops.gpu.emulated import HEADER, INSTRUCTIONS, Emulated, Emulator

CODES = Path(__file__).parent / "emulated_codes.h"


class EmulatedClusters(Emulated):
    """`clusters` of blocks at most run at the same time, so that some take more than one tile."""

    def __init__(self, library: ctypes.CDLL, clusters: int) -> None:
        super().__init__(library)
        self._most = clusters

    def clusters(self, threads: int, shared: int, cluster: int) -> int:
        return self._most


class CopyEmulator(Emulator):
    """Stands in for `nvrtc.load`. seed: decides what comes first."""

    headers: tuple[Path, ...] = (HEADER, Path(__file__).parent / "emulated_copies.h")
    instructions = INSTRUCTIONS | {
        r"ld\.shared\.\S+ \{?([^}]+)\}?, \[(.+)\]": r"load_shared(\2, \1)",
        r"st\.shared\.\S+ \[(.+)\], \{?([^}]+)\}?": r"store_shared(\1, \2)",
        r"mbarrier\.arrive\.release\.cluster\S* _, \[(.+)\]": r"arrive_at(\1)",
        r"barrier\.cluster\.arrive\S*": "arrive_at_cluster()",
        r"barrier\.cluster\.wait\S*": "wait_for_cluster()",
    }

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__(folder)
        self.seed = seed

    def built(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> ctypes.CDLL:
        library = super().built(source, entry, defines)
        ctypes.c_ulonglong.in_dll(library, "seed").value = self.seed
        return library
