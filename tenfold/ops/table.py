"""Which set of kernels an engine runs on. Nothing falls back silently: the choice carries its reason."""

from typing import cast

import torch

from tenfold.base.log import logger
from tenfold.base.table import entry
from tenfold.ops.kernels import FREE, Kernels, Options

KERNELS = {
    "torch": "tenfold.ops.oracle:Oracle",
    "native": "tenfold.ops.cpu.native:Native",
    "gpu": "tenfold.ops.gpu.native:Gpu",
}
CHOICES = ("auto", "native", "torch")


def make_kernels(
    name: str, device: torch.device, dtype: torch.dtype, threads: int = 0, options: Options = FREE
) -> Kernels:
    """The kernels `name` ("auto", "native" or "torch") for a device and compute type; `.reason` says why these.

    "native" are compiled CPU kernels in float32, or GPU kernels in bfloat16 or float16 on a Hopper GPU. "auto" takes
    them where they can run, otherwise torch. Raises ValueError for an unknown name, and for "native" where it cannot
    run.
    """
    if name not in CHOICES:
        raise ValueError(f"kernels is {name!r}; allowed: {', '.join(CHOICES)}.")
    if name == "torch":
        return make_torch(device, dtype, threads, "kernels=torch was asked for")
    if device.type == "cuda":
        return make_gpu(name, device, dtype, threads, options)
    obstacle = native_obstacle(device, dtype)
    if not obstacle:
        try:
            kernels = make_native(threads)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            obstacle = f"the compiled kernels are not available: {error}"
        else:
            return explained(kernels, "compiled kernels fit a CPU in float32")
    if name == "native":
        raise ValueError(f"kernels=native cannot be used, {obstacle} Use kernels=auto or kernels=torch.")
    return make_torch(device, dtype, threads, obstacle)


def make_gpu(name: str, device: torch.device, dtype: torch.dtype, threads: int, options: Options) -> Kernels:
    """The GPU kernels; with "auto" torch where they cannot run. Raises ValueError where they were asked for by name."""
    try:
        kernels = cast(Kernels, entry(KERNELS, "gpu", "kernels")(device, dtype, options))
    except (ImportError, ValueError) as error:
        if name == "native":
            raise ValueError(f"kernels=native cannot be used: {error} Use kernels=auto or kernels=torch.") from error
        return make_torch(device, dtype, threads, str(error))
    return explained(kernels, "GPU kernels fit this GPU and type")


def native_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the compiled CPU kernels cannot serve this device and type, empty where they can."""
    if device.type != "cpu":
        return f"the compiled kernels run on a CPU and the device is {device}."
    if dtype != torch.float32:
        return f"the compiled kernels compute in float32 and the compute type is {str(dtype).removeprefix('torch.')}."
    return ""


def make_native(threads: int) -> Kernels:
    """Raises ImportError, OSError, RuntimeError or ValueError where there are no compiled kernels."""
    kernels = cast(Kernels, entry(KERNELS, "native", "kernels")(threads))
    # The few torch operations left in a step are small, and threads of torch's own would take cores from the pool.
    torch.set_num_threads(1)
    return kernels


def make_torch(device: torch.device, dtype: torch.dtype, threads: int, reason: str) -> Kernels:
    if device.type == "cpu" and threads > 0:
        torch.set_num_threads(threads)
    return explained(cast(Kernels, entry(KERNELS, "torch", "kernels")(device, dtype)), reason)


def explained(kernels: Kernels, reason: str) -> Kernels:
    kernels.reason = reason
    logger.info("kernels: %s (%s)", kernels.name, reason.rstrip("."))
    return kernels
