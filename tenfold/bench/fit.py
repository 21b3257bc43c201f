"""Which points of a grid fit into memory, and which engines can be measured there side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.bench.floor import Sizes

# Of a peer's growing cache: layers are copied as they grow. Ours has its pages from the start.
PEER_CACHE = 1.25
RESERVE = 10 << 30  # activations, compiled graphs and what the libraries keep, each engine
WATERMARK = 1.02  # the scheduler leaves a hundredth of the cache free when it lets a request in
PAGE = 64  # tokens; more than any page, so that what is rounded up still fits


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """`batch` prompts of `context` tokens. tokens: of each answer; 1 is a prefill alone. lengths: tokens of each prompt
    where they differ, up to `context`.
    """

    batch: int
    context: int
    tokens: int = 1
    lengths: tuple[int, ...] = ()

    @property
    def prompts(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return self.lengths or (self.context,) * self.batch

    @property
    def cached(self) -> int:
        """Tokens of KV cache when the answers are done."""
        return int(WATERMARK * sum(-(-(length + self.tokens) // PAGE) * PAGE + PAGE for length in self.prompts))

    def __str__(self) -> str:
        return f"{self.batch} x {'up to ' * bool(self.lengths)}{self.context}"


def points_of(text: str, tokens: int = 1) -> list[Point]:
    """`8x1024,1x32768`, or prompts that differ, `2x8192+30x256`, with so many tokens of each answer. Raises
    ValueError.
    """
    found = []
    for part in filter(None, text.split(",")):
        lengths: list[int] = []
        for group in part.split("+"):
            batch, cross, context = group.partition("x")
            if not cross or not batch.isdigit() or not context.isdigit() or int(batch) < 1 or int(context) < 2:
                raise ValueError(
                    f"{part!r} is no point; write sequences and context, such as 8x1024, or of several lengths "
                    "2x8192+30x256."
                )
            lengths += [int(context)] * int(batch)
        differ = tuple(lengths) if len(set(lengths)) > 1 else ()
        found.append(Point(len(lengths), max(lengths), tokens, differ))
    return found


@dataclass(frozen=True, slots=True)
class Session:
    """Engines that are in memory together, and the points they are measured at, in turn."""

    engines: tuple[str, ...]
    points: tuple[Point, ...]

    @property
    def batch(self) -> int:
        return max(p.batch for p in self.points)

    @property
    def context(self) -> int:
        return max(p.context + p.tokens for p in self.points)

    @property
    def cached(self) -> int:
        return max(p.cached for p in self.points)


def sessions(
    engines: Sequence[str], points: Sequence[Point], sizes: Sizes, free: int
) -> tuple[list[Session], list[tuple[str, Point]]]:
    """All engines side by side where they fit into `free` bytes, each alone at the points where only one fits; and the
    (engine, point) pairs that do not fit at all. Peers share one copy of the weights.
    """
    beside = [p for p in points if need(engines, p, sizes) <= free]
    found = [Session(tuple(engines), tuple(beside))] if beside else []
    left = [p for p in points if p not in beside]
    missing = []
    for name in engines:
        alone = [p for p in left if need([name], p, sizes) <= free]
        found += [Session((name,), tuple(alone))] if alone else []
        missing += [(name, p) for p in left if p not in alone]
    return found, missing


def need(engines: Sequence[str], point: Point, sizes: Sizes) -> int:
    """Bytes of these engines together at a point."""
    peers = len([name for name in engines if name != "tenfold"])
    ours = len(engines) - peers
    weights = sizes.weights * (ours + min(1, peers))
    cache = point.cached * sizes.kv_token
    return int(weights + cache * (ours + PEER_CACHE * min(1, peers)) + RESERVE * (ours + min(1, peers)))
