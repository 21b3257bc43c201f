"""`tenfold serve`: the socket first (a taken port should not take a model load to be noticed), then the model, then
HTTP.
"""

import logging
import signal
import socket
import sys
from typing import Any

import uvicorn

from tenfold.base.config import EngineConfig
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.app import create_app
from tenfold.serve.cli.load import display_name, load
from tenfold.serve.settings import ServeConfig

KEEP_ALIVE = 75  # seconds; longer than the 5 s of common clients, so that they and not we end an idle connection


def serve(config: EngineConfig, settings: ServeConfig) -> None:
    """Serve until a signal says to stop; a second Ctrl-C does not wait for running requests."""
    settings.check()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr
    )
    listener = bind(settings.host, settings.port)
    name = settings.served_name or display_name(config.model)
    llm = load(AsyncLLM, config)
    try:
        app = create_app({name: llm}, settings)
        server = Server(uvicorn_config(app, settings), f"{name} on {address(listener)}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _ignore)  # uvicorn raises the signal again when it is done; by then all is well
        server.run(sockets=[listener])
    finally:
        llm.close()


def _ignore(number: int, frame: Any) -> None:
    pass


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


def uvicorn_config(app: Any, settings: ServeConfig) -> uvicorn.Config:
    if settings.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=settings.access_log,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.drain_timeout,
    )


class Server(uvicorn.Server):
    """Says when it is ready, in one line that scripts can wait for."""

    def __init__(self, config: uvicorn.Config, what: str) -> None:
        super().__init__(config)
        self.what = what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            print(f"serving {self.what}/v1 · stop with Ctrl-C", file=sys.stderr, flush=True)
