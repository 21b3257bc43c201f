"""Compile the C kernels into one shared object, once per machine; found again by a hash of all that went into it.

A cached file carries the hash of its own content in its name, so a damaged one is noticed and built anew. Files
appear by rename, so any number of processes may build at once without locks. Nothing here raises for a machine
without a compiler: the `Build` says why there is no library.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.base.home import home

SOURCES = Path(__file__).with_name("csrc")
COMMON_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
# Flags of each instruction set; where there are several spellings, the first that the compiler understands.
VARIANTS: dict[str, dict[str, list[tuple[str, ...]]]] = {
    "x86_64": {
        "portable": [()],
        "avx2": [(*_AVX2, "-mtune=haswell"), _AVX2],
        "avx512": [(*_AVX512, "-mtune=icelake-server"), _AVX512],  # zig does not know the tuning
    },
    "aarch64": {
        "portable": [()],
        "neon": [("-march=armv8.2-a+dotprod+fp16",), ("-mcpu=generic+v8_2a+dotprod+fullfp16",)],
    },
}
COMPILE_TIMEOUT = 300  # seconds for one compiler run


@dataclass(frozen=True, slots=True)
class Compiler:
    """A command that compiles C. `identity` changes when the program behind it does."""

    command: tuple[str, ...]
    identity: str

    def __str__(self) -> str:
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class Build:
    """What came of building. `path` is None when there is no library; then `reason` says why, in a sentence."""

    path: Path | None
    compiler: str = ""
    reason: str = ""
    cached: bool = False
    seconds: float = 0.0


class BuildError(ValueError):
    """The compiler was found but did not produce a library."""


def machine() -> str:
    """The processor architecture under one name, e.g. "x86_64" or "aarch64"."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(name, name)


def find_compiler() -> Compiler | None:
    """The C compiler to use: $CC, cc, gcc, clang, or the one in the `ziglang` package. None when there is none."""
    candidates = [shlex.split(os.environ["CC"])] if os.environ.get("CC", "").strip() else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        program = shutil.which(command[0])
        if program:
            return Compiler((program, *command[1:]), _identity(program))
    zig = importlib.util.find_spec("ziglang")
    if zig and zig.origin and not os.environ.get("CC", "").strip():
        return Compiler((sys.executable, "-m", "ziglang", "cc"), _identity(zig.origin))
    return None


def _identity(program: str) -> str:
    real = os.path.realpath(program)
    info = os.stat(real)
    return f"{real} {info.st_size} {info.st_mtime_ns}"


def cache_folder() -> Path:
    """Where libraries are kept."""
    return home("kernels")


def build(sources: Path = SOURCES, folder: Path | None = None) -> Build:
    """The library for the C files in `sources`, from the cache in `folder` or freshly compiled."""
    start = time.perf_counter()
    folders = [folder or cache_folder(), _spare_folder()]
    compiler = find_compiler()
    content = _content_hash(sources)
    # Without a compiler any library made from these sources will do, e.g. one compiled when an image was built.
    key = f"{content}-{_hash(str(compiler), compiler.identity)}" if compiler else f"{content}-*"
    for place in folders:
        found = _cached(place, key)
        if found:
            return Build(found, str(compiler or ""), cached=True, seconds=time.perf_counter() - start)
    if compiler is None:
        return Build(None, reason=_no_compiler())
    try:
        path = _store(compile_library(compiler, sources), folders, key)
    except (BuildError, OSError) as error:
        return Build(None, str(compiler), f"the C kernels could not be compiled with {compiler}: {error}")
    return Build(path, str(compiler), seconds=time.perf_counter() - start)


def _no_compiler() -> str:
    given = os.environ.get("CC", "").strip()
    what = f"the C compiler named by CC ({given})" if given else "a C compiler (cc, gcc, clang)"
    return f"{what} was not found; install one, or `pip install ziglang`."


def _spare_folder() -> Path:
    """A folder of this user alone under the system's temporary one, for when the cache cannot be written."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"tenfold-kernels-{user}"


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put a file there: code is loaded from it."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(info.st_mode)
        and not info.st_mode & 0o022
        and (not hasattr(os, "getuid") or info.st_uid == os.getuid())
    )


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def _content_hash(sources: Path) -> str:
    files = sorted(p for p in sources.iterdir() if p.suffix in (".c", ".h"))
    parts: list[str | bytes] = [sys.platform, machine(), repr(COMMON_FLAGS), repr(VARIANTS)]
    for file in files:
        parts += [file.name, file.read_bytes()]
    return _hash(*parts)


def _cached(folder: Path, key: str) -> Path | None:
    """A whole file of that key. Damaged ones are removed."""
    if folder == _spare_folder() and not _is_private(folder):
        return None
    try:
        candidates = sorted(folder.glob(f"{key}-*.so"))
    except OSError:
        return None
    for path in candidates:
        try:
            if path.stem.rpartition("-")[2] == _hash(path.read_bytes()):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _store(library: bytes, folders: Sequence[Path], key: str) -> Path:
    """Put the library into the first of the folders (the cache, the spare one) that can be written."""
    name = f"{key}-{_hash(library)}.so"
    cache, spare = folders
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _write(library, cache / name)
    except OSError:
        spare.mkdir(mode=0o700, exist_ok=True)
        folder = spare if _is_private(spare) else Path(tempfile.mkdtemp(prefix="tenfold-kernels-"))
        return _write(library, folder / name)


def _write(library: bytes, path: Path) -> Path:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(library)
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def compile_library(compiler: Compiler, sources: Path = SOURCES) -> bytes:
    """Compile and link. An instruction set that this compiler does not know is left out. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="tenfold-build-") as folder:
        target = Path(folder)
        variants = _known_variants(compiler, target)
        objects = _compile_objects(compiler, variants, sources, target)
        library = target / "tenfold.so"
        link = [*compiler.command, "-shared", "-pthread", *map(str, objects), "-lm", "-o", str(library)]
        _run_all([link])
        return library.read_bytes()


def _known_variants(compiler: Compiler, folder: Path) -> dict[str, tuple[str, ...]]:
    """Flags of the instruction sets that this compiler can make."""
    known: dict[str, tuple[str, ...]] = {}
    for name, spellings in VARIANTS.get(machine(), {"portable": [()]}).items():
        flags = next((f for f in spellings if not f or _understands(compiler, f, folder)), None)
        if flags is not None:
            known[name] = flags
    return known


def _understands(compiler: Compiler, flags: Sequence[str], folder: Path) -> bool:
    probe = folder / "probe.c"
    probe.write_text("int probe;\n")
    try:
        _run_all([[*compiler.command, *flags, "-c", str(probe), "-o", str(folder / "probe.o")]])
    except BuildError:
        return False
    return True


def _compile_objects(
    compiler: Compiler, variants: dict[str, tuple[str, ...]], sources: Path, folder: Path
) -> list[Path]:
    have = [f"-DTF_HAVE_{name.upper()}=1" for name in variants]
    commands, objects = [], []
    # The largest sources first: the parallel jobs then end at about the same time.
    for source in sorted(sources.glob("*.c"), key=lambda p: -p.stat().st_size):
        versions = variants if source.stem.endswith("_simd") else {"": ()}
        for name, flags in versions.items():
            output = folder / f"{source.stem}.{name}.o"
            isa = [f"-DTF_ISA={name}"] if name else []
            commands.append(
                [*compiler.command, *COMMON_FLAGS, *have, *isa, *flags, "-c", str(source), "-o", str(output)]
            )
            objects.append(output)
    _run_all(commands)
    return objects


def _run_all(commands: Sequence[list[str]]) -> None:
    """Run commands, as many at a time as there are processors. Raises BuildError with the first complaint."""
    waiting = list(commands)
    running: list[subprocess.Popen[bytes]] = []
    try:
        while waiting or running:
            while waiting and len(running) < max(1, os.cpu_count() or 1):
                running.append(_start(waiting.pop(0)))
            _finish(running.pop(0))
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error.strerror})") from error


def _finish(process: subprocess.Popen[bytes]) -> None:
    try:
        output, _ = process.communicate(timeout=COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise BuildError(f"a compiler run took longer than {COMPILE_TIMEOUT} s") from error
    if process.returncode != 0:
        lines = output.decode(errors="replace").strip().splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
        raise BuildError(f"exit status {process.returncode}: {first.strip()}")
