"""`Child`: one engine process as its parent sees it.

Invariant: `end` leaves no process, no file descriptor and no file of it behind, and may be called at any moment.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import zmq

from tenfold.base.config import EngineConfig
from tenfold.engine import wire

logger = logging.getLogger(__name__)

LONGEST = 90  # characters of a socket's path; systems allow about 104
NOBLOCK = int(zmq.NOBLOCK)
DATAGRAM = 1 << 18  # bytes; longer messages go by the other socket
LAST = 100  # milliseconds in which what a process sent before its end has come through
DYING = 10.0  # seconds a killed process may take to be gone; only the kernel can delay it
DUMPING = 0.5  # seconds to write the stacks before it is killed


class Child:
    """Starts `process` with an engine made by `factory` ("module:class"). beat: seconds between its heartbeats.

    Messages go through two sockets in a folder that only this user can open, and that is gone once both are connected
    (`settle`): so nobody else ever can, and nothing is left if this process is killed. What says that requests have
    begun comes through a pair of sockets without a name, and is there even if the process is killed the moment after.
    Raises OSError where the process cannot be started.
    """

    def __init__(self, factory: str, config: EngineConfig, beat: float) -> None:
        self._lock = threading.Lock()
        self._cleanup = ExitStack()
        try:
            self._open(factory, config, beat)
        except BaseException:
            self._cleanup.close()
            raise

    def _open(self, factory: str, config: EngineConfig, beat: float) -> None:
        self._folder = private_folder()
        self._cleanup.callback(self.settle)
        events, commands = (f"ipc://{self._folder}/{name}" for name in ("events", "commands"))
        context = zmq.Context()
        self._cleanup.callback(context.term)
        self._events = context.socket(zmq.PULL)
        self._commands = context.socket(zmq.PUSH)
        for end in (self._events, self._commands):
            self._cleanup.callback(end.close, 0)
            end.sndhwm = end.rcvhwm = 0
        self._events.bind(events)
        self._commands.connect(commands)  # messages wait here until it listens
        self._begun, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._cleanup.callback(self._begun.close)
        with theirs:
            self._process = self._start(theirs.fileno())
            begun = theirs.fileno()
        self._cleanup.callback(self._reap)
        self._pidfd = self._watch_process()
        self._poller = zmq.Poller()
        for readable in (self._events, *((self._pidfd,) if self._pidfd != -1 else ())):
            self._poller.register(readable, zmq.POLLIN)
        self._waker = -1
        level = logging.getLogger("tenfold").getEffectiveLevel()
        self._introduce(wire.Start(factory, config, events, commands, begun, beat, level))
        self._commands.send(wire.encode(wire.Hello()))

    def _start(self, begun: int) -> "subprocess.Popen[bytes]":
        # -P and PYTHONPATH: it imports from where this process does, and never from the current folder by accident.
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "tenfold.engine.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # ours may carry an answer
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(begun,),
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

    def settle(self) -> None:
        """Remove the sockets' folder: the process has said that it is connected, or it is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

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

    def send(self, message: bytes) -> None:
        """From any thread; never waits. Goes nowhere once the process has ended."""
        with self._lock:
            if not self._commands.closed:
                self._commands.send(message, zmq.NOBLOCK)

    def receive(self, seconds: float, wake: int) -> list[wire.Event]:
        """What has come, after waiting for something: an event, the end of the process, or `wake` to be readable."""
        if self._waker != wake:
            self._poller.register(wake, zmq.POLLIN)
            self._waker = wake
        self._poller.poll(int(seconds * 1000))
        return self.read()

    def wait(self, seconds: float, wake: int) -> None:
        """As `receive`, where another thread reads the events."""
        poller = zmq.Poller()
        for readable in (wake, self._pidfd):
            if readable != -1:
                poller.register(readable, zmq.POLLIN)
        poller.poll(int(seconds * 1000))

    def rest(self) -> list[wire.Event]:
        """More of what a process sent before it ended; nothing once that was all."""
        self._events.poll(LAST)
        return self.read()

    @property
    def fd(self) -> int:
        """Readable when there may be something to `read`: ZeroMQ tells of a change once, so all has to be read then."""
        return int(self._events.get(zmq.FD))

    def read(self) -> list[wire.Event]:
        """Messages that are here, first those that say what has begun; they are read last, so that none is missing
        that was sent before an output.
        """
        events: list[wire.Event] = []
        with suppress(zmq.Again):
            while True:
                events.append(wire.decode_event(self._events.recv(NOBLOCK)))
        begun: list[wire.Event] = []
        with suppress(BlockingIOError):
            while True:
                begun.append(wire.decode_event(self._begun.recv(DATAGRAM, socket.MSG_DONTWAIT)))
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
        with self._lock:
            self._commands.close(0)
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


def private_folder() -> Path:
    """A new folder for sockets, whose paths must be short."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="tenfold-", dir=place if len(place) < LONGEST - 32 else "/tmp"))


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
        poller = zmq.Poller()
        poller.register(self.fd, zmq.POLLIN)
        poller.poll(int(seconds * 1000))
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
