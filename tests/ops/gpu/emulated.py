"""Kernels of csrc compiled as plain C++ and run on the CPU, thread by thread: what they compute, not how fast.

Statements of assembler become what an emulator's instructions say. Functions that hold others are left out: a header
of the emulator has them instead.
"""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tenfold.ops.gpu import nvrtc

HEADER = Path(__file__).parent / "emulated.h"
EXTERN = r"extern __shared__ (?:__align__\(16\) )?([\w ]+) (\w+)\[\];"
STATIC = r"__shared__ __align__\(16\) (\w+) (\w+);"
FLAGS = (
    *("-O1", "-w", "-std=c++17", "-fno-exceptions", "-shared", "-fPIC"),
    "-U_FORTIFY_SOURCE",  # its longjmp takes the stack of another fiber for a mistake
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
)
FUNCTION = re.compile(r"^(?:template <[^>]*>\s+)?__device__ __forceinline__ [^\n(]*\(", re.MULTILINE)
LEFT_OUT = re.compile(r"\basm\b|__cvta|\bPRODUCT\w*\(")  # macros of products are assembler too
ASSEMBLER = re.compile(r'\basm(?: volatile)?\((?!"[^"]*"\n#)')  # not one that begins in two ways
OPERAND = re.compile(r'"[=+]?\w"\s*\(')
INSTRUCTIONS = {  # in C++, once operands stand where PTX counts them
    r"|(?:griddepcontrol|createpolicy|fence|prefetch|setmaxnreg|wgmma\.fence)\b.*": "(void)0",
    r"mov\.\w32 (.+), (.+)": r"\1 = \2",
    r"bar\.(sync|arrive) (.+), (.+)": r"bar_\1(\2, \3)",
    r"cp\.async\.mbarrier\S* \[(.+)\]": r"arrive_after_words(\1)",
    r"wgmma\.commit_group\S*": "commit_products()",
    r"wgmma\.wait_group\S* (.+)": r"finish_products(\1)",
}
# A grid, with arguments of the types that the kernel has.
RUN = """
template <class> struct Runner;
template <class... Each> struct Runner<void(Each...)> {
    static void run(int grid_x, int grid_y, int grid_z, int block_threads, int dynamic, Each... each) {
        body = [=] { ENTRY(each...); };
        START
    }
};
extern "C" void *const runner = (void *)Runner<decltype(ENTRY)>::run;
"""


class Emulated:
    """Stands in for `nvrtc.Kernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(library, "runner").value)

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
        self._run(*map(ctypes.c_int, (*grid, threads, shared)), *map(self.value, arguments))

    def value(self, one: object) -> object:
        """An argument as the library takes it."""
        if one is None or isinstance(one, Tensor):
            assert one is None or one.is_contiguous()
            return ctypes.c_void_p(None if one is None else one.data_ptr())
        assert isinstance(one, float | int)
        return ctypes.c_float(one) if isinstance(one, float) else ctypes.c_int(one)


class Emulator:
    """Stands in for `nvrtc.load`; what it compiles lies in a folder. headers: what a source gets in front of it;
    instructions: what they have for assembler; start: the statement that runs a grid.
    """

    headers: tuple[Path, ...] = (HEADER,)
    instructions = INSTRUCTIONS
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
        macros = "".join(f"#define {name} {value}\n" for name, value in defines)
        run = RUN.replace("ENTRY", entry).replace("START", self.start)
        return "\n".join((macros, *(header.read_text() for header in self.headers), self.code(source), run))

    def code(self, source: str) -> str:
        """The source without what the headers replace."""
        code = nvrtc.expand((nvrtc.SOURCES / source).read_text())
        code = code.replace(nvrtc.expand((nvrtc.SOURCES / "fragments.h").read_text()), "")
        code = re.sub(EXTERN, r"\1 *\2 = (\1 *)emulated_memory;", code)
        code = re.sub(STATIC, r"\1 &\2 = *(\1 *)emulated_static(sizeof(\1));", code)
        return without_assembler(code, self.instructions)


def without_assembler(code: str, instructions: Mapping[str, str]) -> str:
    """With C++ in place of statements of assembler, and without functions where that does not suffice."""
    code, at = in_words(code, instructions), 0
    while found := FUNCTION.search(code, at):
        end = closing(code, code.index("{", found.end()))
        if LEFT_OUT.search(code[found.start() : end]):
            code, end = code[: found.start()] + code[end:], found.start()
        at = end
    return code


def in_words(code: str, instructions: Mapping[str, str]) -> str:
    """With C++ in place of statements of assembler that are in `instructions`."""
    done, at = "", 0
    while found := ASSEMBLER.search(code, at):
        end = closing(code, found.end() - 1)
        words = statement(code[found.end() : end - 1], instructions)
        done += code[at : found.start()] + (words or code[found.start() : end])
        at = end
    return done + code[at:]


def statement(inside: str, instructions: Mapping[str, str]) -> str | None:
    """What an asm(...) does, if `instructions` has all of it."""
    text, rest = inside.strip()[1:].split('"', 1)
    if text.startswith("{"):
        return None
    operands, at = [], 0
    while found := OPERAND.search(rest, at):
        at = closing(rest, found.end() - 1)
        operands.append(rest[found.end() : at - 1])
    parts = [part.removeprefix("\\n") for part in text.removesuffix(";").split(";")]
    words = []
    for part in parts:
        plain = re.sub(r"%(\d+)", lambda m: operands[int(m[1])], part)
        found = next(filter(None, (re.fullmatch(pattern, plain) for pattern in instructions)), None)
        if found is None:
            return None
        words.append(found.expand(instructions[found.re.pattern]))
    return ", ".join(words)


def closing(code: str, at: int) -> int:
    """Behind what closes the brace or parenthesis there. Inside strings they come in pairs."""
    opens, closes = "{}" if code[at] == "{" else "()"
    depth = 0
    for place in range(at, len(code)):
        depth += (code[place] == opens) - (code[place] == closes)
        if not depth:
            return place + 1
    raise ValueError(f"A {opens} is never closed.")
