"""Plans of attention launches: pure host decisions, printable, made without a GPU."""

from dataclasses import dataclass

from tenfold.ops.kernels import SOFTMAX, AttentionSpec

# How splits of a context meet. two: partial states, and a kernel that merges them. last: the split that arrives last
# merges all in order, so results repeat bit for bit.
MERGES = ("two", "last")

MOST_HEAD_DIM = 256
MOST_ROWS = 128  # queries * group of a decode tile
MOST_SPLITS = 128
FEW_TILES = 4  # contexts of at most so many tiles are not split
RESIDENT = 2  # decode programs that share a multiprocessor, so that some load while others compute
FULL = 0.8  # share of the SMs that, when busy without splits, is busy enough
NEARLY_BEST = 0.85  # of the best efficiency that the smallest acceptable number of splits has


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One launch for up to `queries` new tokens a request.

    splits: parts of a context at most; tile: tokens that a program loads at once; stages: of the compiler's pipeline,
    two for each tile on its way (page numbers, then rows); least: tiles of a part at least; dot: tensor cores (else
    CUDA cores, for one query and one query head a KV head only); softmax, merge: arms.
    """

    splits: int
    tile: int = 64
    warps: int = 4
    stages: int = 5
    least: int = 2
    softmax: str = "lazy"
    merge: str = "last"
    dot: bool = True
    queries: int = 1

    def __post_init__(self) -> None:
        if self.softmax not in SOFTMAX:
            raise ValueError(f"softmax is {self.softmax!r}; allowed: {', '.join(SOFTMAX)}.")
        if self.merge not in MERGES:
            raise ValueError(f"merge is {self.merge!r}; allowed: {', '.join(MERGES)}.")
        if not 1 <= self.splits <= MOST_SPLITS:
            raise ValueError(f"splits is {self.splits}; allowed: 1 to {MOST_SPLITS}.")

    def __str__(self) -> str:
        unit = "dot" if self.dot else "row"
        rows = f" q{self.queries}" if self.queries > 1 else ""
        return (
            f"decode {self.softmax}/{self.merge}: {self.splits} splits of {self.least}+ tiles of {self.tile}, {unit}, "
            f"{self.warps} warps, {self.stages} stages{rows}"
        )


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One launch for chunks of any length. rows: queries times group of a tile; tile: tokens of context loaded at
    once; branch: the lazy arm skips the rescaling that no row needs.
    """

    rows: int = 128
    tile: int = 64
    warps: int = 8
    stages: int = 3
    softmax: str = "lazy"
    branch: bool = True

    def __post_init__(self) -> None:
        if self.softmax not in SOFTMAX:
            raise ValueError(f"softmax is {self.softmax!r}; allowed: {', '.join(SOFTMAX)}.")

    def __str__(self) -> str:
        branch = ", branch" if self.softmax == "lazy" and self.branch else ""
        return f"prefill {self.softmax}: {self.rows} x {self.tile}, {self.warps} warps, {self.stages} stages{branch}"


def splits(sms: int, programs: int, tiles: int, most: int = MOST_SPLITS) -> int:
    """How many parts to cut contexts of `tiles` tiles into, for `programs` programs without splits on `sms`
    multiprocessors: FlashAttention-3's rule.

    1 where the programs fill most of the GPU or the context is short; else the smallest number whose last wave leaves
    little idle: programs * splits / sms, divided by itself rounded up, is within NEARLY_BEST of the best.
    """
    if programs >= FULL * sms or tiles <= FEW_TILES:
        return 1
    counts = range(1, min(most, sms, tiles) + 1)
    efficiency = [programs * n / sms / -(-programs * n // sms) for n in counts]
    # A number that gives the same longest part as a smaller one only adds partial results.
    useful = [n == 1 or -(-tiles // n) != -(-tiles // (n - 1)) for n in counts]
    best = max(e for e, good in zip(efficiency, useful) if good)
    return next(n for n, e, good in zip(counts, efficiency, useful) if good and e >= NEARLY_BEST * best)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def padded(head_dim: int) -> int:
    """Columns of a head's tile: what the matrix unit takes."""
    return max(16, power_of_two(head_dim))


def seen(spec: AttentionSpec, max_kv: int, queries: int = 1) -> int:
    """Tokens of the longest context that some query sees."""
    return min(max_kv, spec.window + queries - 1) if spec.window else max_kv


def plan_decode(
    spec: AttentionSpec,
    requests: int,
    max_kv: int,
    sms: int,
    softmax: str = "lazy",
    merge: str = "last",
    queries: int = 1,
) -> DecodePlan:
    """The rule where nothing was measured. max_kv: the longest context there may be; queries: most new tokens of a
    request. Raises ValueError for a layer that the kernel cannot run.
    """
    check_decode(spec, queries)
    tile = 64 if spec.head_dim <= 128 else 32
    tiles = -(-seen(spec, max_kv, queries) // tile) + (1 if spec.window else 0)
    count = splits(RESIDENT * sms, requests * spec.kv_heads, tiles)
    return DecodePlan(count, tile=tile, softmax=softmax, merge=merge, queries=power_of_two(queries))


def check_decode(spec: AttentionSpec, queries: int) -> None:
    """Raises ValueError for what the decode kernel cannot run."""
    check_spec(spec)
    group = spec.heads // spec.kv_heads
    if not 1 <= power_of_two(queries) * group <= MOST_ROWS:
        raise ValueError(
            f"{queries} new tokens a request with {group} query heads a KV head are more than the {MOST_ROWS} rows of "
            "a decode tile; run the chunk through prefill."
        )


def check_spec(spec: AttentionSpec) -> None:
    """Raises ValueError for a layer that no kernel here can run."""
    if spec.heads % spec.kv_heads or spec.heads < 1:
        raise ValueError(f"{spec.heads} query heads cannot share {spec.kv_heads} KV heads evenly.")
    if not spec.scale > 0:
        raise ValueError(f"scale is {spec.scale}; the attention kernels take positive ones.")
    if not 1 <= spec.head_dim <= MOST_HEAD_DIM:
        raise ValueError(f"head_dim is {spec.head_dim}; the attention kernels take up to {MOST_HEAD_DIM}.")


def plan_prefill(spec: AttentionSpec, softmax: str = "lazy") -> PrefillPlan:
    """The rule where nothing was measured. Raises ValueError for a layer that the kernel cannot run."""
    check_spec(spec)
    return PrefillPlan(tile=64 if spec.head_dim <= 128 else 32, softmax=softmax)
