"""The application: routes, error handlers and the guard before them, around one engine."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import tenfold
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.decide.calibrate import read_temperatures
from tenfold.serve.decide.classify import Classifier
from tenfold.serve.drain import OpenRequests
from tenfold.serve.errors import ApiError, on_api_error, on_http_exception
from tenfold.serve.guard import Guard
from tenfold.serve.keys import Keys
from tenfold.serve.limits import Limits
from tenfold.serve.logs import RequestLog
from tenfold.serve.observe import Observer
from tenfold.serve.openapi import complete
from tenfold.serve.protocol.chat import ChatRequest
from tenfold.serve.protocol.completions import CompletionRequest
from tenfold.serve.protocol.decisions import ClassifyRequest, DecisionRequest
from tenfold.serve.protocol.embeddings import EmbeddingRequest
from tenfold.serve.protocol.messages import CountTokensRequest, MessagesRequest
from tenfold.serve.protocol.responses import InputTokensRequest, ResponsesRequest
from tenfold.serve.protocol.tokens import DetokenizeRequest, TokenizeRequest
from tenfold.serve.responses.store import Store
from tenfold.serve.routes import (
    admin,
    chat,
    classify,
    completions,
    decisions,
    embeddings,
    health,
    messages,
    metrics,
    models,
    responses,
    status,
    tokens,
)
from tenfold.serve.service import Service
from tenfold.serve.settings import ServeConfig
from tenfold.serve.shortcut import GONE, Shortcut, shortcuts
from tenfold.serve.stream import ClientGone


async def on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


class App(FastAPI):
    """Describes itself wholly: what `openapi.complete` adds, FastAPI cannot know."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = complete(super().openapi(), BODIES, self.state.service)
        return self.openapi_schema


ROUTES = (
    *(chat, completions, responses, messages, embeddings, decisions, classify, tokens, models),
    *(health, metrics, status, admin),
)
BODIES = (
    *(ChatRequest, CompletionRequest, ResponsesRequest, InputTokensRequest, MessagesRequest, CountTokensRequest),
    *(EmbeddingRequest, DecisionRequest, ClassifyRequest, TokenizeRequest, DetokenizeRequest),
)


BUSY = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")


def create_app(
    models: Mapping[str, AsyncLLM],
    settings: ServeConfig | None = None,
    classifiers: Mapping[str, Classifier] | None = None,
) -> App:
    """An ASGI application that serves models under their names, the first by default, and classifiers beside them. Who
    made them closes them.
    """
    settings = settings or ServeConfig()

    app = App(title="Tenfold", version=tenfold.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = Service(models, settings, classifiers)
    app.state.deciders = {}
    app.state.temperatures = read_temperatures(settings.decision_temperatures)
    app.state.responses = Store.of(settings)
    app.state.routes = [*app.routes, *(route for module in ROUTES for route in module.router.routes)]
    for module in ROUTES:
        app.include_router(module.router)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    service, keys, limits = app.state.service, Keys.of(settings), Limits.of(settings)
    app.state.keys, app.state.limits = keys, limits
    keys.warn()
    app.add_middleware(Shortcut, routes=shortcuts(app.state.routes, BUSY))
    app.add_middleware(OpenRequests, service=service)
    app.add_middleware(Guard, settings=settings, service=service, keys=keys, limits=limits)
    app.add_middleware(RequestLog, each=settings.access_log)
    app.add_middleware(Observer, metrics=app.state.service.metrics)  # last, so that it stands before all others
    return app
