"""The app around a fake engine as a server on a port, for what only real connections show."""

import socket
import threading
from typing import Any

import uvicorn

from tenfold.serve.app import create_app
from tenfold.serve.connection import bounded
from tenfold.serve.settings import ServeConfig
from tests.serve.conftest import FakeLLM


class Live:
    """A server on a free port, in a thread."""

    def __init__(self, llm: FakeLLM | None = None, **settings: Any) -> None:
        self.settings = ServeConfig(**settings)
        self.llm = llm or FakeLLM()
        config = uvicorn.Config(
            create_app({"tiny": self.llm}, self.settings),  # type: ignore[dict-item]
            http=bounded(self.settings),
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
        )
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), 10)

    def send(self, *parts: bytes) -> bytes:
        """All that comes back until the server closes."""
        with self.connect() as client:
            try:
                for part in parts:
                    client.sendall(part)
            except OSError:
                pass  # it may close before it has read everything
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    found = bytearray()
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionError:
        pass
    return bytes(found)
