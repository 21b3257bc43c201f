"""Replay a short forward: the calls one step made into the library, run again for the next without Python in between.

A decode step of a small model takes a few milliseconds, of which Python and the allocation of results would be a
tenth. The first step of a shape runs as usual; the second is recorded, its inputs copied to fixed places; later ones
copy their inputs to those places and run the recorded calls. The calls, and so the bits of the result, are those of a
forward that was not recorded.

Recorded is what goes through the kernels. A forward that does anything else with tensors cannot be replayed; that is
noticed while recording, and such forwards run as usual.
"""

import ctypes
import dataclasses
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.ops.cpu.lib import prototype

MOST_TOKENS = 16  # of a step worth recording: above, the arithmetic outweighs Python by far
MOST_RECORDINGS = 32
FIRST_COLUMNS = 64  # of a recorded page table; doubled as contexts grow

Forward = Callable[[Any], Tensor]


class _Call(ctypes.Structure):
    """tf_call."""

    _fields_ = (("op", ctypes.c_void_p), ("args", ctypes.c_void_p))


class Recorder:
    """Takes down the calls of one thread, and lends the results of its operations memory that stays where it is.

    Memory is used again once the tensor that had it is gone: whatever reads it did so in an earlier call.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.calls: list[tuple[int, bytes]] = []
        self.foreign = ""  # an operation that is not a call into the library
        self._own = False
        self._memory: dict[tuple[int, torch.dtype], list[list[Any]]] = {}  # by size: [memory, reference to its tensor]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        self._own = True
        try:
            with torch.inference_mode(False):  # so that it can be written whatever the mode of a replay
                return self._lend(shape, dtype)
        finally:
            self._own = False

    def _lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        slots = self._memory.setdefault((size, dtype), [])
        # Something else may hold a view of memory whose tensor is gone: then nothing is lent twice.
        slot = None if self.foreign else next((s for s in slots if s[1]() is None), None)
        if slot is None:
            slot = [torch.empty(size, dtype=dtype), None]
            slots.append(slot)
        tensor = slot[0].view(shape)
        slot[1] = weakref.ref(tensor)
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        return any(slot[1]() is tensor for slots in self._memory.values() for slot in slots)

    def saw(self, operation: str) -> None:
        if not self._own:
            self.foreign = self.foreign or operation

    def memory(self) -> list[Tensor]:
        return [slot[0] for slots in self._memory.values() for slot in slots]


class _Watch(TorchDispatchMode):
    """Reports every torch operation to a recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder


def _report(self: _Watch, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    self.recorder.saw(str(func))
    return func(*args, **(kwargs or {}))


# Set from outside: in the class body torch would wrap it in a guard whose import, the whole compiler, takes 1.3 s in
# the middle of the first answer.
_Watch.__torch_dispatch__ = _report  # type: ignore[assignment,method-assign]


class Recording:
    """The calls of a forward, with the memory they read and write."""

    def __init__(self, step: Any, inputs: list[tuple[str, Tensor]], recorder: Recorder, out: Tensor) -> None:
        self.store = weakref.ref(step.kv)
        self.inputs = inputs
        self.out = out
        self._keep = recorder.memory()
        arguments = b"".join(args.ljust(-(-len(args) // 8) * 8, b"\0") for _, args in recorder.calls)
        self._arguments = ctypes.create_string_buffer(arguments, len(arguments))
        self._calls = (_Call * len(recorder.calls))()
        at = ctypes.addressof(self._arguments)
        for call, (op, args) in zip(self._calls, recorder.calls):
            call.op, call.args = op, at
            at += -(-len(args) // 8) * 8
        self._run = prototype("tf_run", None, ctypes.c_void_p, ctypes.c_int64)
        self._where = (ctypes.addressof(self._calls), len(recorder.calls))

    def replay(self, step: Any) -> Tensor:
        copy_inputs(step, self.inputs)
        self._run(*self._where)
        return self.out.clone()


def fixed_inputs(step: Any) -> list[tuple[str, Tensor]]:
    """A copy of every tensor of a step; the page table gets room for more pages."""
    inputs = []
    with torch.inference_mode(False):
        for field in dataclasses.fields(step):
            value = getattr(step, field.name)
            if isinstance(value, Tensor):
                shape = value.shape if value.dim() < 2 else (value.shape[0], room(value.shape[1]))
                inputs.append((field.name, torch.zeros(shape, dtype=value.dtype)))
    copy_inputs(step, inputs)
    return inputs


def copy_inputs(step: Any, inputs: list[tuple[str, Tensor]]) -> None:
    for name, place in inputs:
        given = getattr(step, name)
        (place if given.shape == place.shape else place[:, : given.shape[1]]).copy_(given)


def room(columns: int) -> int:
    size = FIRST_COLUMNS
    while size < columns:
        size *= 2
    return size


class Replay:
    """`replay(forward, step)` is `forward(step)`. One object serves one model; steps may come from any thread.

    step: a dataclass with tensor fields on the CPU and a field `kv`; `forward` must depend on the values of its tensors
    only through the kernels, and on nothing else that changes.
    """

    def __init__(self, recording: Callable[[Recorder], AbstractContextManager[None]]) -> None:
        """recording: has the kernels report to a recorder for a while."""
        self._recording = recording
        self._recordings: OrderedDict[tuple[int, ...], Recording | None] = OrderedDict()
        self._lock = threading.Lock()
        self.foreign = ""  # why this model is not replayed

    def __call__(self, forward: Forward, step: Any) -> Tensor:
        tokens = step.token_ids.shape[0]
        if tokens > MOST_TOKENS or self.foreign:
            return forward(step)
        key = (tokens, *step.page_table.shape[:1], room(step.page_table.shape[1]), *step.logits_rows.shape)
        with self._lock:
            known = self._recordings.get(key, self)
            if known is self:  # shapes that come once are not worth recording
                self._remember(key, None)
            elif isinstance(known, Recording) and known.store() is step.kv:
                self._recordings.move_to_end(key)
                return known.replay(step)
            else:
                return self._first(key, forward, step)
        return forward(step)

    def _remember(self, key: tuple[int, ...], recording: Recording | None) -> None:
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)

    def _first(self, key: tuple[int, ...], forward: Forward, step: Any) -> Tensor:
        """Run and record a step."""
        inputs = fixed_inputs(step)
        recorder = Recorder()
        with self._recording(recorder), _Watch(recorder):
            out = forward(dataclasses.replace(step, **dict(inputs)))
        if not recorder.foreign and not recorder.owns(out):
            recorder.foreign = "a result that no kernel made"
        if recorder.foreign:
            self.foreign = recorder.foreign
            self._recordings.clear()
            return out
        self._remember(key, Recording(step, inputs, recorder, out))
        return out.clone()
