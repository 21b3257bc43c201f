"""What commands write to a terminal: progress while a model loads, model text made safe, and the line of times after
an answer.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.engine.request import Output

PATIENCE = 0.7  # seconds of loading after which a progress bar is worth its flicker
IMPORTED = time.perf_counter()
CONTROL = dict.fromkeys(c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t")


def safe(text: str, is_terminal: bool) -> str:
    """`text` without control characters where a terminal would obey them: model output must not move the cursor or
    set titles.
    """
    return text.translate(CONTROL) if is_terminal else text


def read_prompt(given: str | None) -> str:
    """The prompt; from standard input for "-" or where none was given."""
    if given is None and sys.stdin.isatty():
        raise ValueError('There is no prompt: tenfold run "Why is the sky blue?", or pipe one in.')
    text = sys.stdin.read() if given in (None, "-") else given
    assert text is not None
    if not text.strip():
        raise ValueError("The prompt is empty; give some text.")
    return text


def process_age() -> float:
    """Seconds since this process started: what a user has waited for. Where the system does not tell, since this module
    was imported, which commands do first.
    """
    try:
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - IMPORTED


@contextmanager
def loading(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback `(done, total)` that draws a bar on a terminal once loading has taken a while."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    bar = Bar()
    try:
        yield bar.update
    finally:
        bar.stop()


class Bar:
    """A progress bar on a terminal's error stream that appears late or never. counted: its steps are few enough to say
    how many of how many are done, and not only which share.
    """

    def __init__(self, what: str = "loading", counted: bool = False) -> None:
        self.what = what
        self.counted = counted
        self.start = time.monotonic()
        self.progress: Any = None

    def update(self, done: int, total: int, what: str = "") -> None:
        """what: is under way now, beside what the bar is of."""
        if self.progress is None and time.monotonic() - self.start > PATIENCE and sys.stderr.isatty():
            self._show(total)
        if self.progress is not None:
            self.progress.update(self.task, completed=done, total=total, now=what)

    def _show(self, total: int) -> None:
        # Here and not at the top: a model that loads quickly never needs it.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        done = MofNCompleteColumn() if self.counted else TaskProgressColumn()
        now = TextColumn("{task.fields[now]}", markup=False)
        columns = TextColumn(self.what), BarColumn(), done, TimeRemainingColumn(), now
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(self.what, total=total, now="")
        self.progress.start()

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()


@dataclass(slots=True)
class Stopwatch:
    """Times of one answer, from the moment it was asked for."""

    prompt: int
    start: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    cached: int = 0

    def take(self, output: Output) -> None:
        self.last = time.perf_counter()
        if not self.tokens:
            self.first = self.last
            self.cached = output.cached_tokens
        self.tokens += len(output.tokens)

    def __str__(self) -> str:
        if not self.tokens:
            return f"prompt {self.prompt} tokens · no answer"
        wait = self.first - self.start
        parts = [f"first token {wait:.2f} s", f"prompt {_speed(self.prompt - self.cached, wait)}"]
        if self.cached:
            parts.append(f"{self.cached} cached")
        if self.tokens > 1:
            parts.append(
                f"answer {self.tokens} tokens, {(self.tokens - 1) / max(1e-9, self.last - self.first):.1f} tokens/s"
            )
        return " · ".join(parts)


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens, {tokens / max(1e-9, seconds):.0f} tokens/s"


def size(count: int) -> str:
    """Bytes for people, in the units that file listings use."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1000:.0f} kB"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns. Plain, so that it reads the same in a pipe and a narrow terminal wraps instead of
    cutting.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
