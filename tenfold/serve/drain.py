"""Stopping in order: which requests are still at work, so that a server that was told to stop knows when it may."""

from starlette.types import ASGIApp, Receive, Scope, Send

from tenfold.serve.service import Service

WATCHING = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that ask for no work: nobody waits for a status page


class OpenRequests:
    """ASGI middleware behind the guard: `service.open_requests` counts what was let in, until its last byte is sent."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in WATCHING:
            await self.app(scope, receive, send)
            return
        self.service.open_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.service.open_requests -= 1
