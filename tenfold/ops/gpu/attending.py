"""Which implementation ("arm") of attention runs on a GPU: the table of choices over our kernels and other projects'.

A `Reading` says what is read: whose heads, how many requests or new tokens, how long a context. Arms of decodes are
plans of csrc/decode.cu by name ("decode:8x1:s4:cluster", "decode:4x3:even"), "triton" (or "triton:two", whose splits
meet in a second launch) and the libraries of `ops/attention/third_party.py`; arms of chunks are `attend.CHUNKS`, plans
of csrc/prefill.cu ("wgmma:3x128x2:apart") and libraries, PyTorch's own ("sdpa") for chunks that are all of a context,
whose lengths the host knows. The softmax in a kernel of ours is a choice of its own, among
`softmaxes`; arms are measured with "lazy", then each softmax in the arm that runs. Where nothing was measured `rule`
and `softmax_rule` decide.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.ops.attention import attend as attend_module
from tenfold.ops.attention import decode as split_kv
from tenfold.ops.attention import third_party
from tenfold.ops.attention.plan import MOST_HEAD_DIM
from tenfold.ops.choose import Choice, Key, Table
from tenfold.ops.gpu import decode, even, graphs, prefill, rope
from tenfold.ops.gpu.decode import DecodePlan
from tenfold.ops.gpu.prefill import ChunkPlan
from tenfold.ops.kernels import SOFTMAX, UNIFIED, AttentionSpec, Contexts, Heads

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Numbers of requests and lengths of contexts that are measured; others run what the next larger one does, and more
than the last the rule."""
TOKENS = (64, 256, 1024, 4096, 8192)  # new tokens of the longest chunk, likewise
MANY = TOKENS[-1] + 1
TRITON, TRITON_TWO = "triton", "triton:two"
SDPA = "sdpa"
CHUNKS = tuple(name for name in attend_module.CHUNKS if name != SDPA)
SHAPES = ((4, 3, 1), (8, 1, 1), (8, 1, 3), (4, 2, 3), (4, 1, 3), (8, 1, 2))
SHAPES_NARROW = ((4, 4, 1), (8, 2, 1), (8, 1, 6), (4, 2, 6))
"""Warps of a block, blocks of a multiprocessor, tiles of a warp under way, that are worth timing; heads of up to 64
dimensions need less room."""
LEAST_BUSY = 3  # of so many multiprocessors one has a block, or a long context is not read fast
MERGED_IN_CLUSTERS = 4096  # tokens, up to which splits that meet in clusters are worth timing
PLAN = re.compile(r"decode:(\d+)x(\d+)(?:x([2-8]))?:(?:s([1-9]\d*):(cluster|global)|even)")
CHUNK_PLAN = "wgmma:"  # how names of plans of chunks begin

Arm = str | DecodePlan | ChunkPlan


class Layer(NamedTuple):
    """A kind of attention. unified: whether a unified maximum of its scores is known."""

    spec: AttentionSpec
    unified: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """One attention: `requests` decodes of contexts up to `longest` tokens, or where tokens is not 0 chunks of at most
    that many new tokens. unified: whether a unified maximum of the scores is known. whole: whether there is one chunk,
    which is all of its context.
    """

    spec: AttentionSpec
    requests: int
    longest: int
    page_size: int
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 0
    unified: bool = False
    whole: bool = False

    @property
    def op(self) -> str:
        """The operation of a table's key."""
        s = self.spec
        kind = "prefill attention" if self.tokens else "attention"
        more = (f" window {s.window}" if s.window else "") + (f" softcap {s.softcap:g}" if s.softcap else "")
        return f"{kind} {s.heads}/{s.kv_heads} heads of {s.head_dim}{more}"

    @property
    def nbytes(self) -> int:
        """Of keys and values that contexts of the full length have; the floor counts those a query sees."""
        return 2 * self.requests * self.longest * self.spec.kv_heads * self.spec.head_dim * self.dtype.itemsize


def bucket(value: int, measured: tuple[int, ...]) -> int:
    """The least measured number that is at least `value`; 0: none is."""
    return next((one for one in measured if value <= one), 0)


def at(reading: Reading) -> Reading | None:
    """The measured reading that stands for this one; None: none does."""
    if reading.tokens:
        tokens = bucket(reading.tokens, TOKENS)
        return replace(reading, requests=1, longest=tokens, tokens=tokens) if tokens else None
    requests, longest = bucket(reading.requests, REQUESTS), bucket(reading.longest, LONGEST)
    return replace(reading, requests=requests, longest=longest) if requests and longest else None


def key(reading: Reading, sms: int) -> Key:
    """Where the table keeps what was measured of a reading: rows are tokens of a page, cols those of a context."""
    stored = str(reading.dtype).removeprefix("torch.")
    return Key(reading.op, reading.page_size, reading.longest, stored, reading.tokens or reading.requests, sms)


def parse(name: str) -> DecodePlan:
    """The plan of this name, with the lazy softmax. Raises ValueError."""
    found = PLAN.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} is no plan of decode attention; allowed: decode:WARPSxBLOCKS, x2 to x8 behind it or not, then "
            ":sSPLITS:cluster, :sSPLITS:global or :even."
        )
    warps, blocks, depth = (int(n or 1) for n in found.groups()[:3])
    splits = int(found[4] or decode.EVEN)
    return DecodePlan(warps, blocks, splits, "lazy", found[5] == "cluster", depth)


def name_of(plan: DecodePlan) -> str:
    return str(replace(plan, softmax="lazy")).replace("decode:lazy:", "decode:", 1)


def parse_chunk(name: str) -> ChunkPlan:
    """The plan of chunks of this name, with the lazy softmax. Raises ValueError."""
    return prefill.parse(name.replace(CHUNK_PLAN, f"{CHUNK_PLAN}lazy:", 1))


def chunk_plans(reading: Reading) -> list[str]:
    """Names of the plans of csrc/prefill.cu that can do a reading."""
    if not prefill.legal(reading.spec, reading.dtype, reading.page_size):
        return []
    return [str(plan).replace(f"{CHUNK_PLAN}lazy:", CHUNK_PLAN) for plan in prefill.candidates(reading.spec)]


def rule(reading: Reading, sms: int) -> str:
    """The arm where nothing was measured."""
    if reading.tokens:
        return CHUNKS[0]
    if decode.legal(reading.spec, reading.dtype, reading.page_size):
        return name_of(decode.plan(reading.spec, reading.requests, reading.longest, sms))
    return TRITON


def candidates(reading: Reading, sms: int) -> list[str]:
    """The arms worth timing, the rule's first."""
    others = third_party.legal(reading.spec, reading.dtype, reading.page_size, bool(reading.tokens))
    if reading.tokens:
        return [*CHUNKS, *chunk_plans(reading), *others, *([SDPA] if takes_sdpa(reading) else [])]
    plans = map(name_of, own_plans(reading, sms))
    return list(dict.fromkeys([rule(reading, sms), *(n for n in plans if legal(n, reading, sms)), TRITON, *others]))


def takes_sdpa(reading: Reading) -> bool:
    """Whether PyTorch's attention can do a reading and has a fast way to."""
    plain = not reading.spec.window and not reading.spec.softcap
    return reading.whole and plain and reading.dtype in (torch.bfloat16, torch.float16)


def own_plans(reading: Reading, sms: int) -> Iterator[DecodePlan]:
    """In blocks of every shape: several contexts shared out by their lengths; splits that fill the GPU once or twice,
    or half where registers hold what is under way, or none. And clusters, for contexts that are not long.
    """
    spec, longest = reading.spec, reading.longest
    pairs = reading.requests * spec.kv_heads
    shapes = SHAPES if spec.head_dim > 64 else SHAPES_NARROW
    if reading.requests > 1 and longest >= even.LONGER:
        yield from (DecodePlan(warps, blocks, decode.EVEN, "lazy", False, depth) for warps, blocks, depth in shapes)
    for warps, blocks, depth in shapes:
        full = sms * blocks // pairs
        for splits in sorted({1, full, 2 * full} if depth > decode.REGISTERS else {1, full // 2, full, 2 * full}):
            busy = pairs * max(1, splits) * LEAST_BUSY >= sms or longest <= MERGED_IN_CLUSTERS
            if busy and (depth == 1 or longest >= depth * splits * warps * decode.TILE):
                yield DecodePlan(warps, blocks, splits, "lazy", False, depth)
    if longest <= MERGED_IN_CLUSTERS:
        for splits in (2, 4, decode.LARGEST_CLUSTER):
            yield DecodePlan(8, 1 if spec.head_dim > 64 else 2, splits, "lazy", True)


def legal(name: str, reading: Reading, sms: int) -> bool:
    """Whether an arm can do a reading here and now."""
    chunks = bool(reading.tokens)
    if name in third_party.LIBRARIES:
        return name in third_party.legal(reading.spec, reading.dtype, reading.page_size, chunks)
    if chunks:
        return name in CHUNKS or name in chunk_plans(reading) or (name == SDPA and takes_sdpa(reading))
    if name in (TRITON, TRITON_TWO):
        return True
    spec, longest = reading.spec, reading.longest
    if not PLAN.fullmatch(name) or not decode.legal(spec, reading.dtype, reading.page_size):
        return False
    plan = parse(name)
    if not decode.fits(plan, spec):
        return False
    if plan.splits == decode.EVEN:
        return decode.even_fits(plan, spec, reading.requests, sms)
    tiles = -(-min(longest, spec.window + decode.TILE if spec.window else longest) // (decode.TILE * plan.warps))
    if plan.splits > 1 and plan.splits > tiles:
        return False  # a warp would have nothing to read
    if plan.cluster:
        return plan.splits in (2, 4, 8) and spec.heads // spec.kv_heads * spec.head_dim % plan.splits == 0
    most = decode.most_partial(spec.heads // spec.kv_heads, spec.head_dim)  # of `decode.Workspace`
    room = reading.requests * spec.kv_heads * plan.splits <= most
    return plan.splits == 1 or (
        plan.splits > 1 and room and plan.splits <= decode.most_splits(spec.head_dim, plan.warps)
    )


def softmax_key(reading: Reading, sms: int) -> Key:
    """Where the table keeps what was measured of a reading with each softmax."""
    known = ", maximum known" if reading.unified else ""
    return replace(key(reading, sms), op=f"softmax of {reading.op}{known}")


def softmax_rule(reading: Reading) -> str:
    """The softmax where nothing was measured: the unified maximum takes 3 to 8 % off attention of chunks, and adds 8 to
    15 % to that of decodes (H200, 2026-11-30).
    """
    return "unified" if reading.unified and reading.tokens else "lazy"


def softmaxes(reading: Reading) -> list[str]:
    """Those that can do a reading in the kernels of ours, the rule's first."""
    known = prefill.ARMS if reading.tokens else SOFTMAX
    legal = [name for name in known if reading.unified or name not in UNIFIED]
    return list(dict.fromkeys([softmax_rule(reading), *legal]))


def takes_softmax(arm: str) -> bool:
    """Whether an arm is a kernel of ours."""
    return arm not in third_party.LIBRARIES and arm != SDPA


def near(reading: Reading) -> Iterator[Reading]:
    """The measured readings whose choice is as good as any for this one: its own, that of contexts twice as long, and
    of half.
    """
    yield reading
    if not reading.tokens:
        for longest in (2 * reading.longest, reading.longest // 2):
            if longest in LONGEST:
                yield replace(reading, longest=longest)


def nearest(reading: Reading, table: Table, place: Callable[[Reading, int], Key], sms: int) -> Reading | None:
    """The first of `near` of which the table has times at `place`."""
    keys = ((one, place(one, sms)) for one in near(reading))
    return next((one for one, key in keys if table.steps(key) or table.times(key)), None)


def choice(reading: Reading, table: Table, sms: int, merge: str = "auto") -> Choice:
    """What runs: what was measured of the reading, or of one near it. An arm that cannot do just this reading, and the
    rule's of the other one, give way to this one's rule. merge: what a user fixed.
    """
    stands = at(reading)
    place = key(stands or reading, sms)
    chosen = fixed(merge, reading, sms)
    if chosen is not None:
        return Choice(place, chosen, "fixed", table.times(place).get(chosen))
    first = rule(reading, sms)
    if stands is None:
        return Choice(place, first, "rule")
    one = nearest(stands, table, key, sms) or stands
    found = table.pick(key(one, sms), rule(one, sms), () if takes_sdpa(reading) else (SDPA,))
    if found.source == "rule" or not legal(found.arm, reading, sms):
        return Choice(place, first, "rule")
    if one != stands and found.arm == rule(one, sms):
        return Choice(place, first, "rule")
    return replace(found, key=place)


def softmax_choice(reading: Reading, table: Table, sms: int, softmax: str = "auto") -> Choice:
    """Which softmax runs, likewise. softmax: what a user fixed, of `kernels.SOFTMAX`."""
    stands, legal = at(reading), softmaxes(reading)
    place = softmax_key(stands or reading, sms)
    if softmax != "auto":
        return Choice(place, softmax, "fixed", table.times(place).get(softmax))
    one = nearest(stands, table, softmax_key, sms) if stands else None
    found = Choice(place, legal[0], "rule") if one is None else table.pick(softmax_key(one, sms), legal[0])
    return replace(found, key=place) if found.arm in legal else Choice(place, legal[0], "rule")


def fixed(merge: str, reading: Reading, sms: int) -> str | None:
    """The arm where a user fixed how splits meet, of `kernels.MERGE`; None: that leaves it open."""
    if merge == "auto" or reading.tokens:
        return None
    first = rule(reading, sms)
    if merge == "launch":
        return TRITON_TWO
    if first == TRITON:
        return None
    plan = parse(first)
    if merge == "global":
        return name_of(replace(plan, cluster=False))
    splits = 1 << (min(decode.LARGEST_CLUSTER, plan.splits or decode.LARGEST_CLUSTER).bit_length() - 1)
    _, (warps, blocks) = decode.sizes(reading.spec)
    wanted = name_of(DecodePlan(warps, blocks, splits, plan.softmax, True) if splits > 1 else plan)
    return wanted if legal(wanted, reading, sms) else first


class Attending:
    """Attention of one device, each reading by the arm and with the softmax that were measured to be the fastest,
    unless a user fixed how splits meet (merge, of `kernels.MERGE`) or the softmax (of `kernels.SOFTMAX`). recomputed
    [1] int64 counts rows that a unified maximum did not serve, of its own or with that of other lanes.
    """

    def __init__(
        self,
        device: torch.device,
        sms: int,
        table: Table,
        merge: str = "auto",
        softmax: str = "auto",
        recomputed: Tensor | None = None,
    ) -> None:
        self.device = device
        self.sms = sms
        self.table = table
        self.merge = merge
        self.softmax = softmax
        self.splits = split_kv.Workspace(device, recomputed)
        self.recomputed = self.splits.recomputed
        self.decoding: list[decode.Workspace] = []  # the last is used; captured graphs go on using those before it
        self.seen: dict[Layer, None] = {}
        self._known: dict[Reading, tuple[Arm, str]] = {}

    def pick(self, reading: Reading) -> tuple[Arm, str]:
        """The plan of a kernel of our own, or the name of another arm; and the softmax in it."""
        if reading.tokens:
            reading = at(reading) or replace(reading, requests=1, longest=1, tokens=MANY)  # few kinds to remember
        found = self._known.get(reading)
        if found is None:
            self.seen[Layer(reading.spec, reading.unified)] = None
            softmax = softmax_choice(reading, self.table, self.sms, self.softmax).arm
            arm = bound(choice(reading, self.table, self.sms, self.merge).arm, softmax)
            found = self._known[reading] = arm, softmax
        return found

    def asked(self) -> list[Reading]:
        """Readings that were picked for."""
        return list(self._known)

    def run(
        self,
        arm: Arm,
        qkv: Tensor,
        heads: Heads,
        keys: Tensor,
        values: Tensor,
        step: Contexts,
        max_kv: int,
        softmax: str = "lazy",
        out: Tensor | None = None,
    ) -> Tensor:
        """As `Kernels.attention` by the named arm, into `out` if that is given; max_kv: of the step, or more."""
        spec, phi = heads.spec, heads.phi
        if isinstance(arm, DecodePlan):
            workspace = self._workspace(len(step.kv_lengths), spec.kv_heads)
            new = (qkv, heads, step.positions, step.slots, keys, values)
            shared = decode.share(arm, spec, step.kv_lengths, self.sms, step.memo, keys.data_ptr())
            return decode.run(arm, workspace, *new, step.page_table, step.kv_lengths, out=out, shared=shared)
        q = rope.write(qkv, heads, step.positions, step.slots, keys, values)
        if isinstance(arm, str) and arm in third_party.LIBRARIES:
            found = third_party.LIBRARIES[arm].run(q, keys, values, step, spec, max_kv)
            return found if out is None else out.copy_(found)
        if isinstance(arm, ChunkPlan):
            how = attend_module.Arms(softmax, plan=arm)
        elif arm in attend_module.CHUNKS:
            how = attend_module.Arms(softmax, chunks=arm)
        else:
            how = attend_module.Arms(softmax, "two" if arm == TRITON_TWO else "last")
        contexts = (step.page_table, step.query_start, step.kv_lengths)
        read = (q, keys, values, *contexts, spec, step.max_query, max_kv)
        lengths = [(len(q), len(q))] if arm == SDPA else None
        return attend_module.attend(
            *read,
            workspace=self.splits,
            sms=self.sms,
            arms=how,
            phi=phi,
            decodes=step.decodes,
            lengths=lengths,
            out=out,
        )

    def _workspace(self, requests: int, kv_heads: int) -> decode.Workspace:
        if not self.decoding or self.decoding[-1].pairs < requests * kv_heads:
            pairs = max(requests, graphs.LARGEST) * kv_heads
            self.decoding.append(decode.Workspace(self.device, pairs, self.recomputed))
        return self.decoding[-1]

    def explain(self, page_size: int, dtype: torch.dtype, longest: int) -> list[Choice]:
        """What runs each attention that was asked for, at every measured number of requests and length, and with which
        softmax.
        """
        every = readings(list(self.seen), page_size, dtype, longest)
        arms = [choice(reading, self.table, self.sms, self.merge) for reading in alike(every)]
        return arms + [softmax_choice(reading, self.table, self.sms, self.softmax) for reading in every]


def bound(name: str, softmax: str) -> Arm:
    """An arm as `Attending.run` takes it."""
    if name.startswith(CHUNK_PLAN):
        return parse_chunk(name)
    return replace(parse(name), softmax=softmax) if PLAN.fullmatch(name) else name


def readings(
    layers: Sequence[Layer], page_size: int, dtype: torch.dtype, most_tokens: int, most_bytes: int = 0
) -> list[Reading]:
    """What is measured of a model: every number of requests and every context up to most_tokens; most_bytes: of the
    keys and values of one reading (0: no limit). Heads that one kernel alone takes (latent attention) are left out.
    """
    layers = [layer for layer in layers if layer[0].head_dim <= MOST_HEAD_DIM]
    longest = [n for n in LONGEST if n <= max(LONGEST[0], most_tokens)]
    sizes = [(r, n, 0) for r in REQUESTS for n in longest] + [(1, t, t) for t in TOKENS if t <= most_tokens]
    every = [Reading(spec, r, n, page_size, dtype, t, known, t > 0) for spec, known in layers for r, n, t in sizes]
    return [reading for reading in every if not most_bytes or reading.nbytes <= most_bytes]


def alike(readings: Iterable[Reading]) -> list[Reading]:
    """Those that differ in their arms: which softmax can run makes no difference."""
    return list(dict.fromkeys(replace(reading, unified=False) for reading in readings))


def floor_bytes(reading: Reading) -> int:
    """Bytes that a reading cannot but move: keys and values in sight, queries and results; of contexts as they are
    measured.
    """
    spec, size = reading.spec, reading.dtype.itemsize
    seen = sum(min(context, spec.window) if spec.window else context for context in measured_contexts(reading))
    rows = reading.tokens or reading.requests
    kept = seen * 2 * spec.kv_heads
    return size * spec.head_dim * (kept + rows * 2 * (spec.heads + spec.kv_heads))


def measured_contexts(reading: Reading) -> list[int]:
    """Tokens of the contexts that a reading is measured with. The longest of decodes is three quarters of what the
    reading allows: a captured step serves lengths from half of what its page table has room for.
    """
    return [reading.longest] if reading.tokens else spread(reading.longest * 3 // 4, reading.requests)


def spread(longest: int, requests: int) -> list[int]:
    """Tokens of each context of a measured step of decodes: those of a served one differ, so evenly from the longest to
    a small part of it.
    """
    return [max(1, longest * (requests - i) // requests) for i in range(requests)]
