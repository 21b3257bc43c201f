"""GET /metrics: what the server counts and times, for Prometheus."""

import asyncio

from fastapi import APIRouter
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.requests import Request
from starlette.responses import Response

from tenfold.serve.reply import ERROR_RESPONSES
from tenfold.serve.service import service_of

router = APIRouter()

OPENMETRICS = "application/openmetrics-text"


@router.get(
    "/metrics",
    response_model=None,
    responses={200: {"content": {"text/plain": {}, OPENMETRICS: {}}}, 401: ERROR_RESPONSES[401]},
)
async def metrics(http: Request) -> Response:
    """In the text format of Prometheus, or as OpenMetrics 1.0 where that is accepted."""
    asked = OPENMETRICS in http.headers.get("accept", "")
    kind = openmetrics.CONTENT_TYPE_LATEST if asked else exposition.CONTENT_TYPE_PLAIN_0_0_4
    generate = openmetrics.generate_latest if asked else exposition.generate_latest
    body = await asyncio.to_thread(generate, service_of(http).metrics)
    return Response(body, media_type=kind)
