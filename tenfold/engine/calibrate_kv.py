"""Measuring a model's keys and values on a text, for a KV cache of few bits.

The model runs as it would serve, one window of the text after the other, each a sequence of its own. The first pass
sees the range of every channel, the second one how far each group may be clipped; windows count in order in both, so a
run that was interrupted goes on where it stopped and ends with the same result.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.cache.format import calibrated
from tenfold.cache.skvq.calibrate import CLIPS, ClipSearch, Extremes, Sample
from tenfold.engine.calibrate import (
    LARGEST_TEXT,
    PATIENCE,
    Progress,
    Watching,
    conditions,
    read_state,
    whole,
    windows_for,
    write_state,
)
from tenfold.engine.memory import kv_spec
from tenfold.engine.opened import Opened
from tenfold.models.config import ModelConfig
from tenfold.ops.kernels import Contexts, Heads, Kernels
from tenfold.ops.kv.quantize import Grouping
from tenfold.ops.kv.spec import PackedSpec
from tenfold.weights.identity import identity
from tenfold.weights.kv_calibration import SIDES, KvCalibration, KvHeader, key_bias, places

SEARCHED = 4  # windows of the second pass at most: each runs attention once for every group and clip factor
LEAST_PACKED = 1000  # tokens that are stored in few bits: fewer do not tell how far others may be clipped


class Layer:
    """What was seen of one layer, keys first, then values."""

    def __init__(self, spec: PackedSpec, kv_heads: int, head_dim: int, shift: Tensor) -> None:
        self.spec = spec
        self.width = spec.span * head_dim
        self.shifts = (shift, torch.zeros_like(shift))
        self.extremes = [Extremes(kv_heads * head_dim) for _ in SIDES]
        self.searches: list[ClipSearch] = []

    def watch(self, sample: Sample) -> None:
        keys = sample.keys
        if self.spec.rotary == "post":
            keys = sample.turn(keys.transpose(0, 1)).transpose(0, 1)
        for extremes, x in zip(self.extremes, (keys, sample.values)):
            extremes.add(x.flatten(1))

    def group(self) -> None:
        """Begin the second pass. Raises ValueError for values that are not finite."""
        spec = self.spec
        bits = (spec.key_bits, spec.value_bits)
        self.searches = [
            ClipSearch(e.grouping(spec.group, self.width, shift), b, spec.parameters, of_keys=not i, rotary=spec.rotary)
            for i, (e, shift, b) in enumerate(zip(self.extremes, self.shifts, bits))
        ]

    def search(self, sample: Sample) -> None:
        for search in self.searches:
            search.add(sample, self.spec.window, self.spec.sinks)


class Measured:
    """All layers, and how many windows each pass has seen."""

    def __init__(self, spec: PackedSpec, shape: ModelConfig, shifts: Sequence[Tensor]) -> None:
        self.spec = spec
        groups = spec.groups(shape.kv_heads, shape.head_dim)
        self.layers = [Layer(spec, shape.kv_heads, shape.head_dim, shift) for shift in shifts]
        self.seen = 0
        self.searched = 0
        self.tokens = 0
        self._losses = (len(self.layers), len(SIDES), groups, len(CLIPS))

    def group(self) -> None:
        for layer in self.layers:
            layer.group()

    def grouping(self, side: int) -> list[Grouping]:
        return [layer.searches[side].grouping() for layer in self.layers]

    def result(self, model: str, text: str) -> KvCalibration:
        tensors = {}
        for i, side in enumerate(SIDES):
            found = self.grouping(i)
            for part in Grouping.__slots__:
                stack = torch.stack([getattr(grouping, part) for grouping in found])
                tensors[f"{side}.{part}"] = stack.int() if part == "group" else stack
        return KvCalibration(KvHeader(model, text, self.tokens, str(self.spec)), tensors)

    def save(self, path: Path, key: str) -> None:
        """For `load`, all or nothing."""
        edges = [[(e.low, e.high) for e in layer.extremes] for layer in self.layers]
        losses = [[s.losses for s in layer.searches] for layer in self.layers]
        state = {
            "counts": np.array([self.seen, self.searched, self.tokens]),
            "edges": np.array(edges, dtype=np.float32),
            "losses": np.array(losses) if self.layers[0].searches else np.zeros(self._losses),
        }
        write_state(path, key, state)

    def load(self, path: Path, key: str, total: int) -> None:
        """Go on from what `save` left under the same key, of `total` windows; anything else is passed over."""
        found = read_state(path, key)
        if found.keys() != {"counts", "edges", "losses"}:
            return
        channels = len(self.layers[0].shifts[0])
        good = found["counts"].shape == (3,)
        good = good and found["edges"].shape == (len(self.layers), len(SIDES), 2, channels)
        if not good or found["losses"].shape != self._losses:
            return
        self.seen, self.searched, self.tokens = map(int, found["counts"])
        for layer, sides in zip(self.layers, found["edges"]):
            for extremes, (low, high) in zip(layer.extremes, sides):
                extremes.low, extremes.high = low, high
        if self.seen == total:
            self.group()
            for layer, losses in zip(self.layers, found["losses"]):
                for search, loss in zip(layer.searches, losses):
                    search.losses = loss


class Showing(Watching):
    """Kernels that show what attention gets to `watch(layer, sample)`."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.watch: Callable[[int, Sample], None] = lambda layer, sample: None

    def attention(self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        self.watch(self.layers[keys.data_ptr()], Sample.of(qkv, heads, step.positions))
        return super().attention(qkv, heads, keys, values, step)


def calibrate_kv(
    config: EngineConfig,
    spec: PackedSpec,
    text: Path,
    window: int,
    count: int,
    progress: Progress,
    loading: Progress,
) -> tuple[KvCalibration, Opened]:
    """Groups and clip factors from the first `count` windows of up to `window` tokens of a text.

    progress(done, total) after each window of both passes, loading(done, total) while weights load. Raises ValueError
    for windows or a text of too few tokens, for a spec the model's heads do not fit and for what `Opened` refuses;
    OSError for a file that cannot be read.
    """
    check_length(spec, count, window, "--window")
    with text.open("rb") as file:
        content = file.read(LARGEST_TEXT)
    opened = Opened(config)
    pieces, size = windows_for(opened, content, window, count)
    if size < window:
        check_length(spec, count, size, "--max-model-len")
    check_length(spec, len(pieces), len(pieces[0]))
    shape = opened.shape
    channels = shape.kv_heads * shape.head_dim
    shifts = [key_shift(opened, spec, layer, channels) for layer in range(shape.layers)]
    measured = Measured(spec, shape, shifts)
    model, digest = identity(opened.checkpoint), hashlib.sha256(content).hexdigest()
    key = conditions(opened, model, digest, size, len(pieces), str(spec))
    partial = places(opened.checkpoint, model, str(spec))[-1].with_suffix(".partial")
    measured.load(partial, key, len(pieces))
    measure(opened, measured, pieces, size, lambda: measured.save(partial, key), progress, loading)
    found = measured.result(model, digest)
    partial.unlink(missing_ok=True)
    return found, opened


def check_length(spec: PackedSpec, count: int, length: int, option: str = "") -> None:
    """count: windows, of `length` tokens each; option: what bounds these, empty for the text. Raises ValueError where
    too few of them are packed.
    """
    exact = spec.window + spec.sinks
    packed = max(0, count) * max(0, length - exact)
    if packed >= LEAST_PACKED:
        return
    instead = "give a text of some thousand words"
    if option:
        instead = f"raise {option}" + " or --windows" * (length > exact)
    raise ValueError(
        f"{spec} keeps {exact} tokens of a window as computed and packs {packed} of {count} windows of {length}; "
        f"allowed: from {LEAST_PACKED}, for fewer do not tell how far others may be clipped. Nothing was saved; "
        f"{instead}."
    )


def format_of(config: EngineConfig, name: str) -> PackedSpec:
    """What `kv_cache=name` means for the model. Raises ValueError for a format that has nothing to calibrate, and for
    what `Opened` and `kv_spec` refuse.
    """
    settings = replace(config, kv_cache=name, kv_dtype="float32")  # resolved; what is packed has a type of its own
    spec = kv_spec(Opened(config).shape, settings).packed
    if spec is None or not calibrated(spec):
        raise ValueError(f"format is {name!r}, which needs no calibration; allowed: skvq, or a format such as k2v2g64.")
    return spec


def key_shift(opened: Opened, spec: PackedSpec, layer: int, channels: int) -> Tensor:
    """[channels]: the bias of k_proj, where keys are stored as it leaves them; else zeros."""
    return key_bias(opened.checkpoint, layer, channels) if spec.rotary == "pre" else torch.zeros(channels)


def measure(
    opened: Opened,
    measured: Measured,
    pieces: Sequence[list[int]],
    size: int,
    save: Callable[[], None],
    progress: Progress,
    loading: Progress,
) -> None:
    """Run the windows that a pass has not seen through the model; what was seen is saved now and then."""
    showing = Showing(opened.kernels)
    forward = whole(opened, showing, size, loading)
    second = min(len(pieces), SEARCHED)
    saved = time.monotonic()

    def turn(piece: list[int], watch: Callable[[int, Sample], None]) -> None:
        showing.watch = watch
        forward(piece)

    def done() -> None:
        nonlocal saved
        progress(measured.seen + measured.searched, len(pieces) + second)
        if time.monotonic() - saved > PATIENCE:
            save()
            saved = time.monotonic()

    for piece in pieces[measured.seen :]:
        turn(piece, lambda layer, sample: measured.layers[layer].watch(sample))
        measured.seen += 1
        measured.tokens += len(piece)
        if measured.seen == len(pieces):
            measured.group()
        done()
    for piece in pieces[measured.searched : second]:
        turn(piece, lambda layer, sample: measured.layers[layer].search(sample))
        measured.searched += 1
        done()
