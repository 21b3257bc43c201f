"""Kernels with bulk copies as plain C++, whose copies arrive in any order, at once or late: emulated_copies.h."""

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

from tests.ops.gpu.emulated import HEADER, Emulator

FUNCTION = re.compile(r"^(?:template <[^>]*> )?__device__ __forceinline__ [^\n(]*\(", re.MULTILINE)
# What a statement of assembler does, by its first word.
STATEMENTS = dict.fromkeys(("griddepcontrol", "createpolicy", "fence", "wgmma"), "")
STATEMENTS["cp"] = "arrive_after_words(barrier);"
KEPT = (" bring(", " ask(")  # functions of which only such statements are replaced


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

    def code(self, source: str) -> str:
        return without_assembler(super().code(source))


def without_assembler(code: str) -> str:
    """Without functions that are written in it, and with its other statements replaced."""
    at = 0
    while found := FUNCTION.search(code, at):
        end = closing(code, code.index("{", found.end()))
        head, function = found[0], code[found.start() : end]
        if not head.endswith(KEPT) and re.search(r"\basm\b|__cvta", function):
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
