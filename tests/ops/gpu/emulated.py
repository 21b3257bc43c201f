"""Kernels of csrc compiled as plain C++ and run on the CPU, thread by thread: what they compute, not how fast."""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tenfold.ops.gpu import nvrtc

HEADER = Path(__file__).parent / "emulated.h"
EXTERN = r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];"
STATIC = r"__shared__ __align__\(16\) (\w+) (\w+);"
FLAGS = (
    *("-O1", "-w", "-std=c++17", "-fno-exceptions", "-shared", "-fPIC"),
    "-U_FORTIFY_SOURCE",  # its longjmp takes the stack of another fiber for a mistake
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
)


class Emulated:
    """Stands in for `nvrtc.Kernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.run

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
        self._run(*map(ctypes.c_int, (*grid, threads, shared)), *map(self.value, arguments))

    def value(self, one: object) -> object:
        """An argument as the library takes it."""
        if one is None or isinstance(one, Tensor):
            assert one is None or one.is_contiguous()
            return ctypes.c_void_p(None if one is None else one.data_ptr())
        assert isinstance(one, float | int)
        return ctypes.c_float(one) if isinstance(one, float) else ctypes.c_int(one)


class Emulator:
    """Stands in for `nvrtc.load`; what it compiles lies in a folder. headers: what a source gets in front of it; start:
    the statement that runs a grid.
    """

    headers: tuple[Path, ...] = (HEADER,)
    start = "emulate(grid_x, grid_y, grid_z, block_threads, dynamic);"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> Emulated:
        return Emulated(self.built(source, entry, defines))

    def built(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> ctypes.CDLL:
        text = self.translated(source, entry, defines)
        place = self.folder / f"{entry}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        library = place.with_suffix(".so")
        if not library.exists():
            place.with_suffix(".cpp").write_text(text)
            command = ["g++", *FLAGS, str(place.with_suffix(".cpp")), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert not done.returncode, done.stderr[:4000]
        return ctypes.CDLL(str(library))

    def translated(self, source: str, entry: str, defines: Sequence[tuple[str, int]]) -> str:
        """The source with the emulator's own instructions, and a plain function that runs a grid."""
        code = self.code(source)
        found = re.search(rf"{entry}\((const [^)]*)\) \{{", code)
        assert found is not None
        names = ", ".join(re.findall(r"(\w+)(?:,|$)", found[1]))
        grid = "int grid_x, int grid_y, int grid_z, int block_threads, int dynamic"
        run = (
            f'extern "C" void run({grid}, {found[1]}) {{\n    body = [=]() {{ {entry}({names}); }};\n'
            f"    {self.start}\n}}\n"
        )
        macros = "".join(f"#define {name} {value}\n" for name, value in defines)
        return "\n".join((macros, *(header.read_text() for header in self.headers), code, run))

    def code(self, source: str) -> str:
        """The source without what the headers replace."""
        code = nvrtc.expand((nvrtc.SOURCES / source).read_text())
        code = code.replace(nvrtc.expand((nvrtc.SOURCES / "fragments.h").read_text()), "")
        code = re.sub(EXTERN, r"\1 *\2 = (\1 *)emulated_memory;", code)
        return re.sub(STATIC, r"\1 &\2 = *(\1 *)emulated_static(sizeof(\1));", code)
