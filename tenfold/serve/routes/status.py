"""GET /status: how the server does, for people and scripts; and the page at / that shows it.

Invariant: the page is a few static files that ask nobody but this server, and may run no script but their own.
"""

import hashlib
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import tenfold
from tenfold.serve.engines import has_lanes, restarts_of, state_of, stats_of
from tenfold.serve.metrics import Metrics
from tenfold.serve.reply import ERROR_RESPONSES
from tenfold.serve.service import Served, Service, service_of
from tenfold.serve.window import Recent

router = APIRouter()

WEB = Path(__file__).parents[1] / "web"
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "theme.js": "text/javascript; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "draw.js": "text/javascript; charset=utf-8",
    "playground.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        "img-src 'self' data:",  # pictures that are asked about
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "private, no-cache",  # kept, but asked for each time: an update is seen at once
}


def _level(name: str, recent: Recent, now: float) -> list[float]:
    return recent.levels[name].last(now)


# Charts of the page: title, unit, and of each line the name and where in Recent its values are.
CHARTS: tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...] = (
    ("Throughput", "tokens/s", (("generated", lambda recent, now: recent.generated.last(now)),)),
    ("Prompts", "tokens/s", (("prompt", lambda recent, now: recent.prompt.last(now)),)),
    ("Requests in the engine", "", (("running", partial(_level, "running")), ("waiting", partial(_level, "waiting")))),
)
# The same where prompts and answers run side by side: who has what, and what of prompts steps of answers take along.
BORDER = (
    "Multiprocessors",
    "",
    (("prompts", partial(_level, "prefill_sms")), ("answers", partial(_level, "decode_sms"))),
)
CHUNK = ("Prompts in a step of answers", "tokens", (("at most", partial(_level, "prompt_chunk")),))
# Bars: title, unit, and of each part the name and the field of Stats.
BARS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("KV cache", "pages", (("used", "pages_used"), ("cached", "pages_cached"), ("free", "pages_free"))),
)
# What of a model's settings is worth a look.
SETTINGS = (
    "dtype",
    "kv_cache",
    "kv_dtype",
    "weights",
    "page_size",
    "max_batch",
    "max_step_tokens",
    "prefix_cache",
    "schedule",
    "overtake",
    "threads",
)


@router.get(
    "/status",
    response_model=None,
    responses={200: {"content": {"application/json": {}}}, 401: ERROR_RESPONSES[401]},
    openapi_extra={"parameters": [{"name": "brief", "in": "query", "schema": {"type": "string"}}]},
)
async def status(http: Request) -> Response:
    """How the server and each of its models do. With `brief` set, without what stays the same while they run."""
    service = service_of(http)
    brief = http.query_params.get("brief", "") not in ("", "0", "false")
    return JSONResponse(describe(service, brief), headers={"cache-control": "no-store"})


def describe(service: Service, brief: bool = False) -> dict[str, Any]:
    metrics = service.metrics
    now = time.monotonic()
    return {
        "version": tenfold.__version__,
        "uptime_seconds": round(now - metrics.began, 1),
        "draining": service.draining,
        "rejections": metrics.totals(metrics.rejections, "reason"),
        "models": [_model(served, metrics, now, brief) for served in service.models.values()],
    }


def _model(served: Served, metrics: Metrics, now: float, brief: bool) -> dict[str, Any]:
    llm, recent = served.llm, metrics.recent[served.name]
    recent.look(now)
    stats = stats_of(llm)
    live = {
        "name": served.name,
        "state": state_of(llm),
        "restarts": restarts_of(llm),
        "sees": getattr(llm, "sees", False),
        "stats": asdict(stats) if stats is not None else None,
        "prefix_hit_rate": stats.prefix_hit_tokens / stats.prompt_tokens if stats and stats.prompt_tokens else None,
        "requests": metrics.totals(metrics.requests, "outcome", served.name),
        "rejections": metrics.totals(metrics.rejections, "reason", served.name),
        "latency": {"ttft": recent.ttft.percentiles(now), "tpot": recent.tpot.percentiles(now)},
        "charts": _charts(recent, now, stats),
        "bars": _bars(stats),
    }
    return live if brief else live | _lasting(llm)


def _charts(recent: Recent, now: float, stats: Any) -> list[dict[str, Any]]:
    """note: what is to be said of a chart just now."""
    notes = {}
    if stats is not None and has_lanes(stats):
        notes[BORDER[0]] = f"{stats.border_why}; the border moved {stats.border_changes} times"
        chunk = f"up to {stats.prompt_chunk} tokens now" if stats.prompt_chunk else "prompts have a lane of their own"
        notes[CHUNK[0]] = chunk
    return [
        {
            "title": title,
            "unit": unit,
            "lines": [{"name": name, "values": last(recent, now)} for name, last in lines],
            "note": notes.get(title, ""),
        }
        for title, unit, lines in (*CHARTS, *((BORDER, CHUNK) if notes else ()))
    ]


def _bars(stats: Any) -> list[dict[str, Any]]:
    return [
        {"title": title, "unit": unit, "parts": [{"name": n, "value": getattr(stats, field, 0)} for n, field in parts]}
        for title, unit, parts in BARS
    ]


def _lasting(llm: Any) -> dict[str, Any]:
    """What stays the same while an engine runs."""
    facts = getattr(llm, "facts", None)
    if facts is None:
        return {"facts": {}, "memory": "", "timeline": [], "choices": []}
    named = {name: getattr(facts, name) for name in ("family", "device", "kernels", "kernels_reason", "max_model_len")}
    settings = {name: getattr(facts.config, name) for name in SETTINGS}
    return {
        "facts": named | settings | {"pages": facts.pages, "vocab_size": facts.vocab_size},
        "memory": facts.memory,
        "timeline": [{"phase": phase, "seconds": seconds} for phase, seconds in facts.timeline],
        "choices": list(facts.choices),
    }


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(http: Request) -> Response:
    """The status page."""
    return file(http, "index.html")


@router.api_route("/web/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def part(http: Request, name: str) -> Response:
    """A file it needs."""
    return file(http, name)


def file(http: Request, name: str) -> Response:
    """One of KINDS, which are read when asked for: they are few and small. Raises HTTPException (404)."""
    if name not in KINDS or not service_of(http).settings.status_page:
        raise HTTPException(404)
    content = (WEB / name).read_bytes()
    headers = HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}
    if headers["etag"] in http.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=KINDS[name], headers=headers)
