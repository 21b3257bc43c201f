"""The compiled kernels as a ctypes library: loading, the instruction set and thread count in use, and prototypes.

ctypes.CDLL releases the GIL during a call, so other Python threads (the HTTP server, tokenisation) go on.
"""

import os
from collections.abc import Callable
from ctypes import CDLL, c_int, c_int64, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tenfold.ops.cpu.build import Build, build

ISA_NAMES = ("portable", "avx2", "avx512", "neon")  # order of enum tf_isa_id

_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "tf_isa_available": (c_uint, ()),
    "tf_init": (c_int, (c_int,)),
    "tf_threads": (c_int, ()),
    "tf_pool_start": (None, (c_int,)),
    "tf_pool_stop": (None, ()),
    "tf_pool_bench": (None, (c_int,)),
    "tf_parallel": (None, (c_int, c_void_p, c_void_p)),
    "tf_run": (None, (c_void_p, c_int64)),
}


class Unavailable(ValueError):
    """There are no compiled kernels here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Status:
    """What `tenfold doctor` shows of the CPU kernels. `reason` is empty when they work."""

    path: Path | None
    compiler: str
    isa: str
    isas: tuple[str, ...]
    threads: int
    cached: bool
    build_seconds: float
    reason: str


@cache
def _open() -> tuple[CDLL | None, Build]:
    result = build()
    if result.path is None:
        return None, result
    try:
        library = CDLL(str(result.path))
    except OSError as error:
        return None, Build(None, result.compiler, f"the compiled kernels {result.path} could not be loaded: {error}")
    for name, (result_type, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result_type, list(arguments)
    isa = os.environ.get("TENFOLD_CPU_ISA", "")
    if library.tf_init(_isa_index(isa)) < 0:
        return None, Build(
            None,
            result.compiler,
            f"TENFOLD_CPU_ISA is {isa!r}; this machine and compiler allow: {', '.join(_isas(library))}.",
        )
    library.tf_pool_start(default_threads())
    return library, result


def _isa_index(name: str) -> int:
    if not name:
        return -1
    return ISA_NAMES.index(name) if name in ISA_NAMES else len(ISA_NAMES)


def _isas(library: CDLL) -> tuple[str, ...]:
    mask = library.tf_isa_available()
    return tuple(name for i, name in enumerate(ISA_NAMES) if mask >> i & 1)


def load() -> CDLL:
    """The library, built and opened on the first call. Raises Unavailable with the reason where there is none."""
    library, result = _open()
    if library is None:
        raise Unavailable(f"No compiled CPU kernels: {result.reason} Or use kernels='torch'.")
    return library


def prototype(name: str, result: object, *arguments: object) -> Callable[..., Any]:
    """The exported function `name`, with its result and argument types declared."""
    function = getattr(load(), name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def available() -> bool:
    return _open()[0] is not None


def isas() -> tuple[str, ...]:
    """Instruction sets that `set_isa` takes here, plainest first."""
    return _isas(load())


def set_isa(name: str = "") -> str:
    """Use an instruction set ("" for the best) and return its name. Not to be called while a kernel runs."""
    library = load()
    index = library.tf_init(_isa_index(name))
    if index < 0:
        raise ValueError(
            f"The CPU instruction set is {name!r}; this machine and compiler allow: {', '.join(_isas(library))}."
        )
    return ISA_NAMES[index]


def set_threads(threads: int = 0) -> int:
    """Set the size of the thread pool (0: `default_threads()`) and return it."""
    library = load()
    library.tf_pool_start(threads or default_threads())
    return int(library.tf_threads())


def status() -> Status:
    library, result = _open()
    if library is None:
        return Status(None, result.compiler, "", (), 0, result.cached, result.seconds, result.reason)
    isa = ISA_NAMES[c_int.in_dll(library, "tf_isa_index").value]
    return Status(
        result.path, result.compiler, isa, _isas(library), library.tf_threads(), result.cached, result.seconds, ""
    )


def default_threads() -> int:
    """Physical cores this process may use: its affinity mask, one thread a core, cut to the control group's quota."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return max(1, min(os.cpu_count() or 1, 256))
    cores = {_siblings(cpu) for cpu in cpus}
    quota = _cgroup_cpus()
    limit = len(cores) if quota is None else min(len(cores), max(1, round(quota)))
    return max(1, min(limit, 256))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time the control groups above this process allow; None for no limit."""
    limits = []
    for folder in _cgroup_folders(root, own):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()[:2]
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(limits, default=None)


def _cgroup_folders(root: Path, own: Path) -> list[Path]:
    folders = [root, root / "cpu"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        place = base / path.lstrip("/")
        while place != base and base in place.parents:
            folders.append(place)
            place = place.parent
    return folders
