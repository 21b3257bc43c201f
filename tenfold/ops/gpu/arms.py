"""Which implementation ("arm") of a linear operation runs on a GPU: the table of choices over families of arms.

A `Work` says what is to be computed. A family offers plans for it by name ("stream:16x4x1", "cublas"); FAMILIES maps
the first word of a name to its family, and a new family is a new entry. Where nothing was measured `rule` decides.
Arms give the same result but for the order of sums and the roundings that their modules name.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold.ops.choose import Choice, Key, Table
from tenfold.ops.formats import format_of, is_format
from tenfold.ops.gemm import dense, flat, gemv, lowbit
from tenfold.ops.gpu import bulk, nvrtc, quantize, ring, ring_packed, stream, stream_packed, sums, w4a8
from tenfold.ops.gpu import norm as norms
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

BATCHES = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 128)
"""Numbers of tokens that are measured; others run what the next larger one does, and more than the last the rule."""
ACTS = (None, "silu", "gelu_tanh")
MOST_STREAMED = 8  # tokens up to which the rule takes our own kernels (H100, 2026-11-28)


@dataclass(frozen=True, slots=True)
class Use:
    """How a model uses a matrix: whether it norms before, its gate, whether it adds a residual after, and whether the
    result is wanted in float32 (logits).
    """

    norm: bool = False
    act: str | None = None
    residual: bool = False
    float32: bool = False

    def __str__(self) -> str:
        parts = (
            "norm" if self.norm else None,
            self.act,
            "residual" if self.residual else None,
            "float32" if self.float32 else None,
        )
        return "+".join(["linear", *filter(None, parts)])


HEAD = Use(norm=True, float32=True)
ROUTER = Use(float32=True)
PLACES = count()
LOGITS = len(ACTS) * 4  # of `Matrix.arms`, behind the uses that `Arms.__call__` numbers


@dataclass(frozen=True, slots=True)
class Work:
    """One linear operation: a weight of rows x cols in a format ("dense" or packed), its use, tokens, compute type."""

    rows: int
    cols: int
    format: str
    use: Use
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def stored(self) -> str:
        """The format of a table's key: the type of dense weights, or the packed format."""
        return str(self.dtype).removeprefix("torch.") if self.format == "dense" else self.format


@dataclass(frozen=True, slots=True)
class Fused:
    """What goes with x and w: the last arguments of every `run`. float32: the result had better be of that type, which
    not every arm can make.
    """

    bias: Tensor | None = None
    norm: Norm | None = None
    act: str | None = None
    residual: Tensor | None = None
    float32: bool = False

    def all(self) -> tuple[Tensor | None, Norm | None, str | None, Tensor | None]:
        return self.bias, self.norm, self.act, self.residual


class Context:
    """What launches share on one device: multiprocessors, and memory for partial sums."""

    def __init__(self, device: torch.device, sms: int) -> None:
        self.device = device
        self.sms = sms
        self.sums = sums.Workspace(device)
        self.packed = lowbit.Workspace(device)


class Family(Protocol):
    def candidates(self, work: Work, sms: int) -> Iterator[str]:
        """Names of the plans worth timing; none for work the family does not do."""
        ...

    def legal(self, name: str, work: Work) -> bool:
        """Whether a plan can do the work. Raises ValueError for a name that is none of this family's."""
        ...

    def bind(self, name: str) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        """The plan, to be called with a legal x and w."""
        ...


class Library:
    """cuBLAS by way of PyTorch."""

    def candidates(self, work: Work, sms: int) -> Iterator[str]:
        if work.format == "dense":
            yield "cublas"

    def legal(self, name: str, work: Work) -> bool:
        return name == "cublas" and work.format == "dense"

    def bind(self, name: str) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        def run(context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
            if fused.norm is not None:
                x = norms.run(x, fused.norm)
            return dense.linear(x, w.data[0], fused.bias, None, fused.act, fused.residual, float32=fused.float32)

        return run


@dataclass(frozen=True, slots=True)
class Dense:
    """Our own kernels of one module for dense weights. wide_norm: whether a norm works in float16 too: x * weight may
    overflow there, so a kernel that rounds it must not.
    """

    prefix: str
    module: Any
    wide_norm: bool
    run: Callable[[Any, Context, Tensor, Tensor, Fused], Tensor]
    needs_sms: bool = False

    def candidates(self, work: Work, sms: int) -> Iterator[str]:
        sizes = (work.tokens, work.rows, work.cols)
        for plan in self.module.candidates(*sizes, *((sms,) if self.needs_sms else ())):
            name = str(plan)
            if name.partition(":")[0] == self.prefix and self.legal(name, work):
                yield name

    def legal(self, name: str, work: Work) -> bool:
        plan = self.module.parse(name)
        if work.format != "dense" or work.dtype not in nvrtc.HALF or work.rows % (2 if work.use.act else 1):
            return False
        if work.use.norm and work.dtype != torch.bfloat16 and not self.wide_norm:
            return False
        return bool(self.module.legal(plan, work.tokens, work.rows, work.cols))

    def bind(self, name: str) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        plan, run = self.module.parse(name), self.run
        return lambda context, x, w, fused: run(plan, context, x, w.data[0], fused)


class Lowbit:
    """Packed weights: `ops/gemm/lowbit.py`."""

    def candidates(self, work: Work, sms: int) -> Iterator[str]:
        if self._takes(work):
            yield from map(str, lowbit.candidates(work.rows, work.cols, work.tokens, format_of(work.format), sms))

    def legal(self, name: str, work: Work) -> bool:
        plan = lowbit.parse(name)
        return self._takes(work) and lowbit.legal(plan, work.rows, work.cols, format_of(work.format))

    def _takes(self, work: Work) -> bool:
        return is_format(work.format) and work.dtype in nvrtc.HALF

    def bind(self, name: str) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        plan = lowbit.parse(name)

        def run(context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
            rounded = None
            if lowbit.rounds(plan) and x.dtype == torch.bfloat16 and quantize.fits(x):
                rounded = quantize.quantize(x, fused.norm)
            return lowbit.linear(
                x, w, *fused.all(), plan=plan, workspace=context.packed, sms=context.sms, rounded=rounded
            )

        return run


@dataclass(frozen=True, slots=True)
class Packed:
    """Our kernels of one module for some formats. takes: whether they read a format; plans: those worth timing."""

    module: Any
    takes: Callable[[str], bool]
    plans: Callable[[Work, int], Iterable[Any]]
    run: Callable[[Any, Context, Tensor, Matrix, Fused], Tensor]

    def candidates(self, work: Work, sms: int) -> Iterator[str]:
        if self._takes(work):
            yield from map(str, self.plans(work, sms))

    def legal(self, name: str, work: Work) -> bool:
        plan = self.module.parse(name)
        return self._takes(work) and bool(self.module.legal(plan, work.tokens, work.rows, work.cols))

    def _takes(self, work: Work) -> bool:
        known = self.takes(work.format) and work.dtype in nvrtc.HALF
        return known and not work.rows % (2 if work.use.act else 1)

    def bind(self, name: str) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        plan, run = self.module.parse(name), self.run
        return lambda context, x, w, fused: run(plan, context, x, w, fused)


def copied(kind: str) -> Packed:
    """Weights of a few tokens that come by bulk copies, dense ones too."""

    def run(plan: Any, context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
        return bulk.run(plan, context.sms, x, w, *fused.all(), float32=fused.float32)

    return Packed(
        bulk,
        lambda format: bulk.reads(kind, format),
        lambda work, sms: bulk.candidates(kind, work.tokens, work.rows, work.cols),
        run,
    )


def streamed(kind: str) -> Packed:
    """Packed weights of a few tokens."""

    def run(plan: Any, context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
        return stream_packed.run(plan, context.sms, x, w, *fused.all(), float32=fused.float32)

    return Packed(
        stream_packed,
        lambda format: stream_packed.kind_of(format) == kind,
        lambda work, sms: stream_packed.candidates(kind, work.tokens, work.rows, work.cols),
        run,
    )


def through_ring(kind: str) -> Packed:
    """Packed weights of up to 64 tokens."""

    def run(plan: Any, context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
        return ring_packed.run(plan, context.sums, context.sms, x, w, *fused.all(), float32=fused.float32)

    return Packed(
        ring_packed,
        lambda format: ring_packed.kind_of(format) == kind,
        lambda work, sms: ring_packed.candidates(kind, work.tokens, work.rows, work.cols, sms),
        run,
    )


def float8() -> Packed:
    """Float8 by float8."""

    def run(plan: Any, context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
        return ring.run_fp8(plan, context.sums, context.sms, x, w, *fused.all())

    return Packed(
        ring,
        quantize.takes,
        lambda work, sms: ring.candidates(work.tokens, work.rows, work.cols, sms, ring.FLOAT8),
        run,
    )


def nibbles() -> Packed:
    """Weights of 4 bits by float8."""

    def run(plan: Any, context: Context, x: Tensor, w: Matrix, fused: Fused) -> Tensor:
        return w4a8.run(plan, context.sms, x, w, *fused.all())

    return Packed(w4a8, w4a8.takes, lambda work, sms: w4a8.candidates(work.tokens, work.rows, work.cols), run)


def run_stream(plan: stream.StreamPlan, context: Context, x: Tensor, w: Tensor, fused: Fused) -> Tensor:
    return stream.run(plan, context.sms, x, w, *fused.all(), float32=fused.float32)


def run_ring(plan: ring.RingPlan, context: Context, x: Tensor, w: Tensor, fused: Fused) -> Tensor:
    return ring.run(plan, context.sums, context.sms, x, w, *fused.all(), float32=fused.float32)


def run_flat(plan: flat.FlatPlan, context: Context, x: Tensor, w: Tensor, fused: Fused) -> Tensor:
    return flat.run(plan, context.sums, x, w, *fused.all())


def run_gemv(plan: gemv.GemvPlan, context: Context, x: Tensor, w: Tensor, fused: Fused) -> Tensor:
    return gemv.run(plan, x, w, *fused.all())


TRITON = Lowbit()
FAMILIES: dict[str, Family] = {
    "cublas": Library(),
    "stream": Dense("stream", stream, True, run_stream),
    "ring": Dense("ring", ring, True, run_ring, needs_sms=True),
    "flat": Dense("flat", flat, False, run_flat, needs_sms=True),
    "gemv": Dense("gemv", gemv, True, run_gemv),
    **{kind: copied(kind) for kind in bulk.KINDS},
    **{kind: streamed(kind) for kind in stream_packed.CODES},
    **{kind: through_ring(kind) for kind in ring_packed.CODES},
    ring.FLOAT8: float8(),
    "w4a8": nibbles(),
    **dict.fromkeys(lowbit.KINDS, TRITON),
}
OWN = ("stream", "bulk", "ring", "flat")  # flat products of ours, the paper's ImplB


def family(name: str) -> Family:
    """Raises ValueError for a name of no family."""
    prefix = name.partition(":")[0]
    if prefix not in FAMILIES:
        raise ValueError(f"{name!r} is no arm of a linear operation; families: {', '.join(FAMILIES)}.")
    return FAMILIES[prefix]


def candidates(work: Work, sms: int) -> list[str]:
    """The arms that can do the work, the rule's among them."""
    every = chain.from_iterable(one.candidates(work, sms) for one in dict.fromkeys(FAMILIES.values()))
    return list(dict.fromkeys((rule(work, sms), *every)))


def legal(name: str, work: Work) -> bool:
    try:
        return family(name).legal(name, work)
    except ValueError:
        return False


def rule(work: Work, sms: int) -> str:
    """The arm where nothing was measured. Raises ValueError for a format that no family serves."""
    if is_format(work.format):
        return next(name for name in own_packed(work, sms) if name and legal(name, work))
    if work.format != "dense":
        raise ValueError(f"There is no GPU kernel for weights of {work.format}; allowed: dense or a packed format.")
    return next((str(plan) for plan in own(work, sms) if plan is not None and legal(str(plan), work)), "cublas")


def own_packed(work: Work, sms: int) -> Iterator[str]:
    """The rules of our kernels for packed weights, the best first; the last is legal for every format."""
    sizes = (work.tokens, work.rows, work.cols)
    if work.tokens <= MOST_STREAMED:
        yield from map(str, bulk.rule(work.format, *sizes))
        streams = stream_packed.kind_of(work.format)
        yield next(FAMILIES[streams].candidates(work, sms), "") if streams else ""
    if quantize.takes(work.format):
        yield str(ring.rule_fp8(work.tokens))
    through = ring_packed.kind_of(work.format)
    if through and work.tokens <= ring_packed.MOST_TOKENS:
        yield str(ring_packed.rule(through, *sizes, sms) or "")
    if w4a8.takes(work.format):
        yield str(w4a8.rule(*sizes, sms) or "")
    yield str(lowbit.plan(work.rows, work.cols, work.tokens, format_of(work.format), sms))


def own(work: Work, sms: int) -> Iterator[Any]:
    """The rules of our kernels for dense weights, the best first; where none is legal the library does the work."""
    sizes = (work.tokens, work.rows, work.cols)
    yield from bulk.rule(work.format, *sizes)
    if work.tokens <= MOST_STREAMED and min(work.rows, work.cols) < bulk.WIDE:
        yield next(stream.candidates(*sizes), None)
    yield ring.rule(*sizes, sms)


def bucket(tokens: int) -> int:
    """The measured number of tokens that stands for `tokens`; 0: none does."""
    return next((batch for batch in BATCHES if tokens <= batch), 0)


def key(work: Work, sms: int) -> Key:
    """Where the table keeps what was measured for work of at most BATCHES[-1] tokens."""
    return Key(str(work.use), work.rows, work.cols, work.stored, bucket(work.tokens), sms)


def choice(work: Work, table: Table, sms: int, gemm: str = "auto") -> Choice:
    """What runs. A measured arm that cannot do this number of tokens gives way to the rule. gemm: what a user fixed."""
    at = key(work, sms) if bucket(work.tokens) else replace(key(work, sms), batch=work.tokens)
    chosen = fixed(gemm, work, table, sms)
    if chosen is not None:
        return Choice(at, chosen, "fixed", table.times(at).get(chosen))
    first = rule(work, sms)
    if not bucket(work.tokens):
        return Choice(at, first, "rule")
    found = table.pick(at, first)
    return found if legal(found.arm, work) else Choice(at, first, "rule")


def fixed(gemm: str, work: Work, table: Table, sms: int) -> str | None:
    """The arm where a user fixed it: gemm of `kernels.GEMM`, or "auto". None: that leaves it open."""
    if gemm == "auto" or work.format != "dense":
        return None
    plan = None if gemm == "library" else best_flat(work, table, sms)
    _, _, stages = gemm.partition("-")
    if plan is not None and stages:
        plan = replace(plan, stages=int(stages))
    return "cublas" if plan is None or not legal(str(plan), work) else str(plan)


def best_flat(work: Work, table: Table, sms: int) -> flat.FlatPlan | None:
    """The flat plan that was measured to be the fastest, else the one of its rule; None: none is legal."""
    times = {name: took for name, took in table.times(key(work, sms)).items() if name.startswith("flat:")}
    measured = sorted((name for name in times if legal(name, work)), key=times.__getitem__)
    return flat.parse(measured[0]) if measured else flat.plan(work.tokens, work.rows, work.cols, sms)


def version() -> str:
    """Changes with the source of any arm and with the library's version."""
    here = Path(__file__).parent
    names = "norm rope sums quantize bulk ring ring_packed stream stream_packed w4a8 green"
    names += " decode even prefill attending experts experts_packed expert_arms"
    ours = [here / f"{name}.py" for name in names.split()]
    triton = [path for folder in ("gemm", "attention") for path in (here.parent / folder).glob("*.py")]
    sources = sorted([*here.glob("csrc/*"), *triton, here.parent / "elementwise.py", *ours])
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def table(device: str) -> Table:
    """The table of a GPU of this name."""
    return Table(f"gpu {device}", version())


class Arms:
    """Linear operations of one device in one compute type, each by the arm that was measured to be the fastest, unless
    a user fixed it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, sms: int, table: Table, gemm: str = "auto") -> None:
        """gemm: what a user fixed, of `kernels.GEMM`."""
        self.dtype = dtype
        self.gemm = gemm
        self.sms = sms
        self.table = table
        self.context = Context(device, sms)
        self.seen: dict[Work, None] = {}  # each different operation that was asked for, for one token
        self._bound: dict[str, Callable[[Context, Tensor, Matrix, Fused], Tensor]] = {}
        self._place = next(PLACES) << 32  # of this object's picks in `Matrix.arms`, which other lanes have theirs in

    def __call__(
        self,
        x: Tensor,
        w: Matrix,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `Kernels.linear`. Raises ValueError for weights of a format that no family serves, and for a residual with
        another number of rows, beyond which kernels would read.
        """
        if residual is not None and len(residual) != len(x):
            raise ValueError(f"A residual of {len(residual)} rows was given for {len(x)} tokens; they must be as many.")
        kind = ACTS.index(act) * 4 + (norm is not None) * 2 + (residual is not None)
        at = self._place + x.shape[0] * 16 + kind
        run = w.arms.get(at)
        if run is None:
            work = Work(
                w.rows, w.cols, w.format, Use(norm is not None, act, residual is not None), x.shape[0], self.dtype
            )
            run = w.arms[at] = self.pick(work)
        return run(self.context, x, w, Fused(bias, norm, act, residual))

    def logits(self, x: Tensor, w: Matrix, norm: Norm | None) -> Tensor:
        """As `Kernels.logits`."""
        at = self._place + x.shape[0] * 16 + LOGITS + (norm is None)
        run = w.arms.get(at)
        if run is None:
            use = HEAD if norm is not None else ROUTER
            run = w.arms[at] = self.pick(Work(w.rows, w.cols, w.format, use, x.shape[0], self.dtype))
        return run(self.context, x, w, Fused(None, norm, float32=True)).float()

    def pick(self, work: Work) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        self.seen[replace(work, tokens=1)] = None
        return self.bind(choice(work, self.table, self.sms, self.gemm).arm)

    def bind(self, name: str) -> Callable[[Context, Tensor, Matrix, Fused], Tensor]:
        """The arm of this name. Raises ValueError."""
        if name not in self._bound:
            self._bound[name] = family(name).bind(name)
        return self._bound[name]

    def explain(self) -> list[Choice]:
        """What runs each operation that was asked for, at every measured number of tokens."""
        every = [replace(work, tokens=batch) for work in list(self.seen) for batch in BATCHES]
        return [choice(work, self.table, self.sms, self.gemm) for work in every]
