"""csrc/bulk.cu as plain C++: emulated_bulk.h."""

from collections.abc import Sequence
from pathlib import Path

from tests.ops.gpu.emulated import Emulated
from tests.ops.gpu.emulated_copies import CODES, CopyEmulator, EmulatedClusters


class BulkEmulator(CopyEmulator):
    headers = (*CopyEmulator.headers, CODES, Path(__file__).parent / "emulated_bulk.h")
    start = "launch(grid_x, grid_y, grid_z, block_threads, dynamic, CLUSTER);"

    def __init__(self, folder: Path, clusters: int, seed: int = 0) -> None:
        super().__init__(folder, seed)
        self.clusters = clusters

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        return EmulatedClusters(self.built(source, entry, defines), self.clusters)
