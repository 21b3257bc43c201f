"""A real `tenfold serve` process to measure or to torture, and a client that costs next to nothing.

The client speaks HTTP/1.1 over plain sockets: on a machine of two cores a comfortable client would take more time than
the server it is to measure. A quiet one sleeps from the first event of a stream until much has come or the server has
closed the connection: clients are on other machines, and what they do with a token is no cost of the server. All the
server does is counted, to the arrival of every event in the client's socket.
"""

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

READY = 120.0  # seconds until a server must be ready
ENDED = 60.0  # seconds until it must have ended
END = b"data: [DONE]"
MUCH = 64 << 10  # bytes that wake up a quiet client


def command(*arguments: str) -> list[str]:
    """The command line of `tenfold` with `arguments`, as this Python runs it."""
    return [sys.executable, "-m", "tenfold.serve.cli", *arguments]


class ServerProcess:
    """`tenfold serve` with `arguments`, ready to answer. Its standard error is kept in `log`, which grows while it
    writes. environment: all of it; None: ours.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.log: list[str] = []
        self.url = ""
        self._found = threading.Event()
        env = {**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"}
        line = command("serve", "--port", "0", *arguments)
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=env)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._found.wait(READY) or not self.url:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log[-20:]))
        host = urlsplit(self.url)
        assert host.hostname
        self.address = (host.hostname, host.port or 80)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"on (http://\S+)/v1", line):
                self.url = found[1]
                self._found.set()
        self._found.set()

    @property
    def engines(self) -> list[int]:
        """Process ids of the engines: children that run `tenfold.engine.process`."""
        return [pid for pid in children(self.process.pid) if "tenfold.engine.process" in command_line(pid)]

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.wait()

    def wait(self) -> int:
        """The exit status, once the server has ended by itself and the log is complete."""
        status = self.process.wait(ENDED)
        self._reader.join(ENDED)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[ServerProcess]:
    """environment: added to ours."""
    server = ServerProcess(*arguments, environment={**os.environ, **environment})
    try:
        yield server
    finally:
        server.stop()


def children(pid: int) -> list[int]:
    """Process ids of the direct children (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        if int(status.rpartition(")")[2].split()[1]) == pid:
            found.append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def resident(pid: int) -> int:
    """Bytes of memory of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


def http_request(path: str, body: bytes = b"", method: str = "", headers: Iterable[str] = ()) -> bytes:
    """The bytes of a request."""
    method = method or ("POST" if body else "GET")
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *headers]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def call(
    address: tuple[str, int], path: str, body: Any = None, *, timeout: float = 60.0, headers: Iterable[str] = ()
) -> tuple[int, Any]:
    """Status and JSON (or text) of one request on a connection of its own."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    with socket.create_connection(address, timeout) as connection:
        connection.sendall(http_request(path, data, headers=("connection: close", *headers)))
        received = bytearray()
        while chunk := connection.recv(65536):
            received += chunk
    head, _, rest = bytes(received).partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head else 0
    if b"transfer-encoding: chunked" in head.lower():
        rest = _joined(rest)
    try:
        return status, json.loads(rest)
    except ValueError:
        return status, rest.decode(errors="replace")


def _joined(chunked: bytes) -> bytes:
    """The body of a chunked response."""
    body, rest = bytearray(), chunked
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        if not length:
            break
        body += rest[:length]
        rest = rest[length + 2 :]
    return bytes(body)


@dataclass(slots=True)
class StreamResult:
    """What came over one connection. Times are `time.perf_counter()` seconds."""

    sent: float
    first: float | None = None  # first event
    last: float | None = None
    events: int = 0
    ended: bool = False  # with data: [DONE]
    head: bytes = b""
    tail: bytearray = field(default_factory=bytearray)

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1]) if self.head else 0

    def take(self, data: bytes, now: float) -> None:
        if not self.head:
            self.head = bytes(data[: data.find(b"\r\n")])
        events = data.count(b"data: ")
        if events and self.first is None:
            self.first = now
        self.events += events
        self.last = now
        self.tail += data
        if END in self.tail:
            self.ended = True
        del self.tail[:-400]


def run_streams(
    address: tuple[str, int], path: str, bodies: Sequence[Any], timeout: float = 300.0, quiet: bool = False
) -> list[StreamResult]:
    """Send all bodies at once, each on a connection made before, and read every stream to its end. quiet: after its
    first event a stream wakes nobody until MUCH has come or it is over; `last` is still the moment of its end, which
    the server tells by closing the connection.
    """
    headers = ("connection: close",) if quiet else ()
    requests = [http_request(path, json.dumps(body).encode(), headers=headers) for body in bodies]
    connections = [socket.create_connection(address, timeout) for _ in bodies]
    selector = selectors.DefaultSelector()
    results = []
    try:
        for connection, request in zip(connections, requests):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            result = StreamResult(time.perf_counter())
            results.append(result)
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, result)
        limit = time.perf_counter() + timeout
        while selector.get_map() and time.perf_counter() < limit:
            for key, _ in selector.select(1.0):
                begun = key.data.first
                if not _read_some(key.fileobj, key.data):  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
                elif quiet and key.data.first and not begun:
                    key.fileobj.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MUCH)  # type: ignore[union-attr]
    finally:
        selector.close()
        for connection in connections:
            connection.close()
    return results


def _read_some(connection: socket.socket, result: StreamResult) -> bool:
    """False at the end of the stream."""
    try:
        data = connection.recv(65536)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if data:
        result.take(data, time.perf_counter())
    return bool(data) and not result.ended
