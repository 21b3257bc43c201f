"""Log lines: their two forms, and that nothing that goes wrong with writing them reaches who logs."""

import json
import logging
import os
import threading

import pytest

from tenfold.base import log
from tenfold.base.log import LogHandler, TextFormat


@pytest.fixture
def logged(tmp_path):
    """`logged(format, fields)` starts logging to a file; calling what it returns is the lines."""
    before = logging.getLogger().level, logging.getLogger("tenfold").level
    files = []

    def start(format, fields=None, level="info"):
        path = tmp_path / "log"
        files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        log.configure(level, format, fields, files[-1])

        def lines():
            handlers()[0].flush()
            return path.read_text().splitlines()

        return lines

    yield start
    for handler in handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()
    for file in files:
        os.close(file)
    logging.getLogger().setLevel(before[0])
    logging.getLogger("tenfold").setLevel(before[1])


def handlers():
    return [h for h in logging.getLogger().handlers if isinstance(h, LogHandler)]


def test_json_lines(logged):
    lines = logged("json", lambda: {"request_id": "req-1", "model": "m"})
    logging.getLogger("tenfold.x").info("ä %s\n\x1b[2J", "b", extra={"fields": {"status": 200}})
    try:
        raise KeyError("secret place")
    except KeyError:
        logging.getLogger("other").exception("bad")
    first, second = map(json.loads, lines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "tenfold.x",
        "message": "ä b\n\x1b[2J",
        "request_id": "req-1",
        "model": "m",
        "status": 200,
    }
    assert second["level"] == "error"
    assert second["exception"].startswith("Traceback")


def test_text_lines_cannot_be_forged(logged):
    lines = logged("text", lambda: {"request_id": "req-1"})
    logging.getLogger("tenfold.x").info("a\n2026 INFO forged\x1b[2J\x9b")
    (line,) = lines()
    assert line.endswith(r"INFO tenfold.x: a\n2026 INFO forged\x1b[2J\x9b (req-1)")


def test_levels(logged):
    lines = logged("text", level="error")
    logging.getLogger("tenfold").warning("no")
    logging.getLogger("other").warning("no")
    logging.getLogger("other").error("yes")
    assert len(lines()) == 1
    lines = logged("text", level="debug")
    logging.getLogger("tenfold").debug("yes")
    logging.getLogger("other").info("yes")
    logging.getLogger("other").debug("no")
    assert len(lines()) == 2
    assert len(handlers()) == 1


def test_a_line_that_cannot_be_formatted_is_no_failure(logged):
    lines = logged("text")
    handlers()[0].handle(logging.makeLogRecord({"msg": "%d", "args": ("x",), "name": "tenfold"}))
    logging.getLogger("tenfold").info("x" * (log.LONGEST_LINE + 9))
    first, second = lines()
    assert "could not be formatted" in first
    assert second.endswith("x ...")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_costs_lines_and_says_so_afterwards(logged):
    lines = logged("json")
    (handler,) = handlers()
    file = handler.file
    full = os.open("/dev/full", os.O_WRONLY)
    handler.file = full
    for _ in range(3):
        logging.getLogger("tenfold").info("lost")
    handler.flush()
    handler.file = file
    os.close(full)
    logging.getLogger("tenfold").info("kept")
    notice, kept = map(json.loads, lines())
    assert notice["message"].startswith("3 log lines were lost")
    assert kept["message"] == "kept"
    assert handler.lost == 0


def test_a_closed_pipe_costs_lines():
    read, write = os.pipe()
    os.close(read)
    handler = LogHandler(write, TextFormat())
    handler.handle(logging.makeLogRecord({"msg": "lost", "levelname": "INFO"}))
    handler.flush()
    assert handler.lost == 1
    handler.close()
    os.close(write)


def test_a_reader_that_sleeps_blocks_nobody(monkeypatch):
    monkeypatch.setattr(log, "WAITING_LINES", 8)
    monkeypatch.setattr(log, "LAST_WORDS", 0.01)
    read, write = os.pipe()
    handler = LogHandler(write, TextFormat())
    sent = 0
    while not handler.lost:  # 64 KiB of a pipe, 8 lines of a queue, and the first that is too much
        handler.handle(logging.makeLogRecord({"msg": "x" * 60_000, "levelname": "INFO"}))
        sent += 1
    assert sent <= 1 + 1 + 8 + 1 + 1
    handler.flush()  # gives up
    handler.close()
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(read, 1 << 20), b"")])
    drain.start()
    handler.thread.join(10)
    os.close(write)
    drain.join(10)
    os.close(read)
    assert not drain.is_alive()


def test_a_torn_line_is_ended_before_the_next(tmp_path, monkeypatch):
    path = tmp_path / "log"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    handler = LogHandler(file, logging.Formatter("%(message)s"))
    whole = os.write
    room = [5]

    def little(to, data):
        if to != file or room[0] is None:
            return whole(to, data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        count, room[0] = whole(to, data[: room[0]]), 0
        return count

    monkeypatch.setattr(log.os, "write", little)
    handler.handle(logging.makeLogRecord({"msg": "a long line"}))
    handler.flush()
    room[0] = None
    handler.handle(logging.makeLogRecord({"msg": "kept"}))
    handler.flush()
    assert path.read_text().splitlines() == ["a lon", "1 log lines were lost: they could not be written.", "kept"]
    handler.close()
    os.close(file)


def test_announcements_survive_a_closed_standard_error(monkeypatch):
    def fail(file, data):
        raise BrokenPipeError

    monkeypatch.setattr(log.os, "write", fail)
    log.announce("hello")
