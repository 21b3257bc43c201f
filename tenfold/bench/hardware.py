"""What a number was measured on: processor, operating system and code version, as they stand in every result file."""

import datetime
import os
import platform
import subprocess
import time
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
