"""OpenTelemetry traces: a span for each job, with the names of the GenAI semantic conventions. Optional: this module
alone imports OpenTelemetry, and only a server that is told where traces go imports this module.

Invariant: no text of a prompt or answer is in a span, and an exporter that fails or is slow costs spans, never
requests: they wait in a bounded queue for a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import tenfold

if TYPE_CHECKING:  # metrics make the tracer; only the types of what it traces look up
    from tenfold.serve.service import Counts, Job

QUEUE = 2048  # spans that may wait; more are dropped
BATCH = 256
DELAY = 2000.0  # milliseconds between exports
TIMEOUT = 5.0  # seconds for one export, retries included
LAST = 5.0  # seconds that the end of a server waits for its last spans to be sent
PATH = "/v1/traces"  # where collectors take OTLP over HTTP
PARENT = ("traceparent", "tracestate")

# What an endpoint does, in the words of the conventions; of one without such a word, the last part of its path.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
}

# Attribute, and the field of SamplingParams it shows.
PARAMETERS = (
    ("gen_ai.request.max_tokens", "max_tokens"),
    ("gen_ai.request.temperature", "temperature"),
    ("gen_ai.request.top_p", "top_p"),
    ("gen_ai.request.top_k", "top_k"),
    ("gen_ai.request.frequency_penalty", "frequency_penalty"),
    ("gen_ai.request.presence_penalty", "presence_penalty"),
    ("gen_ai.request.seed", "seed"),
    ("gen_ai.request.choice.count", "n"),
)


class Tracer:
    """Makes the spans of one server and hands them to `processor`."""

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "tenfold", "service.version": tenfold.__version__})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(processor)
        self.tracer = self.provider.get_tracer("tenfold.serve", tenfold.__version__)
        self.parents = TraceContextTextMapPropagator()

    @classmethod
    def otlp(cls, endpoint: str) -> Tracer:
        """To a collector that takes OTLP over HTTP. Raises ValueError for what is no such address."""
        exporter = OTLPSpanExporter(address(endpoint), timeout=TIMEOUT)
        return cls(BatchSpanProcessor(exporter, QUEUE, DELAY, BATCH))

    def start(self, job: Job, queued: float) -> Span:
        """The span of a job, which is part of the trace its client names. queued: when it went to the engine."""
        return Span(self, job, queued)

    def close(self) -> None:
        """Sends what waits, for at most LAST seconds. Idempotent."""
        sending = threading.Thread(target=self.provider.shutdown, daemon=True)  # which waits half a minute by itself
        sending.start()
        sending.join(LAST)


class Span:
    """One job. Times are `time.monotonic()` seconds."""

    __slots__ = ("offset", "span")

    def __init__(self, tracer: Tracer, job: Job, queued: float) -> None:
        self.offset = time.time_ns() - time.monotonic_ns()
        operation = OPERATIONS.get(job.endpoint, job.endpoint.rpartition("/")[2])
        given = {name: value for name in PARENT if (value := job.seen.header(name))}
        self.span = tracer.tracer.start_span(
            f"{operation} {job.served.name}",
            context=tracer.parents.extract(given),
            kind=SpanKind.SERVER,
            attributes=_asked(job, operation),
            start_time=self._at(job.seen.arrival),
        )
        self.span.add_event("queued", timestamp=self._at(queued))

    def _at(self, moment: float) -> int:
        return self.offset + int(moment * 1e9)

    def started(self, moment: float) -> None:
        """The engine began to work on it."""
        self.span.add_event("started", timestamp=self._at(moment))

    def first_token(self, moment: float) -> None:
        self.span.add_event("first token", timestamp=self._at(moment))

    def end(self, outcome: str, counts: Counts, reasons: Sequence[str]) -> None:
        """reasons: of each answer that ended, why."""
        self.span.set_attributes(
            {
                "gen_ai.usage.input_tokens": counts.prompt,
                "gen_ai.usage.output_tokens": counts.completion,
                "gen_ai.usage.cache_read.input_tokens": counts.cached,
                "gen_ai.response.finish_reasons": tuple(reasons),
            }
        )
        if outcome != "ok":
            self.span.set_attribute("error.type", outcome)
        if outcome not in ("ok", "cancelled"):
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end(self._at(time.monotonic()))


def _asked(job: Job, operation: str) -> dict[str, Any]:
    """What is known of a job before it runs."""
    given = {name: value for name, field in PARAMETERS if (value := getattr(job.params, field)) is not None}
    return given | {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tenfold",
        "gen_ai.request.model": job.served.name,
        "gen_ai.response.model": job.served.name,
        "gen_ai.response.id": job.id,
        "url.path": job.endpoint,
    }


def address(endpoint: str) -> str:
    """Where to send traces. A URL without a path gets the usual one. Raises ValueError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"traces is {endpoint!r}; allowed: the URL of a collector, such as http://127.0.0.1:4318.")
    return endpoint if parts.path.strip("/") else parts._replace(path=PATH).geturl()
