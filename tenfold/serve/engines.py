"""The numbers of the engines, asked for when /metrics or /status is read.

Invariant: reading never waits for an engine; one that is being restarted shows its state and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

if TYPE_CHECKING:  # the service owns its metrics; only their types look back
    from tenfold.serve.service import Served

STATES = ("loading", "ready", "restarting", "failed", "closed")

# Name, what it says, and how to get it from `Stats`. An engine that starts again counts from 0, as Prometheus expects.
GAUGES: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("tenfold_requests_running", "Sequences the engine computes.", lambda s: s.running),
    ("tenfold_requests_waiting", "Sequences that wait for the engine.", lambda s: s.waiting),
    ("tenfold_kv_pages_capacity", "Pages of the KV cache, used or not.", lambda s: s.pages),
    ("tenfold_engine_last_step_seconds", "Time the latest step took.", lambda s: s.last_step_seconds),
)
COUNTERS: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("tenfold_engine_prompt_tokens", "Tokens of prompts the engine accepted.", lambda s: s.prompt_tokens),
    ("tenfold_prefix_hit_tokens", "Of those, found in the prefix cache.", lambda s: s.prefix_hit_tokens),
    ("tenfold_engine_computed_tokens", "Tokens the model was run on.", lambda s: s.computed_tokens),
    ("tenfold_engine_generated_tokens", "Tokens the engine generated.", lambda s: s.generated_tokens),
    ("tenfold_drafted_tokens", "Tokens guessed ahead that were verified.", lambda s: s.drafted_tokens),
    ("tenfold_accepted_tokens", "Of those, the ones that became part of an answer.", lambda s: s.accepted_tokens),
    (
        "tenfold_attention_recomputed_rows",
        "Rows of attention whose unified maximum did not hold; they were computed again.",
        lambda s: s.recomputed_rows,
    ),
    ("tenfold_pictures", "Pictures a model looked at, those it knew still left out.", lambda s: s.pictures),
    ("tenfold_preemptions", "Sequences put back into the queue for want of pages.", lambda s: s.preemptions),
    ("tenfold_engine_errors", "Requests that failed in the engine.", lambda s: s.errors),
)
POOL_GAUGES: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("tenfold_classifier_waiting", "Posts that wait for a classifier.", lambda s: s.waiting),
)
POOL_COUNTERS: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("tenfold_classifier_posts", "Posts classified.", lambda s: s.posts),
    ("tenfold_classifier_batches", "Batches they were computed in.", lambda s: s.batches),
    ("tenfold_classifier_padding_tokens", "Tokens of padding in those batches.", lambda s: s.padding),
    ("tenfold_classifier_cancelled", "Posts taken out before they were computed.", lambda s: s.cancelled),
    ("tenfold_classifier_errors", "Posts that failed in a classifier.", lambda s: s.failed),
    ("tenfold_classifier_busy_seconds", "Time in which a classifier was at work.", lambda s: s.seconds),
)
PAGES = ("used", "cached", "free")
PHASES = ("prefill", "decode")

# Name of the label, and the attribute of Facts it shows.
FACTS = ("family", "device", "kernels")


def stats_of(llm: Any) -> Any:
    """Its `Stats`, or None while it has none."""
    stats = getattr(llm, "stats", None)
    return stats() if stats is not None else None


def state_of(llm: Any) -> str:
    """One of STATES."""
    return str(getattr(llm, "state", "") or ("ready" if llm.alive else "failed"))


def restarts_of(llm: Any) -> int:
    return int(getattr(llm, "restarts", 0))


class Engines:
    """Collects one sample per model for each row of the tables above."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        llms = {name: served.llm for name, served in self.models.items()}
        stats = {name: found for name, llm in llms.items() if (found := stats_of(llm)) is not None}
        for metric, help, value in GAUGES:
            yield _each(GaugeMetricFamily(metric, help, labels=("model",)), stats, value)
        for metric, help, value in COUNTERS:
            yield _each(CounterMetricFamily(metric, help, labels=("model",)), stats, value)
        yield _pages(stats)
        yield from _border({name: found for name, found in stats.items() if has_lanes(found)})
        yield _steps(stats)
        yield from _lives(llms)
        yield _facts(llms)


class Pools:
    """The same for classifiers."""

    def __init__(self, classifiers: Mapping[str, Any]) -> None:
        self.classifiers = classifiers

    def collect(self) -> Iterator[Metric]:
        stats = {name: own.stats for name, own in self.classifiers.items() if hasattr(own, "stats")}
        for metric, help, value in POOL_GAUGES:
            yield _each(GaugeMetricFamily(metric, help, labels=("model",)), stats, value)
        for metric, help, value in POOL_COUNTERS:
            yield _each(CounterMetricFamily(metric, help, labels=("model",)), stats, value)


def _each(family: Any, stats: Mapping[str, Any], value: Callable[[Any], float]) -> Metric:
    for name, found in stats.items():
        family.add_metric((name,), value(found))
    made: Metric = family
    return made


def _pages(stats: Mapping[str, Any]) -> Metric:
    pages = GaugeMetricFamily("tenfold_kv_pages", "Pages of the KV cache by what they hold.", labels=("model", "state"))
    for name, found in stats.items():
        for state in PAGES:
            pages.add_metric((name, state), getattr(found, f"pages_{state}"))
    return pages


def has_lanes(stats: Any) -> bool:
    """Whether the phases of an engine run side by side."""
    return bool(getattr(stats, "prefill_sms", 0) or getattr(stats, "decode_sms", 0))


def _border(stats: Mapping[str, Any]) -> Iterator[Metric]:
    """Of models whose phases run side by side."""
    sms = GaugeMetricFamily(
        "tenfold_phase_sms",
        "Multiprocessors that a phase has, where phases run side by side.",
        labels=("model", "phase"),
    )
    chunk = GaugeMetricFamily(
        "tenfold_phase_chunk_tokens",
        "Tokens of prompts that a step of answers takes along at most; 0: prompts have a lane of their own.",
        labels=("model",),
    )
    changes = CounterMetricFamily("tenfold_border_changes", "Times the border between phases moved.", labels=("model",))
    for name, found in stats.items():
        for phase in PHASES:
            sms.add_metric((name, phase), getattr(found, f"{phase}_sms"))
        chunk.add_metric((name,), found.prompt_chunk)
        changes.add_metric((name,), found.border_changes)
    yield sms
    yield chunk
    yield changes


def _steps(stats: Mapping[str, Any]) -> Metric:
    steps = SummaryMetricFamily("tenfold_engine_step_seconds", "Steps of the engine and their time.", labels=("model",))
    for name, found in stats.items():
        steps.add_metric((name,), count_value=found.steps, sum_value=found.step_seconds)
    return steps


def _lives(llms: Mapping[str, Any]) -> Iterator[Metric]:
    restarts = CounterMetricFamily("tenfold_engine_restarts", "Times an engine was started anew.", labels=("model",))
    states = GaugeMetricFamily("tenfold_engine_state", "1 for the state an engine is in.", labels=("model", "state"))
    for name, llm in llms.items():
        restarts.add_metric((name,), restarts_of(llm))
        for state in STATES:
            states.add_metric((name, state), float(state == state_of(llm)))
    yield restarts
    yield states


def _facts(llms: Mapping[str, Any]) -> Metric:
    info = GaugeMetricFamily(
        "tenfold_model_info", "What a model is and runs on.", labels=("model", *FACTS, "page_size")
    )
    for name, llm in llms.items():
        facts = getattr(llm, "facts", None)
        size = getattr(getattr(facts, "config", None), "page_size", "")
        info.add_metric((name, *(str(getattr(facts, fact, "") or "") for fact in FACTS), str(size)), 1)
    return info
