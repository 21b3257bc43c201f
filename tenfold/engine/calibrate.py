"""Measuring how large a model's attention scores get on a text, for the unified maximum of its softmax.

The model runs as it would serve, one window of the text after the other, each a sequence of its own; between rotary
embedding and attention the scores of every head are looked at. Windows count in order, so a run that was interrupted
goes on where it stopped and ends with the same result.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.cache.store import KVSpec, KVStore
from tenfold.engine.memory import DTYPES
from tenfold.engine.opened import Opened
from tenfold.engine.text import Text
from tenfold.models.table import build_model
from tenfold.nn.step import Step
from tenfold.ops.attention.unified_max import BINS, histogram, quantile, visible_scores
from tenfold.ops.kernels import AttentionSpec, Kernels, Replay, Separate, run
from tenfold.weights import beside
from tenfold.weights.identity import identity
from tenfold.weights.load import Weights
from tenfold.weights.softmax import RARE, SoftmaxStatistics, places

LARGEST_TEXT = 64 << 20  # bytes that are read
EVERY = 8  # of how many rows one counts for the range of all scores
MOST = 0.9999  # share of all scores that the range holds
PATIENCE = 5.0  # seconds of work that an interruption may cost

Progress = Callable[[int, int], None]


class Ranges:
    """What was seen so far: row maxima of each head, as extremes and histogram, and all scores in one histogram."""

    SEEN = ("low", "high", "maxima", "scores")

    def __init__(self, layers: int, heads: int) -> None:
        self.windows = 0
        self.tokens = 0
        self.low = np.full((layers, heads), np.inf, dtype=np.float32)
        self.high = np.full((layers, heads), -np.inf, dtype=np.float32)
        self.maxima = np.zeros((layers, heads, BINS), dtype=np.int32)
        self.scores = np.zeros(BINS, dtype=np.int64)

    def add(self, layer: int, q: Tensor, k: Tensor, spec: AttentionSpec) -> None:
        """q [T, heads * head_dim], k [kv_heads, T, head_dim] of one sequence."""
        group = spec.heads // spec.kv_heads
        heads = q.view(len(q), spec.kv_heads, group, spec.head_dim)
        for i in range(spec.kv_heads):
            scores = visible_scores(heads[:, i], k[i], spec)
            tops = scores.amax(-1)
            own = slice(i * group, (i + 1) * group)
            self.low[layer, own] = np.minimum(self.low[layer, own], tops.amin(-1).cpu().numpy())
            self.high[layer, own] = np.maximum(self.high[layer, own], tops.amax(-1).cpu().numpy())
            self.maxima[layer, own] += histogram(tops).cpu().numpy()
            self.scores += histogram(scores[:, ::EVERY].reshape(1, -1))[0].cpu().numpy()

    def result(self, model: str, text: str) -> SoftmaxStatistics:
        """Raises ValueError where scores were not finite."""
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError("The model's attention scores are not finite; its weights are damaged, or need --dtype.")
        maxima, scores = torch.from_numpy(self.maxima), torch.from_numpy(self.scores)
        low, high = torch.from_numpy(self.low), torch.from_numpy(self.high)
        rest = (1 - MOST) / 2
        return SoftmaxStatistics(
            model=model,
            text=text,
            tokens=self.tokens,
            low=low.tolist(),
            high=high.tolist(),
            rare_low=torch.maximum(low, quantile(maxima, RARE, upper=False)).tolist(),
            rare_high=torch.minimum(high, quantile(maxima, 1 - RARE, upper=True)).tolist(),
            score_low=float(quantile(scores, rest, upper=False)),
            score_high=float(quantile(scores, 1 - rest, upper=True)),
        )

    def save(self, path: Path, key: str) -> None:
        """For `load`, all or nothing."""
        write_state(path, key, {name: getattr(self, name) for name in (*self.SEEN, "windows", "tokens")})

    def load(self, path: Path, key: str) -> None:
        """Go on from what `save` left under the same key; anything else is passed over."""
        found = read_state(path, key)
        known = {name: np.asarray(getattr(self, name)) for name in self.SEEN}
        if any(
            name not in found or found[name].shape != have.shape or found[name].dtype != have.dtype
            for name, have in known.items()
        ):
            return
        for name in known:
            setattr(self, name, found[name])
        self.windows, self.tokens = int(found["windows"]), int(found["tokens"])


def write_state(path: Path, key: str, arrays: Mapping[str, Any]) -> None:
    """What a run has seen so far, for `read_state`, all or nothing. key: what it was seen under. Raises OSError."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    content = buffer.getvalue()
    beside.write(path, hashlib.sha256(key.encode() + content).digest() + content)


def read_state(path: Path, key: str) -> dict[str, np.ndarray]:
    """What `write_state` left under the same key; empty where that is not what lies there, byte for byte."""
    try:
        stored = path.read_bytes()
    except OSError:
        return {}
    size = hashlib.sha256().digest_size
    digest, content = stored[:size], stored[size:]
    if digest != hashlib.sha256(key.encode() + content).digest():
        return {}
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def conditions(opened: Opened, *more: Any) -> str:
    """Everything that what is seen depends on: how the model runs, and more."""
    config = opened.config
    return json.dumps([*more, opened.kernels.name, config.dtype, config.weights, config.kv_dtype])


class Watching(Separate):
    """Kernels that do as others do, for those that look at attention. One sequence a step, its pages in order."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.layers: dict[int, int] = {}  # by where the layer's keys lie

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def replay(self) -> Replay:
        return run

    def know(self, store: KVStore) -> None:
        """Whose keys lie where."""
        self.layers = {keys.data_ptr(): layer for layer, keys in enumerate(store.keys)}


class Recording(Watching):
    """Kernels that show the scores of every attention to `ranges`."""

    def __init__(self, kernels: Kernels, ranges: Ranges) -> None:
        super().__init__(kernels)
        self.ranges = ranges

    def attend(self, q: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        (spec,) = (part for part in rest if isinstance(part, AttentionSpec))
        k = keys.transpose(0, 1).reshape(spec.kv_heads, -1, spec.head_dim)[:, : len(q)]
        self.ranges.add(self.layers[keys.data_ptr()], q, k, spec)
        return self.kernels.attend(q, keys, *rest)


def calibrate(
    config: EngineConfig, text: Path, window: int, count: int, progress: Progress, loading: Progress
) -> tuple[SoftmaxStatistics, Opened]:
    """Statistics over the first `count` windows of up to `window` tokens of a text.

    progress(done, total) after each window, loading(done, total) while weights load. Raises ValueError for a text
    without a window, for latent attention and for what `Opened` refuses; OSError for a file that cannot be read.
    """
    if window < 2 or count < 1:
        raise ValueError(f"{count} windows of {window} tokens were asked for; allowed: from 1 window of 2 tokens.")
    with text.open("rb") as file:
        content = file.read(LARGEST_TEXT)
    opened = Opened(config)
    if opened.shape.latent is not None:
        raise ValueError(
            f"{config.model} has latent attention, whose softmax takes no measured maximum; allowed: models without. "
            "It runs as it is, and there is nothing to measure."
        )
    pieces, size = windows_for(opened, content, window, count)
    ranges = Ranges(opened.shape.layers, opened.shape.heads)
    model, digest = identity(opened.checkpoint), hashlib.sha256(content).hexdigest()
    key = conditions(opened, model, digest, size, len(pieces))
    partial = places(opened.checkpoint, model)[-1].with_suffix(".partial")
    ranges.load(partial, key)
    if ranges.windows < len(pieces):
        measure(opened, ranges, pieces, size, lambda: ranges.save(partial, key), progress, loading)
    found = ranges.result(model, digest)
    partial.unlink(missing_ok=True)
    return found, opened


def windows_for(opened: Opened, content: bytes, window: int, count: int) -> tuple[list[list[int]], int]:
    """The windows of a text as token ids, and their size, for a model that fits into memory. Raises ValueError."""
    opened.choose()
    opened.memory.require()
    size = min(window, opened.memory.max_model_len)
    return windows(Text(opened.checkpoint), content.decode("utf-8", errors="replace"), size, count), size


def calibrate_ids(config: EngineConfig, pieces: Sequence[list[int]]) -> tuple[SoftmaxStatistics, Opened]:
    """Statistics over windows of token ids, for models without a tokenizer. Raises ValueError as `calibrate`."""
    opened = Opened(config)
    opened.choose()
    opened.memory.require()
    ranges = Ranges(opened.shape.layers, opened.shape.heads)
    measure(opened, ranges, pieces, max(map(len, pieces)), lambda: None, _silent, _silent)
    return ranges.result(identity(opened.checkpoint), hashlib.sha256(repr(pieces).encode()).hexdigest()), opened


def _silent(done: int, total: int) -> None:
    pass


def windows(text: Text, content: str, size: int, count: int) -> list[list[int]]:
    """Token ids of the first windows, each with what the model expects before a text. Raises ValueError."""
    tokens = text.encode(content, add_special_tokens=False)
    plain, full = text.encode("a", add_special_tokens=False), text.encode("a")
    begin = full[: full.index(plain[0])] if plain and plain[0] in full else []
    each = max(1, size - len(begin))
    pieces = [begin + tokens[at : at + each] for at in range(0, min(len(tokens), each * count), each)]
    found = [piece for piece in pieces if len(piece) == size] or pieces[:1]
    if not found:
        raise ValueError("The calibration text is empty; give a file with some thousand words of the usual kind.")
    return found


def measure(
    opened: Opened,
    ranges: Ranges,
    pieces: Sequence[list[int]],
    size: int,
    save: Callable[[], None],
    progress: Progress,
    loading: Progress,
) -> None:
    """Run the windows that `ranges` has not seen through the model; what was seen is saved now and then."""
    forward = whole(opened, Recording(opened.kernels, ranges), size, loading)
    saved = time.monotonic()
    for piece in pieces[ranges.windows :]:
        forward(piece)
        ranges.windows += 1
        ranges.tokens += len(piece)
        progress(ranges.windows, len(pieces))
        if time.monotonic() - saved > PATIENCE:
            save()
            saved = time.monotonic()


def whole(opened: Opened, kernels: Watching, size: int, loading: Progress) -> Callable[[list[int]], None]:
    """The model on these kernels, as a function that runs one sequence of up to `size` tokens through it."""
    config, shape = opened.config, opened.shape
    weights = Weights(
        *(opened.checkpoint, cast(Kernels, kernels), opened.device, DTYPES[config.dtype], config.weights, loading)
    )
    model = build_model(opened.checkpoint.config, weights, size)
    pages = -(-size // config.page_size)
    spec = KVSpec(shape.layers, shape.kv_heads, shape.head_dim, DTYPES[config.kv_dtype], config.page_size)
    store = KVStore(spec, pages, opened.device)
    kernels.know(store)

    def forward(ids: list[int]) -> None:
        with torch.inference_mode():
            model.forward(step_of(ids, store, pages))

    return forward


def step_of(ids: list[int], store: KVStore, pages: int) -> Step:
    """A step that computes one whole sequence; the logits of its last token only."""
    device, count = store.keys[0].device, len(ids)

    def tensor(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    places_of = torch.arange(count, dtype=torch.int32, device=device)
    return Step(
        token_ids=tensor(ids, torch.int64),
        positions=places_of,
        slots=places_of,
        page_table=torch.arange(pages, dtype=torch.int32, device=device)[None],
        query_start=tensor([0, count]),
        kv_lengths=tensor([count]),
        logits_rows=tensor([count - 1], torch.int64),
        max_query=count,
        max_kv=count,
        kv=store,
    )
