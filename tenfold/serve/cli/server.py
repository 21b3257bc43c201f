"""`tenfold serve`: the socket first (a taken port should not take a model load to be noticed), then HTTP that answers
/health and says that it is not ready, then the models.

Invariant: told to stop, the server stops: at the first signal when its requests have ended or their time is up, at the
second at once; and whichever way it ends, no engine outlives it.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tenfold.base import log
from tenfold.base.config import EngineConfig
from tenfold.base.log import announce
from tenfold.base.table import entry
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.app import App, create_app
from tenfold.serve.cli.load import load
from tenfold.serve.cli.names import classifier_names, served_names
from tenfold.serve.cli.sources import Settled
from tenfold.serve.connection import bounded
from tenfold.serve.keys import Keys
from tenfold.serve.logs import request_fields
from tenfold.serve.routes.health import WhileLoading
from tenfold.serve.service import Service
from tenfold.serve.settings import ServeConfig

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds; longer than the 5 s of common clients, so that they and not we end an idle connection
BACKLOG = 2048  # connections that may wait to be accepted; the system may allow fewer
LAST_WORDS = 5.0  # seconds in which requests that were ended must have told their clients so
CLOSING = 10.0  # seconds that engines get to end, of which a step under way takes most
AT_ONCE = 1.0  # and at the second signal
KILLING = 2.0  # seconds to be rid of an engine that did not

Models = dict[str, AsyncLLM]
Classifiers = dict[str, Any]
OWN = {
    "classifier": "tenfold.serve.decide.own:open_own"
}  # brings PyTorch into this process, so only where it is wanted


def serve(settled: Settled) -> int:
    """Serve until a signal says to stop. Returns the exit status: 0, or 128 and the number of a second signal."""
    settings = settled.server
    settings.check()
    Keys.of(settings)  # a file of keys that is of no use should not take a model load to be noticed
    names = served_names(settled.models, settings.served_name)
    named = classifier_names(settings.classifier, names)
    listener = bind(settings.host, settings.port)
    raise_file_limit()
    log.configure(settings.log_level, settings.log_format, request_fields)
    for key in settled.file.exposed_secrets:
        logger.warning("%s holds %s and others may read it: chmod 600", settled.file.path, key)
    models: Models = {}
    classifiers: Classifiers = {}

    def start() -> None:
        start_classifiers(classifiers, named, settings)
        start_all(models, names, settled)

    server = Server(listener, settings, models, [*names, *named], start, classifiers)
    server.hold_signals()
    try:
        server.run(sockets=[listener])
    finally:
        server.finished = True
        close_all({**models, **classifiers}, AT_ONCE if server.forced else CLOSING)
    if server.failure is not None:
        raise server.failure
    return 128 + server.forced if server.forced else 0


def start_all(models: Models, names: list[str], settled: Settled) -> None:
    """Load the models into `models`, one after the other: loading takes more memory than running does. Raises
    ValueError before anything is loaded where they do not fit together.
    """
    settings = settled.server
    for name, config in planned(names, [model.config for model in settled.models]).items():
        first = not models
        models[name] = load(
            AsyncLLM, config, name=name, first=first, isolate=settings.isolate, watchdog=settings.watchdog
        )


def start_classifiers(classifiers: Classifiers, named: Mapping[str, str], settings: ServeConfig) -> None:
    """Open them into `classifiers`. Raises ValueError for a folder that holds none."""
    for name, path in named.items():
        classifiers[name] = entry(OWN, "classifier", "kind")(name, path, settings)


def planned(names: list[str], configs: list[EngineConfig]) -> Mapping[str, EngineConfig]:
    """The settings of each model; of several with their shares of memory. One engine plans for itself."""
    if len(names) == 1:
        return {names[0]: configs[0]}
    # Not at the top: it needs PyTorch, which a single engine's process imports while this one starts.
    from tenfold.serve.cli.plan import as_flags, joint_plan, lines

    together = joint_plan(names, configs)
    announce(as_flags("\n".join(lines(together))))
    together.require()
    return together.configs


def close_all(models: Mapping[str, Any], seconds: float) -> None:
    """End all engines at the same time, each after the step under way if that takes no longer."""
    threads = [threading.Thread(target=llm.close, args=(seconds,), daemon=True) for llm in list(models.values())]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds + KILLING
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound but not yet listening. Raises OSError with a sentence."""
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}. Choose another with --host or --port.") from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL under which a client reaches a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """As many connections as the system allows this process, not as many as a shell usually does."""
    try:
        import resource  # not on Windows, which has no such limit
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def uvicorn_config(app: Any, settings: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded(settings),
        ws="none",
        interface="asgi3",
        proxy_headers=False,  # nobody can tell us that he is somebody else
        log_config=None,
        access_log=False,  # `logs.RequestLog` writes ours
        lifespan="off",
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(LAST_WORDS),
    )


def give_way() -> None:
    """This thread waits for a free processor rather than take one from a thread of an engine, which would keep the
    others of its pool waiting. After the engines were started: they would inherit it.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Server(uvicorn.Server):
    """Loads the models once it answers, says when it is ready in a line that scripts can wait for, and drains.

    start: loads `models`, called on a thread. failure: why it could not. forced: number of the second signal, 0 without
    one. finished: nothing is served any more, only engines are to be closed.
    """

    def __init__(
        self,
        listener: socket.socket,
        settings: ServeConfig,
        models: Models,
        names: list[str],
        start: Callable[[], None],
        classifiers: Classifiers | None = None,
    ) -> None:
        super().__init__(uvicorn_config(self._answer, settings))
        self.what = f"{', '.join(names)} on {address(listener)}/v1"
        self.settings = settings
        self.models = models
        self.classifiers = {} if classifiers is None else classifiers
        self.failure: BaseException | None = None
        self.forced = 0
        self.finished = False
        self._start = start
        self._app: ASGIApp = WhileLoading(names)
        self._service: Service | None = None
        self._drain: Drain | None = None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def hold_signals(self) -> None:
        """Handle signals before and after uvicorn does, too, so that none ends this process half-way."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal begins to drain, the second ends that."""
        if self._drain is None:
            self._drain = Drain(self._service, self.models, self.settings.drain_timeout)
            announce(f"stopping: {self._drain} Ctrl-C or SIGTERM again stops at once.")
        elif self.finished:
            os._exit(128 + sig)  # engine processes notice and end, too
        elif not self.forced:
            self.forced = sig
            self.should_exit = self.force_exit = True
            self.config.timeout_graceful_shutdown = 0
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a trace of each task that is cancelled
            timer = threading.Timer(AT_ONCE + 2 * KILLING, os._exit, (128 + sig,))  # whatever may still hold it up
            timer.daemon = True
            timer.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        # A thread of our own: one of the event loop's would keep the process from ending while a model loads.
        threading.Thread(target=self._load, args=(loop,), name="tenfold-load", daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._start()
            app = create_app(self.models, self.settings, self.classifiers)
            loop.call_soon_threadsafe(self._open, app)
        except BaseException as error:
            self.failure = error
            self.should_exit = True

    def _open(self, app: App) -> None:
        if self._drain is None:
            self._app, self._service = app, app.state.service
            if self.settings.isolate:
                give_way()
            announce(f"serving {self.what} · stop with Ctrl-C")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.forced:
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # else uvicorn would answer 500 for the tasks it cancels
        await super().shutdown(sockets)
        if self._service is not None and not self.forced:
            await asyncio.to_thread(self._service.metrics.close)

    async def on_tick(self, counter: int) -> bool:
        if self._drain is not None and self._drain.over:
            self.should_exit = True
        return await super().on_tick(counter)


class Drain:
    """The end of a server: no new work from now on; what runs has `seconds`, then its engines are closed, which ends it
    with an error that its clients are told. `service` is None while models load.
    """

    def __init__(self, service: Service | None, models: Models, seconds: float) -> None:
        self._service = service
        self._models = models
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._told_by = 0.0
        if service is not None:
            service.draining = service.stopping = True

    def __str__(self) -> str:
        if self._service is None:
            return "no model is loaded yet."
        running = self._under_way()
        return (
            f"requests under way: {running}; they get {self._seconds} s to end." if running else "nothing is running."
        )

    def _under_way(self) -> int:
        """Requests over HTTP, or where they are more those of the engines: some go on without a client."""
        assert self._service is not None
        inside = sum(getattr(llm, "open_requests", 0) for llm in self._models.values())
        return max(self._service.open_requests, inside)

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for. Asked for again and again, it moves things on."""
        now = time.monotonic()
        if self._service is None or not self._under_way():
            return True
        if not self._told_by and now >= self._until:
            logger.warning("the time to drain is over; requests that are ended: %d", self._under_way())
            self._told_by = now + LAST_WORDS
            threading.Thread(target=close_all, args=(self._models, LAST_WORDS), daemon=True).start()
        return bool(self._told_by) and now >= self._told_by
