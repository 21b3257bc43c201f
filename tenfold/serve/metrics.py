"""What the server counts and times, and how it is laid out for Prometheus.

Invariant: every job is observed once from `watch` to `end`, whatever becomes of it. Nothing is global: two servers in
one process count apart. Label values come from configuration and code, never from what a client made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric

import tenfold
from tenfold.base.table import entry
from tenfold.engine.request import FinishReason, Output
from tenfold.serve.aliases import aliases
from tenfold.serve.engines import Engines, Pools, stats_of
from tenfold.serve.observe import REFUSED, Seen
from tenfold.serve.settings import NO_TRACES, ServeConfig
from tenfold.serve.window import Recent

if TYPE_CHECKING:  # the service owns its metrics; only their types look back
    from tenfold.serve.service import Counts, Job, Served

# Upper bounds in seconds. A token takes a GPU a few milliseconds and an old CPU a few tenths of a second; a request
# takes from milliseconds to many minutes.
TOKEN = (*(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05), *(0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10))
REQUEST = (*(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5), *(1, 2.5, 5, 10, 30, 60, 120, 300, 600))

WHERE = ("model", "endpoint")
WHOSE = ("model", "endpoint", "key")

# Attribute of Meters, name, what it says, labels, buckets.
HISTOGRAMS: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("ttft", "tenfold_time_to_first_token_seconds", "From the arrival of a request to its first token.", REQUEST),
    ("itl", "tenfold_inter_token_latency_seconds", "Between one output with tokens and the next of an answer.", TOKEN),
    ("tpot", "tenfold_time_per_output_token_seconds", "Mean time per token of an answer after its first.", TOKEN),
    ("e2e", "tenfold_request_seconds", "From the arrival of a request to the end of its last answer.", REQUEST),
    ("queue", "tenfold_queue_seconds", "From the arrival at the engine to the first step with the request.", REQUEST),
    ("prefill", "tenfold_prefill_seconds", "From the first step with a request to its first token.", REQUEST),
    ("decode", "tenfold_decode_seconds", "From the first token of a request to its last.", REQUEST),
)
COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("prompt", "tenfold_prompt_tokens", "Tokens of prompts the engine began to work on."),
    ("cached", "tenfold_cached_tokens", "Tokens of those prompts that were found in the prefix cache."),
    ("generated", "tenfold_generated_tokens", "Tokens generated."),
)

TRACERS = {"otlp": "tenfold.serve.tracing:Tracer"}  # OpenTelemetry is optional, and takes a while to import


class Metrics:
    """Of one server. draining: asked at every scrape. Raises ValueError where traces are asked for and OpenTelemetry is
    not installed.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        settings: ServeConfig,
        draining: Callable[[], bool] = lambda: False,
        classifiers: Mapping[str, Any] | None = None,
    ) -> None:
        self.models = models
        self.classifiers = classifiers if classifiers is not None else {}
        self.settings = settings
        self.draining = draining
        self.registry = CollectorRegistry()
        self.began = time.monotonic()
        self.recent = {name: Recent(partial(stats_of, served.llm)) for name, served in models.items()}
        self.tracer = make_tracer(settings.traces)
        self._meters: dict[tuple[str, str, str], Meters] = {}
        self._make()

    def _make(self) -> None:
        own = self.registry
        self.histograms = {
            name: Histogram(metric, help, WHERE, buckets=buckets, registry=own)
            for name, metric, help, buckets in HISTOGRAMS
        }
        self.counters = {name: Counter(metric, help, WHOSE, registry=own) for name, metric, help in COUNTERS}
        self.requests = Counter(
            "tenfold_requests", "Requests to models by how they ended.", (*WHOSE, "outcome"), registry=own
        )
        self.open = Gauge("tenfold_requests_open", "Requests to models under way.", ("model",), registry=own)
        self.answers = Counter(
            "tenfold_answers", "Answers by why they ended.", ("model", "finish_reason"), registry=own
        )
        self.responses = Counter(
            "tenfold_http_responses", "HTTP responses by route and status.", ("endpoint", "status"), registry=own
        )
        self.rejections = Counter(
            "tenfold_rejections", "Requests turned away, by the error's code.", ("model", "reason"), registry=own
        )
        self.cancels = Histogram(
            "tenfold_cancel_seconds",
            "From the disconnect of a client until its work was taken from the engine.",
            ("model",),
            buckets=TOKEN,
            registry=own,
        )
        self.streams = Gauge("tenfold_streams_open", "Event streams under way.", registry=own)
        own.register(Server(self))
        own.register(Engines(self.models))
        own.register(Pools(self.classifiers))
        ProcessCollector(registry=own)

    def collect(self) -> list[Metric]:
        """What /metrics shows. When a counter was made is left out: it would double the number of series."""
        families = list(self.registry.collect())
        for family in families:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        if self.settings.metrics_aliases:
            families += aliases({family.name: family for family in families})
        return families

    def watch(self, job: Job) -> Watch:
        return Watch(self, job)

    def meters(self, model: str, endpoint: str, key: str) -> Meters:
        """Kept, since finding the one with given labels costs more than counting."""
        labels = (model, endpoint, key)
        found = self._meters.get(labels)
        if found is None:
            found = self._meters[labels] = Meters(self, *labels)
        return found

    def responded(self, endpoint: str, status: int, code: str, model: str = "") -> None:
        """An HTTP response ended. status 0: there was none. code: of its error; model: the one asked for, if known."""
        self.responses.labels(endpoint, str(status or 499)).inc()
        if status in REFUSED:
            self.rejections.labels(model, code or "other").inc()

    def totals(self, counter: Counter, label: str, model: str | None = None) -> dict[str, int]:
        """What a counter has for each value of `label`, of one model or of all."""
        found: dict[str, int] = {}
        for family in counter.collect():
            for sample in family.samples:
                if model in (None, sample.labels["model"]) and sample.name.endswith("_total"):
                    found[sample.labels[label]] = found.get(sample.labels[label], 0) + int(sample.value)
        return found

    def close(self) -> None:
        """Sends the traces that are still here."""
        if self.tracer is not None:
            self.tracer.close()


class Meters:
    """The instruments of one model, endpoint and key."""

    __slots__ = (
        *("answers", "cached", "decode", "e2e", "generated", "itl"),
        *("open", "prefill", "prompt", "queue", "tpot", "ttft"),
    )

    def __init__(self, metrics: Metrics, model: str, endpoint: str, key: str) -> None:
        for name, histogram in metrics.histograms.items():
            setattr(self, name, histogram.labels(model, endpoint))
        for name, counter in metrics.counters.items():
            setattr(self, name, counter.labels(model, endpoint, key))
        self.answers: dict[FinishReason, Any] = {
            reason: metrics.answers.labels(model, reason.value) for reason in FinishReason
        }
        self.open: Any = metrics.open.labels(model)


class _Pace:
    """The tokens of one answer so far. first, last: when; head: tokens that came first."""

    __slots__ = ("first", "head", "last", "tokens")

    def __init__(self, now: float, count: int) -> None:
        self.first = self.last = now
        self.head = self.tokens = count


class Watch:
    """One job from beginning to end."""

    __slots__ = ("begin", "job", "meters", "metrics", "paces", "reasons", "recent", "seen", "single", "span", "started")

    def __init__(self, metrics: Metrics, job: Job) -> None:
        name = job.served.name
        self.metrics = metrics
        self.job = job
        self.begin = time.monotonic()
        self.seen: Seen = job.seen
        self.seen.model = name
        self.meters: Any = metrics.meters(name, job.endpoint, job.key)
        self.recent = metrics.recent[name]
        self.paces: dict[Any, _Pace] = {}
        self.reasons: list[str] = []
        self.single = len(job.prompts) == 1
        self.started = False
        self.span = metrics.tracer.start(job, self.begin) if metrics.tracer is not None else None
        self.meters.open.inc()

    def output(self, output: Output) -> None:
        """One more output of the engine."""
        now = time.monotonic()
        if not self.started:
            self._start(output, now)
        count = len(output.tokens)
        if output.cached_tokens and output.index == 0:
            self.meters.cached.inc(output.cached_tokens)
        if count or output.finish is not None:
            answer = output.index if self.single else (output.request_id, output.index)
            if count:
                self._tokens(answer, count, now)
            if output.finish is not None:
                self._finish(answer, output.finish, now)

    def _tokens(self, answer: Any, count: int, now: float) -> None:
        pace = self.paces.get(answer)
        if pace is None:
            self._first(answer, count, now)
        else:
            self.meters.itl.observe(now - pace.last)
            pace.last = now
            pace.tokens += count
        self.meters.generated.inc(count)
        self.recent.tokens(now, count)

    def _start(self, output: Output, now: float) -> None:
        """The engine works on it."""
        self.started = True
        prompt = sum(len(ids) for ids in self.job.prompts)
        self.meters.prompt.inc(prompt)
        self.recent.prompt.add(now, prompt)
        self.meters.queue.observe(output.queue_seconds)
        if self.span is not None:
            self.span.started(self.begin + output.queue_seconds)
        self.meters.prefill.observe(max(0.0, now - self.begin - output.queue_seconds))

    def _first(self, answer: Any, count: int, now: float) -> None:
        if not self.paces:
            self.meters.ttft.observe(now - self.seen.arrival)
            self.recent.ttft.add(now, now - self.seen.arrival)
            if self.span is not None:
                self.span.first_token(now)
        self.paces[answer] = _Pace(now, count)

    def _finish(self, answer: Any, reason: FinishReason, now: float) -> None:
        self.reasons.append(reason.value)
        self.meters.answers[reason].inc()
        pace = self.paces.get(answer)
        if pace is not None and pace.tokens > pace.head:
            each = (pace.last - pace.first) / (pace.tokens - pace.head)
            self.meters.tpot.observe(each)
            self.recent.tpot.add(now, each)

    def end(self, outcome: str, counts: Counts) -> None:
        """outcome: "ok", "cancelled", or the code of the error the client was told."""
        now = time.monotonic()
        job = self.job
        self.meters.open.dec()
        self.metrics.requests.labels(job.served.name, job.endpoint, job.key, outcome).inc()
        if outcome == "ok":
            self.meters.e2e.observe(now - self.seen.arrival)
        if outcome == "cancelled" and self.seen.disconnected:
            self.metrics.cancels.labels(job.served.name).observe(now - self.seen.disconnected)
        if self.paces:
            paces = self.paces.values()
            self.meters.decode.observe(max(p.last for p in paces) - min(p.first for p in paces))
        self.recent.look(now)
        if self.span is not None:
            self.span.end(outcome, counts, self.reasons)


class Server:
    """What a scrape asks of the server itself."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("tenfold_build_info", "The version that runs.", labels=("version",))
        build.add_metric((tenfold.__version__,), 1)
        yield build
        draining = float(self.metrics.draining())
        yield GaugeMetricFamily("tenfold_draining", "1 while running requests end and new ones are refused.", draining)


def make_tracer(endpoint: str) -> Any:
    """None where no traces are asked for."""
    if not endpoint:
        return None
    try:
        tracer = entry(TRACERS, "otlp", "traces")
    except ImportError:
        raise ValueError(f"traces is {endpoint!r}, which {NO_TRACES}") from None
    return tracer.otlp(endpoint)
