"""csrc/decode.cu as plain C++: emulated_decode.h."""

from collections.abc import Sequence
from pathlib import Path

from tests.ops.gpu.emulated import Emulated
from tests.ops.gpu.emulated_copies import CopyEmulator


class DecodeEmulator(CopyEmulator):
    """Each launch has a seed of its own."""

    headers = (*CopyEmulator.headers, Path(__file__).parent / "emulated_decode.h")
    start = "launch_in_any_order(grid_x, grid_y, grid_z, block_threads, dynamic);"

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        self.seed += 1
        return super().__call__(source, entry, defines)
