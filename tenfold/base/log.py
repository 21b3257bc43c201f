"""Logging for the package, and the start-up timeline."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("tenfold")


class Timeline:
    """Named phases with their seconds, in order; `tenfold run` and `serve` print it once the model is ready."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append((name, time.perf_counter() - start))

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self.phases)
        return " · ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases) + f" · total {total:.2f} s"
