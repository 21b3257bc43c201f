"""The application: routes, error handlers and the guard before them, around one engine."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import tenfold
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.errors import ApiError, on_api_error, on_http_exception
from tenfold.serve.guard import Guard
from tenfold.serve.keys import Keys
from tenfold.serve.limits import Limits
from tenfold.serve.observe import Observer
from tenfold.serve.protocol.chat import ChatRequest
from tenfold.serve.protocol.completions import CompletionRequest
from tenfold.serve.routes import chat, completions, metrics, models
from tenfold.serve.service import Service
from tenfold.serve.settings import ServeConfig
from tenfold.serve.stream import ClientGone


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what logs call it."""
    return Response(status_code=499)


class App(FastAPI):
    """Describes the request bodies too, which the routes read themselves: that way every error has OpenAI's shape."""

    def openapi(self) -> dict[str, Any]:
        described = self.openapi_schema is not None
        schema = super().openapi()
        if not described:
            bodies = [(model, "validation") for model in BODIES]
            _, found = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            schema["components"]["schemas"] |= found["$defs"]
        return schema


ROUTES = (chat, completions, models, metrics)
BODIES = (ChatRequest, CompletionRequest)


def create_app(models: Mapping[str, AsyncLLM], settings: ServeConfig | None = None) -> App:
    """An ASGI application that serves models under their names, the first by default. Who made them closes them."""
    settings = settings or ServeConfig()

    app = App(title="Tenfold", version=tenfold.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = Service(models, settings)
    for module in ROUTES:
        app.include_router(module.router)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    service, keys, limits = app.state.service, Keys.of(settings), Limits.of(settings)
    app.state.keys, app.state.limits = keys, limits
    app.add_middleware(Guard, settings=settings, service=service, keys=keys, limits=limits)
    app.add_middleware(Observer, metrics=app.state.service.metrics)  # last, so that it stands before all others
    return app
