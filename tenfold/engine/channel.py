"""`Channel`: messages over a pair of connected sockets, each with its length in front.

No thread stands between writer and reader: who sends writes to the socket, and the reader is whoever waits for it to
become readable. On a machine whose cores the engine wants, each thread that would have to wake up between the two
costs a token 0.1 to 0.3 ms.

Invariant: sending never waits. What the socket does not take is kept, in its order, for a thread that exists only
meanwhile; `waiting` says how much that is, and whoever sends decides what is too much.
"""

import select
import socket
import threading
import time
from contextlib import suppress

import msgspec

from tenfold.engine.wire import LENGTH

MOST = 1 << 28  # bytes of a message, and of those that wait: an end that reads never leaves so many
CHUNK = 1 << 18  # bytes to read at once
FLUSHING = 1.0  # seconds between two looks at whether the channel was closed


class Channel:
    """One end; sending may be done from any thread, reading by one at a time. Owns `end`."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(False)
        self._lock = threading.Lock()
        self._backlog = bytearray()
        self._flusher: threading.Thread | None = None
        self._closed = False
        self._received = bytearray()
        self._chunk = memoryview(bytearray(CHUNK))  # made once: memory of this size for every read wears the heap out
        self.ended = False  # the other end is closed, and all it sent was read

    @property
    def fd(self) -> int:
        """Readable when there may be something to `read`, and at the end."""
        return self._socket.fileno()

    @property
    def waiting(self) -> int:
        """Bytes that were sent and that the socket has not taken."""
        return len(self._backlog)

    def send(self, message: bytes) -> None:
        """Goes nowhere once either end is closed."""
        data = LENGTH.pack(len(message)) + message
        with self._lock:
            if self._closed:
                return
            if self._backlog:
                self._backlog += data
                return
            sent = self._write(data)
            if sent < len(data):
                self._backlog += memoryview(data)[sent:]
                self._flusher = threading.Thread(target=self._flush, name="tenfold-channel", daemon=True)
                self._flusher.start()

    def _write(self, data: bytes | bytearray) -> int:
        """Bytes that are done with; with the lock held."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # nobody will read it
            return len(data)

    def _flush(self) -> None:
        """Until nothing waits."""
        poller = select.poll()
        poller.register(self._socket.fileno(), select.POLLOUT)
        while True:
            poller.poll(int(1e3 * FLUSHING))
            with self._lock:
                if self._closed:
                    return
                del self._backlog[: self._write(self._backlog)]
                if not self._backlog:
                    return

    def read(self) -> list[bytes]:
        """Messages that are here. Raises msgspec.DecodeError."""
        while not self.ended:
            try:
                count = self._socket.recv_into(self._chunk)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            self.ended = not count
            self._received += self._chunk[:count]
            if count < CHUNK:
                break
        return self._split()

    def _split(self) -> list[bytes]:
        received, at, found = self._received, 0, []
        while len(received) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, at)
            if length > MOST:
                raise msgspec.DecodeError(f"a message of {length} bytes; at most {MOST} are allowed")
            if len(received) - at - LENGTH.size < length:
                break
            at += LENGTH.size
            found.append(bytes(memoryview(received)[at : at + length]))
            at += length
        del received[:at]
        return found

    def close(self, seconds: float = 0.0) -> None:
        """Waits so long for what has not been sent. Idempotent."""
        until = time.monotonic() + seconds
        flusher = self._flusher
        if flusher is not None and flusher is not threading.current_thread():
            flusher.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._closed = True
            self._backlog.clear()
            with suppress(OSError):  # wakes a flusher, and tells the other end even where a copy of ours is open
                self._socket.shutdown(socket.SHUT_RDWR)
        if flusher is not None:
            flusher.join()
        self._socket.close()
