"""What a number was measured on: processor, operating system and code version, as they stand in every result file."""

import datetime
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def processor() -> str:
    """Name of the processor, its instruction set for our kernels and the cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    isa = next(
        (
            label
            for flag, label in (("avx512_vnni", "AVX-512 VNNI"), ("avx2", "AVX2"), ("asimddp", "NEON dot product"))
            if flag in flags
        ),
        "",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(filter(None, [name, isa, f"{cores} cores"]))


def commit() -> str:
    """Short hash of the checkout, with "+" when tracked files other than results and documents differ from it;
    "unknown" outside one.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", "tenfold", "tests", "pyproject.toml") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def today() -> str:
    return datetime.date.today().isoformat()


def busy_cores() -> float:
    """Cores' worth of work all processes do in half a second (Linux; 0.0 elsewhere); near 0 before measuring."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0

    def used() -> float:
        fields = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(0.5)
    return (used() - before) / 0.5


def device_name(device: str = "cpu") -> str:
    """What claims call the machine: the GPU's own name ("NVIDIA H100 80GB HBM3"), or the processor."""
    if not device.startswith("cuda"):
        return processor()
    import torch

    return torch.cuda.get_device_name(device)


def machine(device: str = "cpu") -> dict[str, str]:
    """All that a result file says of where it was made: hardware, driver and versions of what computes."""
    import torch

    found = {
        "hardware": device_name(device),
        "processor": processor(),
        "commit": commit(),
        "date": today(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        found |= {"cuda": str(torch.version.cuda), "driver": driver(), "memory": memory(device)}
    return found


def driver() -> str:
    """Version of the NVIDIA driver, "unknown" where it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return _nvidia_smi()
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "unknown"


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return text.split("\n")[0].strip() or "unknown"


def memory(device: str) -> str:
    import torch

    return f"{torch.cuda.get_device_properties(device).total_memory / (1 << 30):.1f} GiB"
