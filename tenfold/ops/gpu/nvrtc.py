"""CUDA C++ compiled on first use by NVRTC, which PyTorch's CUDA builds bring along: no toolkit is needed.

Compiled code is cached on disk under the hash of everything it was made from. Launches go to PyTorch's current stream
and may be programmatic dependent launches, which begin before the kernel in front of them has ended.
"""

import ctypes
import hashlib
import os
import re
import shutil
import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.base.home import home

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("--std=c++17", "-default-device", "--use_fast_math", "--extra-device-vectorization")
CAPABILITY = (9, 0)  # Hopper: wgmma and its like are of no other
HALF = {torch.bfloat16: 0, torch.float16: 1}  # types our sources compute in, by their macro of this name
GATES = {None: 0, "silu": 1, "gelu_tanh": 2}  # by the macro GATE
LARGEST_STATIC = 48 << 10  # bytes of shared memory, static and dynamic, a kernel may use without asking
MOST_MAPS = 1 << 14  # tensor maps that are remembered
LONGEST_LOG = 2000  # characters of a compiler's complaint worth showing


class CompileError(ValueError):
    """CUDA C++ could not be compiled or loaded here; says why, and what to do."""


class _Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding, and a value of 64 bytes of which we set an int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", _Dim3),
        ("block", _Dim3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


CLUSTER_DIMENSION = 4
PROGRAMMATIC_STREAM_SERIALIZATION = 6
MAP_ALIGN = 64  # bytes: where the driver wants tensor maps


class Kernel:
    """One entry of a compiled source. Arguments are tensors (their address), ints (32 bits), floats,
    tensor maps (by value) or None (null), of the same kinds at every launch.
    """

    def __init__(self, name: str, function: int, driver: Any, device: int) -> None:
        self.name = name
        self._function = ctypes.c_void_p(function)
        self._driver = driver
        self._device = device
        static = ctypes.c_int()
        # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        check(driver, driver.cuFuncGetAttribute(ctypes.byref(static), 1, self._function), name)
        self._shared = LARGEST_STATIC - static.value
        # A launch fills these in: making them anew costs the host more than the launch itself.
        self._layout: struct.Struct | None = None
        self._values = memoryview(b"")
        self._pointers = (ctypes.c_void_p * 0)()
        self._config = _Config()
        self._lock = threading.Lock()
        self._clusters: dict[tuple[int, int, int], int] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: "Sequence[Argument]",
        *,
        dependent: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream. shared: bytes of dynamic shared memory; dependent: the kernel waits itself
        (griddepcontrol.wait) for what comes before it; cluster: blocks along x that share a cluster, up to 8. A grid
        without blocks launches nothing. Raises RuntimeError.
        """
        if 0 in grid:
            return
        values = [_value(a) for a in arguments]
        attributes, count = _attributes(dependent, cluster)
        config = self._config
        with self._lock:  # a driver's call lets other threads run
            self._allow(shared)
            if self._layout is None:
                self._layout = self._make_room(arguments)
            self._layout.pack_into(self._values, 0, *values)
            config.grid.x, config.grid.y, config.grid.z = grid
            config.block.x, config.shared = threads, shared
            config.attributes, config.count = attributes, count
            config.stream = _current_stream(self._device)
            status = self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, self._pointers, None)
        check(self._driver, status, self.name)

    def clusters(self, threads: int, shared: int, cluster: int) -> int:
        """How many clusters of so many blocks the device runs at the same time. Multiprocessors that are left over in a
        group of them take none, so it may be fewer than their number says.
        """
        at = (threads, shared, cluster)
        if at not in self._clusters:
            self._allow(shared)
            config = _Config()
            config.grid.x, config.grid.y, config.grid.z = cluster, 1, 1
            config.block.x, config.block.y, config.block.z = threads, 1, 1
            config.shared = shared
            config.attributes, config.count = _attributes(False, cluster)
            found = ctypes.c_int()
            status = self._driver.cuOccupancyMaxActiveClusters(
                ctypes.byref(found), self._function, ctypes.byref(config)
            )
            check(self._driver, status, self.name)
            self._clusters[at] = max(1, found.value)
        return self._clusters[at]

    def _allow(self, shared: int) -> None:
        if shared > self._shared:
            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(self._driver, self._driver.cuFuncSetAttribute(self._function, 8, shared), self.name)
            self._shared = shared

    def _make_room(self, arguments: "Sequence[Argument]") -> struct.Struct:
        code, places = _layout(arguments)
        layout = struct.Struct(code)
        memory = (ctypes.c_uint8 * (layout.size + MAP_ALIGN))()
        begin = -ctypes.addressof(memory) % MAP_ALIGN
        self._values = memoryview(memory)[begin:].cast("B")
        self._pointers = (ctypes.c_void_p * len(places))(*(ctypes.addressof(memory) + begin + at for at in places))
        self._config.block.y = self._config.block.z = 1
        return layout


def _current_stream(device: int) -> int:
    """The handle of PyTorch's current stream, without an object for it."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def _value(argument: "Argument") -> int | float | bytes:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, TensorMap):
        return argument.bytes
    return 0 if argument is None else argument


def _layout(arguments: "Sequence[Argument]") -> tuple[str, list[int]]:
    """How we keep the values of arguments, as a code of `struct`, and where each begins."""
    code, at, places = "=", 0, []
    for argument in arguments:
        kind, size, align = _kind(argument)
        gap = -at % align
        code += f"{gap}x{kind}" if gap else kind
        places.append(at + gap)
        at += gap + size
    return code, places


def _kind(argument: "Argument") -> tuple[str, int, int]:
    """Of an argument: its code for `struct`, its size and what its place is a multiple of."""
    if argument is None or isinstance(argument, Tensor):
        return "Q", 8, 8
    if isinstance(argument, TensorMap):
        return "128s", 128, MAP_ALIGN
    return ("f" if isinstance(argument, float) else "i"), 4, 4


@cache
def _attributes(dependent: bool, cluster: int) -> tuple[Any, int]:
    """Attributes of a launch, and how many."""
    found = (_Attribute * 2)()
    count = 0
    if dependent:
        found[0].id, found[0].value[0] = PROGRAMMATIC_STREAM_SERIALIZATION, 1
        count = 1
    if cluster > 1:
        found[count].id = CLUSTER_DIMENSION
        found[count].value[:3] = (cluster, 1, 1)
        count += 1
    return found, count


class _Block(ctypes.Structure):
    """CUtensorMap: 128 opaque bytes, which the driver wants at a multiple of 64."""

    _fields_ = (("bytes", ctypes.c_uint64 * 16),)


class TensorMap:
    """How the tensor copy engine finds boxes of `height` rows and 128 bytes in matrices of 16- or 8-bit numbers. Rows
    and columns past the end read as zero, and so do matrices. Boxes land in shared memory with the 128-byte swizzle,
    but row by row where they are less wide.
    """

    def __init__(self, matrices: Tensor, height: int | tuple[int, ...], width: int = 128) -> None:
        """matrices [..., rows, cols], up to five dimensions, cols contiguous, other strides whole 16 bytes in any
        order; it must outlive the map. height: up to 256; a tuple is the size of a box in as many dimensions in front
        of the last. Coordinates of a box are given from the last dimension on. Raises RuntimeError.
        """
        sides = (height,) if isinstance(height, int) else height
        rank, each = matrices.dim(), matrices.element_size()
        memory = (ctypes.c_uint8 * 192)()
        address = ctypes.addressof(memory)
        block = _Block.from_address(address + -address % 64)
        sizes = (ctypes.c_uint64 * rank)(*reversed(matrices.shape))
        strides = (ctypes.c_uint64 * (rank - 1))(*(each * stride for stride in reversed(matrices.stride()[:-1])))
        box = (ctypes.c_uint32 * rank)(width // each, *reversed(sides), *[1] * (rank - 1 - len(sides)))
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        driver = _driver()
        # CU_TENSOR_MAP_DATA_TYPE_UINT8, _BFLOAT16, _FLOAT16
        kind = 0 if each == 1 else 9 if matrices.dtype == torch.bfloat16 else 6
        # no interleave; 128-byte swizzle or none; L2 promotion to 256 bytes; zeros out of bounds
        status = driver.cuTensorMapEncodeTiled(
            *(ctypes.byref(block), kind, rank, ctypes.c_void_p(matrices.data_ptr())),
            *(sizes, strides, box, steps, 0, 3 if width == 128 else 0, 3, 0),
        )
        check(driver, status, "cuTensorMapEncodeTiled")
        self.bytes = bytes(block)


def tensor_map(matrices: Tensor, height: int | tuple[int, ...], width: int = 128) -> TensorMap:
    """`TensorMap`, from those made before: a map depends on nothing but where numbers lie and how."""
    key = (matrices.data_ptr(), matrices.dtype, matrices.shape, matrices.stride(), height, width)
    found = _maps.get(key)
    if found is None:
        if len(_maps) >= MOST_MAPS:
            _maps.clear()
        found = _maps[key] = TensorMap(matrices, height, width)
    return found


_maps: dict[tuple[Any, ...], TensorMap] = {}


Argument = Tensor | int | float | TensorMap | None


def load(source: str, entry: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
    """The kernel `entry` of csrc/`source` with these macros, compiled for the current device. Raises CompileError."""
    return _load(source, entry, defines, torch.cuda.current_device())


@cache
def _load(source: str, entry: str, defines: tuple[tuple[str, int], ...], device: int) -> Kernel:
    module = _module(source, defines, device)
    driver = _driver()
    function = ctypes.c_void_p()
    check(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), entry)
    assert function.value is not None
    return Kernel(entry, function.value, driver, device)


@cache
def _module(source: str, defines: tuple[tuple[str, int], ...], device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    image = compiled(source, arch, defines)
    torch.zeros(1, device=f"cuda:{device}")  # makes PyTorch's context current
    module = ctypes.c_void_p()
    driver = _driver()
    check(driver, driver.cuModuleLoadData(ctypes.byref(module), image), source)
    return module


def modules() -> int:
    """How many compiled sources this process has loaded. Each takes memory of the host and of the device."""
    return _module.cache_info().currsize


def compiled(source: str, arch: str, defines: Sequence[tuple[str, int]] | Mapping[str, int]) -> bytes:
    """Machine code of csrc/`source` for `arch` ("sm_90a"), from the cache where it is there. Raises CompileError."""
    pairs = sorted(dict(defines).items())
    text = expand((SOURCES / source).read_text())
    flags = [*FLAGS, f"--gpu-architecture={arch}", *(f"-D{name}={value}" for name, value in pairs)]
    nvrtc = _nvrtc()
    version = nvrtc.nvrtcVersion()[1:]
    digest = hashlib.sha256(repr((text, flags, version)).encode()).hexdigest()[:24]
    path = folder() / f"{source.partition('.')[0]}-{digest}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    image = _compile(nvrtc, source, text, flags)
    _store(path, image)
    return image


def expand(text: str) -> str:
    """The source with our own headers in place of its `#include "..."` lines: one text to hash and to compile."""
    return re.sub(r'^#include "([^"]+)"$', lambda m: expand((SOURCES / m[1]).read_text()), text, flags=re.MULTILINE)


def folder() -> Path:
    """Where compiled code is kept."""
    return home("kernels")


def _compile(nvrtc: Any, source: str, text: str, flags: list[str]) -> bytes:
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), source.encode(), 0, [], [])
    options = [flag.encode() for flag in flags]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.decode(errors="replace")[:LONGEST_LOG]
        nvrtc.nvrtcDestroyProgram(program)
        raise CompileError(f"NVRTC could not compile {source} ({' '.join(flags)}): {words}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    image = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(image)


def _store(path: Path, image: bytes) -> None:
    """Write by rename; a cache that cannot be written costs time only."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(image)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)


def check_available() -> None:
    """Raises CompileError where CUDA C++ cannot be compiled or loaded."""
    try:
        _nvrtc().nvrtcVersion()
    except RuntimeError as error:
        own = f"=={torch.version.cuda.partition('.')[0]}.*" if torch.version.cuda else ""
        raise CompileError(
            f"cuda-bindings finds no libnvrtc of its CUDA version ({error}). Install those of PyTorch's: pip install "
            f"'cuda-bindings{own}'"
        ) from error
    _driver()


def check_compiler() -> None:
    """Raises CompileError where Triton, which makes a launcher in C for each kernel, would find no compiler."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise CompileError(
            "Triton's kernels need a C compiler and there is neither gcc nor clang, nor does CC name one. Install gcc, "
            "or set CC."
        )


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(
            f"CUDA C++ kernels need the package cuda-bindings, which is not here ({error}): pip install cuda-bindings"
        ) from error
    return nvrtc


@cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompileError(f"the NVIDIA driver's libcuda.so.1 cannot be loaded: {error}") from error
    library.cuModuleGetFunction.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    library.cuModuleLoadData.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    library.cuFuncSetAttribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    library.cuOccupancyMaxActiveClusters.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return library


def check(driver: Any, status: int, what: str) -> None:
    """Raises RuntimeError with the driver's words for a status that is not success."""
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status}, {(text.value or b'').decode()}")
