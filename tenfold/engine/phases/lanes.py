"""Lanes: where the steps of each phase run, and on how many multiprocessors.

A lane has a runner of its own, over the rows and the sampler that both share, so that the inputs of a step under way
are not overwritten by the other phase's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tenfold.engine.runner import Runner, Slices


class Lanes(Protocol):
    """Where decodes and prefills run now. What is launched in such a context goes to the lane's stream."""

    def decode(self) -> "Lane": ...

    def prefill(self, slices: Slices | None) -> "Lane":
        """slices: of the prefill that goes on here, None where one begins."""
        ...


class Lane(Protocol):
    def __enter__(self) -> Runner: ...
    def __exit__(self, *rest: object) -> None: ...


class OneStream:
    """Both phases one after the other on one stream, or on a CPU: nothing is gained but that long prompts stop nobody
    for longer than a slice.
    """

    def __init__(self, runner: Runner) -> None:
        self._decode = runner
        self._prefill = runner.twin(runner.model)

    @contextmanager
    def decode(self) -> Iterator[Runner]:
        yield self._decode

    @contextmanager
    def prefill(self, slices: Slices | None) -> Iterator[Runner]:
        yield self._prefill
