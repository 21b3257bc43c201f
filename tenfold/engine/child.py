"""`Child`: one engine process as its parent sees it.

Invariant: `end` leaves no process, no file descriptor and no file of it behind, and may be called at any moment.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress

from tenfold.base.config import EngineConfig
from tenfold.engine import wire
from tenfold.engine.channel import MOST, Channel

logger = logging.getLogger(__name__)

DATAGRAM = 1 << 18  # bytes; longer messages go by the other socket
DYING = 10.0  # seconds a killed process may take to be gone; only the kernel can delay it
DUMPING = 0.5  # seconds to write the stacks before it is killed


class Child:
    """Starts `process` with an engine made by `factory` ("module:class"). beat: seconds between its heartbeats.

    Messages go through a pair of connected sockets that have no name, so nobody else can ever speak to either end and
    nothing is left if this process is killed. What says that requests have begun comes through a second pair. Raises
    OSError where the process cannot be started.
    """

    def __init__(self, factory: str, config: EngineConfig, beat: float) -> None:
        self._cleanup = ExitStack()
        try:
            self._open(factory, config, beat)
        except BaseException:
            self._cleanup.close()
            raise

    def _open(self, factory: str, config: EngineConfig, beat: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = Channel(ours)
        self._cleanup.callback(self._channel.close)
        with theirs:
            self._begun, begun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._datagram = memoryview(bytearray(DATAGRAM))
            self._cleanup.callback(self._begun.close)
            with begun:
                self._process = self._start(theirs.fileno(), begun.fileno())
                self._cleanup.callback(self._reap)
                self._pidfd = self._watch_process()
                level = logging.getLogger("tenfold").getEffectiveLevel()
                self._introduce(wire.Start(factory, config, theirs.fileno(), begun.fileno(), beat, level))

    def _start(self, *descriptors: int) -> "subprocess.Popen[bytes]":
        # -P and PYTHONPATH: it imports from where this process does, and never from the current folder by accident.
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "tenfold.engine.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # ours may carry an answer
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=descriptors,
        )

    def _watch_process(self) -> int:
        """A descriptor that tells of its end, or -1 where the system has none and `ended` must be asked."""
        with suppress(AttributeError, OSError):
            pidfd = os.pidfd_open(self._process.pid)
            self._cleanup.callback(os.close, pidfd)
            return pidfd
        return -1

    def _introduce(self, start: wire.Start) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which `ended` will say
            wire.write_start(self._process.stdin, start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> str:
        """How the process ended; empty while it runs."""
        code = self._process.poll()
        if code is None:
            return ""
        if code >= 0:
            return f"ended with code {code}"
        known = {s.value: s.name for s in signal.Signals}
        return f"was ended by {known.get(-code, f'signal {-code}')}"

    def has_room(self, message: bytes) -> bool:
        """Whether the process has read enough of what it was sent to be sent this, too."""
        return self._channel.waiting + len(message) < MOST

    def send(self, message: bytes) -> None:
        """From any thread; never waits. Goes nowhere once the process has ended."""
        self._channel.send(message)

    def receive(self, seconds: float, wake: int) -> list[wire.Event]:
        """What has come, after waiting for something: an event, the end of the process, or `wake` to be readable."""
        readable(seconds, wake, self._pidfd, -1 if self._channel.ended else self._channel.fd)
        return self.read()

    def wait(self, seconds: float, wake: int) -> None:
        """As `receive`, where another thread reads the events."""
        readable(seconds, wake, self._pidfd)

    @property
    def fd(self) -> int:
        """Readable when there may be something to `read`, and at the end."""
        return self._channel.fd

    @property
    def silent(self) -> bool:
        """Whether it will never send anything again, for its end is closed."""
        return self._channel.ended

    def read(self) -> list[wire.Event]:
        """Messages that are here, first those that say what has begun; they are read last, so that none is missing
        that was sent before an output. Raises msgspec.MsgspecError.
        """
        events: list[wire.Event] = [wire.decode_event(message) for message in self._channel.read()]
        begun: list[wire.Event] = []
        with suppress(BlockingIOError):
            while count := self._begun.recv_into(self._datagram, 0, socket.MSG_DONTWAIT):
                begun.append(wire.decode_event(bytes(self._datagram[:count])))
        return begun + events

    def dump(self) -> None:
        """Have it write the stacks of its threads to standard error, even if it is stuck."""
        if hasattr(signal, "SIGUSR1"):
            self._process.send_signal(signal.SIGUSR1)

    def dump_and_kill(self) -> None:
        """A stopped process is let go on for a moment, for only then can it show where it is."""
        self.dump()
        if hasattr(signal, "SIGCONT"):
            self._process.send_signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DUMPING)
        self._process.kill()

    def end(self) -> None:
        """Kill it if it still runs, and clean up. Idempotent."""
        self._cleanup.close()

    def _reap(self) -> None:
        process = self._process
        process.kill()
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(DYING)
        except subprocess.TimeoutExpired:
            logger.error("engine process %d was killed and is still there", process.pid)


def readable(seconds: float, *descriptors: int) -> None:
    """Wait until one of them can be read, or the time is up; -1 stands for none."""
    poller = select.poll()
    for descriptor in descriptors:
        if descriptor != -1:
            poller.register(descriptor, select.POLLIN)
    poller.poll(1e3 * seconds)


class Wake:
    """Ends another thread's `Child.receive`; `fd` is readable from `set` to `wait`."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        self._lock = threading.Lock()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)

    def set(self) -> None:
        with self._lock, suppress(BlockingIOError):
            if self._write != -1:
                os.write(self._write, b"\0")

    def wait(self, seconds: float) -> None:
        """Until it is set, or the time is up; then it is not set any more."""
        readable(seconds, self.fd)
        self.clear()

    def clear(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass

    def close(self) -> None:
        with self._lock:
            for fd in (self.fd, self._write):
                os.close(fd)
            self.fd = self._write = -1
