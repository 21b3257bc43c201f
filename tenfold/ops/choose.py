"""The table of choices: which implementation ("arm") of an operation runs for a shape, measured on this machine.

A key says what is computed and with what (operation, shape, format, batch bucket, budget of threads or SMs); a row
holds the time of every arm that was measured, and where a model was there, how long its whole decode step took with
some of them: that decides, for kernels get in each other's way. Where nothing was measured an analytic rule of the
operation decides. The table can only change speed: arms of one operation give the same result, or say in their
documentation by how much they differ.

One JSON file a device, in `folder()`. A file that is broken, of another device or of another version of the kernels is
ignored with one warning in the log, and replaced by the next measurement.
"""

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenfold.base.home import home
from tenfold.base.log import logger

Times = dict["Key", dict[str, float]]
SCHEMA = 1
NUMBERS, NAMES, TIMES = ("rows", "cols", "batch", "budget"), ("op", "format"), ("microseconds", "step")  # of a row
LARGEST_BATCH = 512
LARGEST_FILE = 16 << 20  # bytes; a table of one device has a few hundred rows
NOISE = 1.03  # an arm replaces the rule's only when it is faster by more than measurements vary
STEP_NOISE = 1.005  # likewise, of a whole step


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
    """What runs and why. source: "step" (measured in whole steps), "measured" (alone), "rule" or "fixed" (by a user);
    times in microseconds, None where not measured. step: of a whole decode step with this arm; the runner-up's time is
    of a step then too.
    """

    key: Key
    arm: str
    source: str
    microseconds: float | None = None
    runner_up: str | None = None
    runner_up_microseconds: float | None = None
    step: float | None = None

    def __str__(self) -> str:
        k = self.key
        head = f"{k.op} {k.rows} x {k.cols} {k.format}, batch {k.batch}, budget {k.budget}: {self.arm}"
        other = f"; next {self.runner_up} {self.runner_up_microseconds:.1f} us" if self.runner_up else ""
        alone = "" if self.microseconds is None else f" {self.microseconds:.1f} us"
        if self.step is not None:
            return f"{head} (alone{alone or ' not measured'}; steps {self.step:.1f} us{other})"
        return f"{head} ({self.source}{alone}{other})" if alone else f"{head} ({self.source}; not measured)"


def batch_bucket(batch: int) -> int:
    """The batch size measured for `batch`: 1, 2, 3, 4, then the next power of two, up to LARGEST_BATCH."""
    if batch <= 4:
        return max(1, batch)
    return min(LARGEST_BATCH, 1 << (batch - 1).bit_length())


def folder() -> Path:
    """Where tables are kept."""
    return home("choices")


class Table:
    """The measured times of one device and one version of its kernels. ignored: why what the file holds is not used and
    what to do, "" where it is used or there is none.
    """

    def __init__(self, device: str, version: str, path: Path | None = None) -> None:
        """Reads the device's file. device: any text that names the hardware; version: changes when the kernels do."""
        self.device = device
        self.version = version
        self.path = path or folder() / (re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-")[:120] + ".json")
        self.ignored = ""
        self._times, self._steps = self._read()
        if self.ignored:
            logger.warning("choices: %s", self.ignored)

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[Key]:
        """The keys of which there are times alone."""
        return iter(tuple(self._times))

    def times(self, key: Key) -> Mapping[str, float]:
        """Microseconds of each measured arm; empty where nothing was measured."""
        return self._times.get(key, {})

    def steps(self, key: Key) -> Mapping[str, float]:
        """Microseconds of a decode step with each arm that was tried in one; empty where none was."""
        return self._steps.get(key, {})

    def record(self, key: Key, times: Mapping[str, float]) -> None:
        """Replace the times of a key; `save` writes them down."""
        self._times[key] = dict(times)

    def record_steps(self, key: Key, times: Mapping[str, float]) -> None:
        """Replace the times of steps; `save` writes them down."""
        self._steps[key] = dict(times)

    def but(self, chosen: Mapping[Key, str]) -> "Table":
        """The same table where these arms are the fastest in steps; not to be saved."""
        other = copy.copy(self)
        other._steps = {**self._steps, **{key: {arm: 1.0} for key, arm in chosen.items()}}
        return other

    def pick(self, key: Key, rule: str, without: Collection[str] = ()) -> Choice:
        """The arm with which steps were fastest, else the one that was fastest alone; or `rule` where nothing was
        measured or nothing is faster by more than noise. without: arms that are out of the question now.
        """
        every = self.times(key), self.steps(key)
        times, steps = ({arm: took for arm, took in each.items() if arm not in without} for each in every)
        if not times and not steps:
            return Choice(key, rule, "rule")
        arm, second = best(steps or times, rule, STEP_NOISE if steps else NOISE)
        took = (steps or times)[second] if second else None
        if steps:
            return Choice(key, arm, "step", times.get(arm), second, took, steps[arm])
        return Choice(key, arm, "measured", times[arm], second, took)

    def save(self) -> None:
        """Write the file, by rename; rows that another process saved meanwhile are kept."""
        times, steps = self._read()
        self._times, self._steps = {**times, **self._times}, {**steps, **self._steps}
        rows = [
            asdict(key) | {name: times[key] for name, times in zip(TIMES, (self._times, self._steps)) if key in times}
            for key in dict.fromkeys((*self._times, *self._steps))
        ]
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
        self.ignored = ""

    def _read(self) -> tuple[Times, Times]:
        try:
            if self.path.stat().st_size > LARGEST_FILE:
                raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return _rows(content, self.device, self.version)
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            self.ignored = f"{self.path} is ignored, {error}; measure again with `tenfold tune MODEL`"
            return {}, {}


def best(times: Mapping[str, float], rule: str, noise: float) -> tuple[str, str | None]:
    """The fastest arm, or `rule` where that is as fast but for noise; and the fastest of the others."""
    order = sorted(times, key=times.__getitem__)
    arm = rule if times.get(rule, math.inf) <= times[order[0]] * noise else order[0]
    return arm, next((other for other in order if other != arm), None)


def _rows(content: Any, device: str, version: str) -> tuple[Times, Times]:
    """The rows of a file's content: times alone, and of steps. Raises ValueError with what is wrong."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError("it is not a table of choices of this version")
    if content.get("device") != device:
        raise ValueError("it was measured on another device")
    if content.get("version") != version:
        raise ValueError("it was measured with other kernels")
    rows = content.get("choices")
    if not isinstance(rows, list):
        raise ValueError("it has no list of choices")
    found: tuple[Times, Times] = {}, {}
    for row in rows:
        _check(row)
        key = Key(**{name: row[name] for name in (*NUMBERS, *NAMES)})
        for times, name in zip(found, TIMES):
            if name in row:
                times[key] = {arm: float(took) for arm, took in row[name].items()}
    return found


def _check(row: Any) -> None:
    """Raises ValueError for what is no row of a file."""
    good = isinstance(row, dict) and {*NUMBERS, *NAMES} < set(row) <= {*NUMBERS, *NAMES, *TIMES}
    good = good and all(type(row[n]) is int and row[n] > 0 for n in NUMBERS)
    good = good and all(isinstance(row[n], str) for n in NAMES)
    times = [row[name] for name in TIMES if name in row] if good else []
    good = good and all(isinstance(one, dict) for one in times)
    good = good and all(type(t) in (int, float) and t > 0 and math.isfinite(t) for one in times for t in one.values())
    if not good:
        raise ValueError("one of its rows is malformed")
