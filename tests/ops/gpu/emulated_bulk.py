"""csrc/bulk.cu as plain C++: emulated_bulk.h."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from tenfold.ops.gpu import nvrtc
from tests.ops.gpu.emulated import Emulated
from tests.ops.gpu.emulated_copies import CODES, CopyEmulator


class EmulatedClusters(Emulated):
    """`clusters` of blocks at most run at the same time, so that some take more than one tile."""

    def __init__(self, library: ctypes.CDLL, clusters: int) -> None:
        super().__init__(library)
        self._most = clusters

    def clusters(self, threads: int, shared: int, cluster: int) -> int:
        return self._most

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: "Sequence[nvrtc.Argument]",
        *,
        dependent: bool = False,
        cluster: int = 1,
    ) -> None:
        assert grid[0] % cluster == 0
        super().__call__(grid, threads, shared, arguments, dependent=dependent, cluster=cluster)


class BulkEmulator(CopyEmulator):
    headers = (*CopyEmulator.headers, CODES, Path(__file__).parent / "emulated_bulk.h")
    start = "launch(grid_x, grid_y, grid_z, block_threads, dynamic, CLUSTER);"

    def __init__(self, folder: Path, clusters: int, seed: int = 0) -> None:
        super().__init__(folder, seed)
        self.clusters = clusters

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        return EmulatedClusters(self.built(source, entry, defines), self.clusters)
