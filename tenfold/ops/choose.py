"""The table of choices: which implementation ("arm") of an operation runs for a shape, measured on this machine.

A key says what is computed and with what (operation, shape, format, batch bucket, budget of threads or SMs); a row
holds the time of every arm that was measured. Where nothing was measured an analytic rule of the operation decides.
The table can only change speed: arms of one operation give the same result, or say in their documentation by how much
they differ.

One JSON file a device, in `folder()`. A file that is broken, of another device or of another version of the kernels is
ignored with one line in the log, and replaced by the next measurement.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenfold.base.log import logger

SCHEMA = 1
LARGEST_BATCH = 512
LARGEST_FILE = 16 << 20  # bytes; a table of one device has a few hundred rows
NOISE = 1.03  # an arm replaces the rule's only when it is faster by more than measurements vary


@dataclass(frozen=True, slots=True)
class Key:
    """rows x cols of the weight; batch: a value of `batch_bucket`; budget: CPU threads or GPU SMs it may use."""

    op: str
    rows: int
    cols: int
    format: str
    batch: int
    budget: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs and why. source: "measured", "rule" or "fixed" (by a user); times in microseconds, None where not
    measured.
    """

    key: Key
    arm: str
    source: str
    microseconds: float | None = None
    runner_up: str | None = None
    runner_up_microseconds: float | None = None

    def __str__(self) -> str:
        k = self.key
        head = f"{k.op} {k.rows} x {k.cols} {k.format}, batch {k.batch}, budget {k.budget}: {self.arm}"
        if self.microseconds is None:
            return f"{head} ({self.source}; not measured)"
        other = f"; next {self.runner_up} {self.runner_up_microseconds:.1f} us" if self.runner_up else ""
        return f"{head} ({self.source} {self.microseconds:.1f} us{other})"


def batch_bucket(batch: int) -> int:
    """The batch size measured for `batch`: 1, 2, 3, 4, then the next power of two, up to LARGEST_BATCH."""
    if batch <= 4:
        return max(1, batch)
    return min(LARGEST_BATCH, 1 << (batch - 1).bit_length())


def folder() -> Path:
    """$TENFOLD_HOME/choices, or ~/.cache/tenfold/choices."""
    home = os.environ.get("TENFOLD_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "tenfold") / "choices"


class Table:
    """The measured times of one device and one version of its kernels."""

    def __init__(self, device: str, version: str, path: Path | None = None) -> None:
        """Reads the device's file. device: any text that names the hardware; version: changes when the kernels do."""
        self.device = device
        self.version = version
        self.path = path or folder() / (re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-")[:120] + ".json")
        self._times = self._read()

    def __len__(self) -> int:
        return len(self._times)

    def times(self, key: Key) -> Mapping[str, float]:
        """Microseconds of each measured arm; empty where nothing was measured."""
        return self._times.get(key, {})

    def record(self, key: Key, times: Mapping[str, float]) -> None:
        """Replace the times of a key; `save` writes them down."""
        self._times[key] = dict(times)

    def pick(self, key: Key, rule: str) -> Choice:
        """The fastest measured arm, or `rule` where nothing was measured or nothing is faster by more than noise."""
        times = self.times(key)
        if not times:
            return Choice(key, rule, "rule")
        order = sorted(times, key=times.__getitem__)
        arm = rule if times.get(rule, math.inf) <= times[order[0]] * NOISE else order[0]
        second = next((other for other in order if other != arm), None)
        return Choice(key, arm, "measured", times[arm], second, times[second] if second else None)

    def save(self) -> None:
        """Write the file, by rename; rows that another process saved meanwhile are kept."""
        self._times = {**self._read(), **self._times}
        rows = [{**asdict(key), "microseconds": times} for key, times in self._times.items()]
        content = {"schema": SCHEMA, "device": self.device, "version": self.version, "choices": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(temporary, self.path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read(self) -> dict[Key, dict[str, float]]:
        try:
            if self.path.stat().st_size > LARGEST_FILE:
                raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return _rows(content, self.device, self.version)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.info("choices: %s is ignored, %s; measure again with `tenfold tune`", self.path, error)
            return {}


def _rows(content: Any, device: str, version: str) -> dict[Key, dict[str, float]]:
    """The rows of a file's content. Raises ValueError with what is wrong."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError("it is not a table of choices of this version")
    if content.get("device") != device:
        raise ValueError("it was measured on another device")
    if content.get("version") != version:
        raise ValueError("it was measured with other kernels")
    rows = content.get("choices")
    if not isinstance(rows, list):
        raise ValueError("it has no list of choices")
    return dict(_row(row) for row in rows)


def _row(row: Any) -> tuple[Key, dict[str, float]]:
    numbers, names = ("rows", "cols", "batch", "budget"), ("op", "format")
    good = isinstance(row, dict) and set(row) == {*numbers, *names, "microseconds"}
    good = good and all(type(row[n]) is int and row[n] > 0 for n in numbers)
    good = good and all(isinstance(row[n], str) for n in names) and isinstance(row["microseconds"], dict)
    good = good and all(type(t) in (int, float) and t > 0 and math.isfinite(t) for t in row["microseconds"].values())
    if not good:
        raise ValueError("one of its rows is malformed")
    return Key(**{n: row[n] for n in (*numbers, *names)}), {k: float(t) for k, t in row["microseconds"].items()}
