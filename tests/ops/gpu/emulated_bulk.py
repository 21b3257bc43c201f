"""csrc/bulk.cu as plain C++, whose copies arrive late and in any order: emulated_bulk.h."""

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

from tenfold.ops.gpu import nvrtc
from tests.ops.gpu.emulated import HEADER, Emulated, Emulator

OWN_HEADER = Path(__file__).parent / "emulated_bulk.h"
FUNCTION = re.compile(r"^(?:template <[^>]*> )?__device__ __forceinline__ [^\n(]*\(", re.MULTILINE)
# What a statement of assembler does, by its first word.
STATEMENTS = {"griddepcontrol": "", "createpolicy": "", "fence": "", "cp": "arrive_after_words(barrier);"}


class EmulatedClusters(Emulated):
    """`clusters` of blocks at most run at the same time, so that some take more than one tile."""

    def __init__(self, library: ctypes.CDLL, clusters: int, seed: int) -> None:
        super().__init__(library)
        self._most = clusters
        self._chance = ctypes.c_ulonglong.in_dll(library, "seed")
        self._chance.value = seed

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


class BulkEmulator(Emulator):
    """Stands in for `nvrtc.load`."""

    def __init__(self, folder: Path, clusters: int, seed: int = 0) -> None:
        super().__init__(folder)
        self.clusters, self.seed = clusters, seed

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        return EmulatedClusters(self.built(source, entry, defines), self.clusters, self.seed)

    def translated(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> str:
        code = nvrtc.expand((nvrtc.SOURCES / source).read_text())
        code = code.replace(nvrtc.expand((nvrtc.SOURCES / "fragments.h").read_text()), "")
        code = without_assembler(code)
        code = code.replace("extern __shared__ uint4 memory[];", "uint4 *memory = (uint4 *)emulated_memory;")
        found = re.search(rf"{entry}\((const [^)]*)\) \{{", code)
        assert found is not None
        names = ", ".join(re.findall(r"(\w+)(?:,|$)", found[1]))
        grid = "int grid_x, int grid_y, int grid_z, int block_threads, int dynamic"
        run = (
            'extern "C" unsigned long long seed = 0;\n'
            f'extern "C" void run({grid}, {found[1]}) {{\n    body = [=]() {{ {entry}({names}); }};\n'
            "    ahead_by = seed, random_state = seed;\n"
            "    emulate(grid_x, grid_y, grid_z, block_threads, dynamic, CLUSTER, begin_cluster);\n}\n"
        )
        macros = "".join(f"#define {name} {value}\n" for name, value in defines)
        return "\n".join((macros, HEADER.read_text(), OWN_HEADER.read_text(), code, run))


def without_assembler(code: str) -> str:
    """Without functions that are written in it, and with its other statements replaced."""
    at = 0
    while found := FUNCTION.search(code, at):
        end = closing(code, code.index("{", found.end()))
        head, _, body = code[found.start() : end].partition("\n")
        if not ("bring(" in head or not re.search(r"\basm\b|__cvta", head + body)):
            code, end = code[: found.start()] + code[end:], found.start()
        at = end
    return re.sub(r'asm volatile\(\s*"(\w+).*?\);$', lambda m: STATEMENTS[m[1]], code, flags=re.MULTILINE)


def closing(code: str, at: int) -> int:
    """Behind the brace that closes the one there. Braces inside strings come in pairs."""
    depth = 0
    for place in range(at, len(code)):
        depth += (code[place] == "{") - (code[place] == "}")
        if not depth:
            return place + 1
    raise ValueError("A brace is never closed.")
