"""Two disjoint groups of a GPU's multiprocessors (SMs), each with a stream whose kernels run on no others: CUDA green
contexts, through the driver.

One split makes both groups; two contexts made one by one would overlap. Kernels of any other stream run on all SMs, so
whatever is to be kept apart must be launched on these.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tenfold.ops.gpu import nvrtc

STEP = 8  # SMs: what Hopper splits by


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """SMs and the stream that launches there. context: kept, since the stream ends with it."""

    sms: int
    stream: torch.cuda.Stream
    context: object = None


@cache
def unavailable() -> str:
    """Why this machine cannot split its GPU; "" where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        from cuda.bindings import driver
    except ImportError:
        return "the package cuda-bindings is not installed"
    if not hasattr(driver, "cuGreenCtxStreamCreate"):
        return f"cuda-bindings has no green contexts; 13.0 or newer is needed, this is {driver.__name__}"
    try:
        split(torch.device("cuda"), STEP)
    except RuntimeError as error:
        return str(error)
    return ""


def split(device: torch.device, sms: int) -> tuple[Part, Part]:
    """A group of `sms` SMs (rounded up to a multiple of STEP), which keeps what clusters of blocks need, and all
    others. Raises RuntimeError with the driver's words.
    """
    from cuda.bindings import driver

    torch.zeros(1, device=device)  # makes PyTorch's context
    index = torch.device(device).index or 0
    (place,) = _checked(driver.cuDeviceGet(index), "cuDeviceGet")
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    (whole,) = _checked(driver.cuDeviceGetDevResource(place, kind), "cuDeviceGetDevResource")
    groups, _, rest = _checked(driver.cuDevSmResourceSplitByCount(1, whole, 0, sms), "cuDevSmResourceSplitByCount")
    return _part(driver, place, groups[0]), _part(driver, place, rest)


def where(stream: torch.cuda.Stream, blocks: int = 4096) -> set[int]:
    """The SMs that blocks of a kernel on this stream run on, by the numbers the GPU gives them."""
    found = torch.full((blocks,), -1, dtype=torch.int32, device=stream.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        nvrtc.load("smid.cu", "smid", ())((blocks, 1, 1), 128, 0, [found])
    stream.synchronize()
    return set(found.tolist())


@contextmanager
def on(part: Part) -> Iterator[None]:
    """Launches go to the part's stream, and cuBLAS counts the part's SMs: blocks for all of the GPU would run in two
    rounds on a part of it (2,048 tokens on 120 of 132 SMs took 1.4 times as long as on all; H100, 2026-11-28).
    """
    library = _cublas()
    with torch.cuda.stream(part.stream):
        if library is None:
            yield
            return
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        library.cublasSetSmCountTarget(handle, part.sms)
        try:
            yield
        finally:
            library.cublasSetSmCountTarget(handle, 0)  # as many as there are


@cache
def _cublas() -> Any:
    """The library that PyTorch has loaded; None where it is not found."""
    try:
        return ctypes.CDLL(f"libcublas.so.{(torch.version.cuda or '').partition('.')[0]}")
    except OSError:
        return None


def _part(driver: Any, place: Any, resource: Any) -> Part:
    (description,) = _checked(driver.cuDevResourceGenerateDesc([resource], 1), "cuDevResourceGenerateDesc")
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    (context,) = _checked(driver.cuGreenCtxCreate(description, place, flags), "cuGreenCtxCreate")
    nonblocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    (stream,) = _checked(driver.cuGreenCtxStreamCreate(context, nonblocking, 0), "cuGreenCtxStreamCreate")
    return Part(resource.sm.smCount, torch.cuda.ExternalStream(int(stream)), context)


def _checked(result: Sequence[Any], what: str) -> Sequence[Any]:
    """What a call of the driver returned besides its status. Raises RuntimeError."""
    status, *rest = result
    if int(status):
        raise RuntimeError(f"{what}: {status.name}")
    return rest
