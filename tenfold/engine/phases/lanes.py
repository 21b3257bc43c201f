"""Lanes: where the steps of each phase run, and on how many multiprocessors.

A lane has a runner of its own, over the rows and the sampler that both share, so that the inputs of a step under way
are not overwritten by the other phase's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tenfold.cache.store import KVStore
from tenfold.engine.phases.controller import Split
from tenfold.engine.runner import Runner, Slices
from tenfold.engine.sequence import Sequence as Answer
from tenfold.models.table import Model
from tenfold.ops.gpu import green
from tenfold.ops.gpu.green import Part

if TYPE_CHECKING:
    from tenfold.ops.gpu.native import Gpu


class Lanes(Protocol):
    """Where decodes and prefills run now. What is launched in such a context goes to the lane's stream."""

    now: Split

    def use(self, split: Split) -> None:
        """From the next launches on. A phase that gets no SMs keeps its lane, and has nothing to launch."""
        ...

    def decode(self) -> AbstractContextManager[Runner, bool | None]: ...

    def prefill(self, slices: Slices | None) -> AbstractContextManager[Runner, bool | None]:
        """slices: of the prefill that goes on here, None where one begins."""
        ...

    def handed(self, sequences: list[Answer]) -> None:
        """Their prompts are computed and their first tokens read; they decode from now on."""
        ...


class GreenLanes:
    """Disjoint groups of a GPU's SMs for the phases, one pair of streams for each split, and two that share all SMs.

    Every lane has kernels that count its SMs, with workspaces of their own, and so graphs of its own; weights, rows,
    sampler and KV store are one. A phase changes its lane between two of its launches: the new stream waits for what is
    queued on the old one, and the host for nothing.
    """

    def __init__(self, runner: Runner, kernels: Gpu, sizes: Sequence[int]) -> None:
        """sizes: SMs of prefill in each split. Raises RuntimeError where the driver refuses one."""
        self.device = runner.device
        self.total = kernels.sms
        self._decodes: dict[Split, _GreenLane] = {}
        self._prefills: dict[Split, _GreenLane] = {}
        pairs = [green.split(self.device, size) for size in sizes]
        whole = [Part(self.total, torch.cuda.Stream(self.device, priority=p)) for p in (0, -1)]
        for prefill, decode in (whole, *pairs):
            split = Split(prefill.sms, decode.sms)
            for lanes, part in ((self._prefills, prefill), (self._decodes, decode)):
                own = kernels.on(part.sms)
                lanes[split] = _GreenLane(part, runner.twin(runner.model.on(own)))
        self.now = self.shared = Split(self.total, self.total)
        self.splits = [split for split in self._decodes if split != self.shared]
        self._decode, self._prefill = self._decodes[self.shared], self._prefills[self.shared]

    def use(self, split: Split) -> None:
        self.now = split
        if split.decode:
            self._decode = self._moved(self._decode, self._decodes.get(split, self._decodes[self.shared]))
        if split.prefill:
            self._prefill = self._moved(self._prefill, self._prefills.get(split, self._prefills[self.shared]))

    def handed(self, sequences: list[Answer]) -> None:
        """One store: there is nothing to do."""

    def every_prefill(self) -> Iterator[tuple[Part, Runner]]:
        """SMs and runner of each lane of prefills."""
        return ((lane.part, lane.runner) for lane in self._prefills.values())

    def every_decode(self) -> Iterator[tuple[Part, Runner]]:
        return ((lane.part, lane.runner) for lane in self._decodes.values())

    def _moved(self, old: _GreenLane, new: _GreenLane) -> _GreenLane:
        if old is not new:
            new.part.stream.wait_stream(old.part.stream)
        return new

    @contextmanager
    def decode(self) -> Iterator[Runner]:
        with green.on(self._decode.part):
            yield self._decode.runner

    @contextmanager
    def prefill(self, slices: Slices | None) -> Iterator[Runner]:
        part = self._prefill.part
        if slices is not None and slices.x is not None:
            slices.x.record_stream(part.stream)  # it may have been made on another
        with green.on(part):
            yield self._prefill.runner


@dataclass(frozen=True, slots=True, eq=False)
class _GreenLane:
    part: Part
    runner: Runner


class OneStream:
    """Both phases one after the other on one stream, or on a CPU: nothing is gained but that long prompts stop nobody
    for longer than a slice.
    """

    def __init__(self, runner: Runner) -> None:
        self._decode = runner
        self._prefill = runner.twin(runner.model)
        self.now = Split(1, 1)

    def use(self, split: Split) -> None:
        self.now = split

    def handed(self, sequences: list[Answer]) -> None:
        """One store: there is nothing to do."""

    @contextmanager
    def decode(self) -> Iterator[Runner]:
        yield self._decode

    @contextmanager
    def prefill(self, slices: Slices | None) -> Iterator[Runner]:
        yield self._prefill


class TwoDevices:
    """Prefill on a device of its own, with its own copy of the weights and a KV store of its own. When a prompt is
    computed its pages are copied to the store of decodes, where they have the same numbers. The rival that shared
    storage is held against: no prefix cache, and every page has its place on both devices.
    """

    def __init__(self, runner: Runner, model: Model, device: torch.device) -> None:
        """model: on `device`, with the weights of the runner's."""
        self._decode = runner
        self._prefill = runner.elsewhere(model, KVStore(runner.kv.spec, runner.kv.pages, device), device)
        self.now = Split(0, 0)  # each has a whole GPU

    def use(self, split: Split) -> None:
        self.now = split

    def handed(self, sequences: list[Answer]) -> None:
        pages = sorted({page for sequence in sequences for page in sequence.pages})
        with torch.inference_mode():
            if pages:
                self._decode.kv.take_pages(self._prefill.kv, torch.tensor(pages, dtype=torch.int64))
            self._decode.receive(sequences)

    @contextmanager
    def decode(self) -> Iterator[Runner]:
        yield self._decode

    @contextmanager
    def prefill(self, slices: Slices | None) -> Iterator[Runner]:
        device = self._prefill.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield self._prefill
