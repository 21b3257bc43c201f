"""What the server counts and times, and /metrics.

Invariant: every job is observed once from `watch` to `end`, whatever becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tenfold.engine.request import Output
from tenfold.serve.settings import ServeConfig

if TYPE_CHECKING:  # the service owns its metrics; only their types look back
    from tenfold.serve.service import Counts, Job, Served


class Watch:
    """One job from beginning to end."""

    def __init__(self, metrics: Metrics, job: Job) -> None:
        self.metrics = metrics
        self.job = job

    def output(self, output: Output) -> None:
        """One more output of the engine."""

    def end(self, outcome: str, counts: Counts) -> None:
        """outcome: "ok", "cancelled", or the code of the error the client was told."""


class Metrics:
    """Of one server."""

    def __init__(self, models: Mapping[str, Served], settings: ServeConfig) -> None:
        self.models = models
        self.settings = settings

    def watch(self, job: Job) -> Watch:
        return Watch(self, job)
