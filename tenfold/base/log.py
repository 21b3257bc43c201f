"""Logging for the package, and the start-up timeline.

Invariant: a log line never blocks or ends whoever writes it. Lines go through a bounded queue to a thread; what a full
disk, a closed pipe or a reader that sleeps does not take is counted and dropped, and said once writing works again.
"""

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger("tenfold")

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
WAITING_LINES = 4096  # more are dropped: whoever reads them does not keep up
LONGEST_LINE = 64 << 10  # characters
LAST_WORDS = 1.0  # seconds that the end of the program waits for the last lines
CONTROL = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}

Fields = Callable[[], Mapping[str, Any]]


def configure(level: str, format: str, fields: Fields | None = None, file: int = 2) -> None:
    """Send the log of this process to a file descriptor. Calling it again replaces what was set before.

    level: of our own loggers; others speak from warning (at debug from info). format: as in LOG_FORMATS. fields: asked
    at every line for more to say, such as the request.
    """
    handler = LogHandler(file, JsonFormat() if format == "json" else TextFormat())
    if fields is not None:
        handler.addFilter(_add(fields))
    root = logging.getLogger()
    for before in [h for h in root.handlers if isinstance(h, LogHandler)]:
        root.removeHandler(before)
        before.close()
    root.addHandler(handler)
    own = logging.getLevelName(level.upper())
    root.setLevel(logging.INFO if own < logging.INFO else max(own, logging.WARNING))
    logger.setLevel(own)


def _add(fields: Fields) -> Callable[[logging.LogRecord], bool]:
    def add(record: logging.LogRecord) -> bool:
        record.__dict__["fields"] = {**fields(), **record.__dict__.get("fields", {})}
        return True

    return add


class TextFormat(logging.Formatter):
    """One line for people; further ones only for traces. Control characters are spelled out, so that nobody can forge
    lines or move a terminal's cursor.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.rstrip("\n").replace("\n", "\\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        more = record.__dict__.get("more", "")  # what `fields` holds, where it was put into words already
        request = record.__dict__.get("fields", {}).get("request_id", "")
        if not more and request and request not in text:
            more = f"({request})"
        if more:
            first, newline, trace = text.partition("\n")
            text = f"{first} {more}{newline}{trace}"
        return text.translate(CONTROL)


class JsonFormat(logging.Formatter):
    """One JSON object a line: time, level, logger, message, exception where there is one, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().rstrip("\n"),
            **record.__dict__.get("fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogHandler(logging.Handler):
    """Hands lines to a thread that writes them to a file descriptor."""

    def __init__(self, file: int, format: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(format)
        self.file = file
        self.lost = 0
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._torn = ""  # what ends a line of which only the beginning could be written
        self.thread = threading.Thread(target=self._write_all, name="tenfold-log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # arguments that do not fit the message: a mistake of ours, no reason to fail
            line = f"a log line of {record.name} could not be formatted: {error!r}"
        with self._changed:
            if len(self._lines) < WAITING_LINES:
                self._lines.append(line)
                self._changed.notify_all()
            else:
                self.lost += 1

    def flush(self) -> None:
        """Waits, but not long, until what was logged is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._busy, LAST_WORDS)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        super().close()

    def _write_all(self) -> None:
        while (line := self._next()) is not None:
            if (self.lost and not self._tell_lost()) or not self._write(line):
                self._count(1)

    def _tell_lost(self) -> bool:
        lost = self.lost
        words = "%d log lines were lost: they could not be written."
        notice = logging.LogRecord(logger.name, logging.WARNING, "", 0, words, (lost,), None)
        if told := self._write(self.format(notice)):
            self._count(-lost)
        return told

    def _count(self, lost: int) -> None:
        with self._changed:
            self.lost += lost

    def _next(self) -> str | None:
        """The next line as soon as there is one; None at the end."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines or self._closing)
            self._busy = bool(self._lines)
            return self._lines.popleft() if self._lines else None

    def _write(self, line: str) -> bool:
        """False: it could not be written."""
        if len(line) > LONGEST_LINE:
            line = line[:LONGEST_LINE] + " ..."
        whole = memoryview((self._torn + line + "\n").encode("utf-8", "backslashreplace"))
        rest = whole
        try:
            while rest:
                rest = rest[os.write(self.file, rest) :]
        except OSError:  # ENOSPC, EPIPE, EIO, a closed descriptor; none of them is a reason to stop serving
            self._torn = "\n" if len(rest) < len(whole) else self._torn
            return False
        self._torn = ""
        return True


def announce(line: str) -> None:
    """A line for whoever started the program. Nothing happens where standard error takes no more; not through
    `sys.stderr`, whose buffer would complain at the end.
    """
    with suppress(OSError):
        os.write(2, (line + "\n").encode("utf-8", "backslashreplace"))


class Timeline:
    """Named phases with their seconds, in order; `tenfold run` and `serve` print it once the model is ready."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append((name, time.perf_counter() - start))

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self.phases)
        return " · ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases) + f" · total {total:.2f} s"
