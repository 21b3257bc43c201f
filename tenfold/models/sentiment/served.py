"""A classifier as it is served. Norms of convolutions are folded into them. On a GPU batches are rounded up to a few
shapes whose tensors stay where they are, and each shape is a CUDA graph: a post is hundreds of small kernels, whose
launches take longer than they do.

Libraries pick a kernel, and with it the order of sums, by the shape they are given. So what is exact is computed in a
shape that the post alone decides: on a CPU by itself, without padding; on a GPU in rooms that all have as many places
and are as long as its own bucket, which is exact as far as a kernel does the same in each row.

Invariant: whatever else there is, whatever a room held before and however much of it is empty, a post gets the same
probabilities; where they are not exact, but for rounding.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tenfold.models.sentiment.folder import Classifier
from tenfold.models.sentiment.model import Posts
from tenfold.models.sentiment.prepare import Item
from tenfold.models.sentiment.text import BiLstm

BUCKETS = (16, 32, 64, 128, 256, 512)  # tokens up to which texts count as about as long
MOST_ROOMS = 64
Probabilities = list[float]


def bucket_of(length: int) -> int:
    """The most tokens that a text may have beside one of this length."""
    return next((size for size in BUCKETS if length <= size), length)


def fits(first: Item, other: Item) -> bool:
    """Whether a post may be computed beside one that is due, so that little is padded."""
    return len(other.ids) <= bucket_of(len(first.ids))


class Graph(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor] | None]
"""As `Capturer.capture`."""


@dataclass(slots=True, eq=False)
class Room:
    """A shape: posts that lie on the device, the host's side of their pictures, and how they are computed. graph: once
    it was captured; results [B, labels] are where it leaves them.
    """

    posts: Posts
    staging: Tensor
    graph: Graph | None = None
    results: Tensor | None = None

    def fill(self, items: Sequence[Item]) -> None:
        """Up to as many posts as there is room for; the others are a token each and looked at no more."""
        own, count = self.posts, len(self.posts.ids)
        ids = torch.zeros(own.ids.shape, dtype=torch.int64)
        lengths = torch.ones(count, dtype=torch.int64)
        shown = torch.zeros(len(own.rows), dtype=torch.bool)
        for i, item in enumerate(items):
            ids[i, : len(item.ids)] = torch.tensor(item.ids)
            lengths[i] = len(item.ids)
            if item.picture is not None:
                self.staging[i] = item.picture
                shown[i] = True
        own.ids.copy_(ids)
        own.lengths.copy_(lengths)
        if own.shown is not None:
            own.shown.copy_(shown)
            own.pictures[: len(items)].copy_(self.staging[: len(items)], non_blocking=True)


class Rooms:
    """Posts through rooms of a model on a device. A room is run plainly the first time, and captured the second. size:
    posts of every room, 0 for as many as are needed, rounded up to a power of two.
    """

    def __init__(self, classifier: Classifier, device: torch.device, capture: Capture, size: int = 0) -> None:
        self.classifier, self.device, self.capture, self.size = classifier, device, capture, size
        self._known: OrderedDict[tuple[int, int, bool], Room] = OrderedDict()

    def alike(self, first: Item, other: Item) -> bool:
        """Whether either alone would be in a room of the same shape."""
        return self._key([first]) == self._key([other])

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        """Places of posts that share a room of the shape that each of them would be in alone. Rooms have a size."""
        found: dict[tuple[int, int, bool], list[int]] = {}
        for i, item in enumerate(items):
            found.setdefault(self._key([item]), []).append(i)
        return [own[start : start + self.size] for own in found.values() for start in range(0, len(own), self.size)]

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """[posts, labels] float32 on the device, until the next call."""
        room = self._room(items)
        room.fill(items)
        if room.graph is not None and room.results is not None:
            room.graph.replay()
            return room.results[: len(items)]
        if room.results is not None and (made := self.capture(lambda: self._compute(room.posts))):
            room.graph, room.results = made
            room.graph.replay()
        else:
            room.results = self._compute(room.posts)
        return room.results[: len(items)]

    def _compute(self, posts: Posts) -> Tensor:
        return self.classifier.probabilities(self.classifier.model(posts).logits)

    def _key(self, items: Sequence[Item]) -> tuple[int, int, bool]:
        """Posts, tokens, and whether there are pictures."""
        count = self.size or 1 << (len(items) - 1).bit_length()
        length = min(bucket_of(max(len(item.ids) for item in items)), self.classifier.config.max_tokens)
        return count, length, any(item.picture is not None for item in items)

    def _room(self, items: Sequence[Item]) -> Room:
        key = self._key(items)
        if key not in self._known:
            self._known[key] = self._made(*key)
            if len(self._known) > MOST_ROOMS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _made(self, count: int, length: int, with_pictures: bool) -> Room:
        side, device, seen = self.classifier.config.image.size, self.device, count if with_pictures else 0
        pictures = torch.zeros(seen, 3, side, side, dtype=torch.uint8)
        posts = Posts(
            torch.zeros(count, length, dtype=torch.int64, device=device),
            torch.ones(count, dtype=torch.int64, device=device),
            pictures.to(device, copy=True),
            torch.arange(seen, device=device),
            torch.zeros(seen, dtype=torch.bool, device=device) if seen else None,
        )
        return Room(posts, pictures.pin_memory() if device.type == "cuda" else pictures)


class Served:
    """`served(items)` are the probabilities of each post. classifier: ready to be asked; it is changed in place. exact:
    whether they are the same to the bit whatever other items there are, None: on a CPU. most: posts of a room, where
    it is exact.
    """

    def __init__(self, classifier: Classifier, exact: bool | None = None, most: int = 64) -> None:
        self.classifier = classifier
        parameter = next(classifier.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.exact = self.device.type == "cpu" if exact is None else exact
        self.fits = fits
        if isinstance(classifier.model, nn.Module):
            fold_norms(classifier.model)
        self._rooms: Rooms | None = None
        self._stream: Any = None
        if self.device.type == "cuda":
            from tenfold.ops.gpu.graphs import Capturer

            if isinstance(lstm := classifier.model.bilstm, BiLstm):
                classifier.model.bilstm = UnpackedLstm(lstm)  # type: ignore[assignment]
            self._rooms = Rooms(classifier, self.device, Capturer().capture, most if self.exact else 0)
            if self.exact:
                self.fits = self._rooms.alike
            self._stream = torch.cuda.Stream(self.device)
            side = classifier.config.image.size
            self([Item([0], torch.zeros(3, side, side, dtype=torch.uint8))])  # compiles what is missing

    @property
    def alone(self) -> bool:
        """Whether each post is computed by itself."""
        return self.exact and self._rooms is None

    def __call__(self, items: Sequence[Item]) -> list[Probabilities]:
        found: list[Probabilities] = [[]] * len(items)
        with torch.inference_mode(), self._beside():
            for places in self._together(items):
                for place, told in zip(places, self._compute([items[i] for i in places]).tolist()):
                    found[place] = told
        return found

    def _together(self, items: Sequence[Item]) -> list[list[int]]:
        """Places of posts that are computed at once."""
        if not self.exact:
            return [[*range(len(items))]]
        return [[i] for i in range(len(items))] if self._rooms is None else self._rooms.groups(items)

    def _compute(self, items: Sequence[Item]) -> Tensor:
        if self._rooms is not None:
            return self._rooms(items)
        return self.classifier.probabilities(self.classifier.model(self.classifier.reader.batch(items)).logits)

    def _beside(self) -> AbstractContextManager[Any]:
        """A stream of its own, so that a language model in this process is not waited for."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class UnpackedLstm(nn.Module):
    """A `BiLstm` on a GPU whose lengths are there too. For asking, not for training."""

    def __init__(self, of: BiLstm) -> None:
        from tenfold.ops import lstm

        super().__init__()
        self._run = lstm.bidirectional
        self.layers = lstm.layers_of(of.lstm)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """As `BiLstm`, but lengths are on x's device."""
        return self._run(x, lengths, self.layers)


def fold_norms(model: nn.Module) -> None:
    """Each norm over a batch, which knows its statistics by now, into the convolution before it: the module of that
    name without the last number beside it ("conv1", "bn1"), or the one in front of it in a sequence.
    """
    for parent in model.modules():
        own = dict(parent.named_children())
        for name, norm in own.items():
            if isinstance(norm, nn.BatchNorm2d):
                before = name.replace("bn", "conv") if name.startswith("bn") else str(int(name) - 1)
                conv = own[before]
                assert isinstance(conv, nn.Conv2d)
                fold(conv, norm)
                setattr(parent, name, nn.Identity())


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """The convolution becomes both, in its type and layout."""
    mean, variance, kind = norm.get_buffer("running_mean"), norm.get_buffer("running_var"), conv.weight.dtype
    scale = norm.weight.float() / (variance.float() + norm.eps).sqrt()
    shift = norm.bias.float() - mean.float() * scale
    if conv.bias is not None:
        shift = shift + conv.bias.float() * scale
    conv.weight = nn.Parameter((conv.weight.float() * scale.view(-1, 1, 1, 1)).to(kind), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(kind), requires_grad=False)
