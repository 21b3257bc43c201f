"""`tenfold explain` and `tenfold tune`: what runs each linear operation, layer of experts and attention of a model on
this device, and measuring it.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tenfold.base.config import EngineConfig
from tenfold.engine import tune_steps
from tenfold.engine.memory import DTYPES, kv_spec
from tenfold.engine.opened import Opened
from tenfold.engine.phases import stored
from tenfold.engine.phases import table as phases
from tenfold.engine.phases.controller import Observed, Split
from tenfold.engine.phases.latency import Stairs
from tenfold.engine.phases.start import unable
from tenfold.models.table import build_model, model_config
from tenfold.ops.choose import Choice, Table
from tenfold.ops.cpu import arms
from tenfold.ops.cpu.tune import tune_linear
from tenfold.ops.kernels import Options
from tenfold.ops.matrix import Matrix
from tenfold.ops.table import make_kernels
from tenfold.serve.cli.terminal import Bar, columns
from tenfold.weights.load import Weights

if TYPE_CHECKING:  # Triton is there on GPU machines only
    from tenfold.engine.linears import Trace
    from tenfold.ops.gpu.arms import Arms, Work
    from tenfold.ops.gpu.attending import Attending, Reading
    from tenfold.ops.gpu.expert_arms import ExpertsWork
    from tenfold.ops.gpu.green import Part as Lane
    from tenfold.ops.gpu.report import Line, Read, Routed

T = TypeVar("T")


class Collecting(Weights):
    """Weights that remember the matrices they made."""

    matrices: list[Matrix]

    def matrix(self, *names: str, **shape: Any) -> Matrix:
        made = super().matrix(*names, **shape)
        self.matrices.append(made)
        return made


def explain(config: EngineConfig) -> None:
    """Print one row for each shape and batch size; on a GPU a chart of each shape too."""
    opened = Opened(config)
    if opened.device.type == "cuda":
        kernels, trace = gpu_kernels(opened), gpu_trace(opened)
        readings = gpu_readings(opened, trace)
        show_all(kernels, trace, readings)
        show_lanes(opened, kernels, trace, readings)
        show_phases(opened, kernels)
        show_ignored(kernels.arms.table)
    else:
        show(arms.explain(matrices(opened)))
        show_phases(opened, opened.kernels)
        show_ignored(arms.table())


def show_ignored(table: Table) -> None:
    """A line where there are measurements that are not used."""
    if table.ignored:
        print(f"\nNothing above comes from measurements: {table.ignored}.")


def tune(config: EngineConfig) -> None:
    """Measure, save, print. The machine should be idle. On a GPU what was measured before is kept, and with
    schedule=phases the parts of it that lanes may have are measured too.
    """
    opened = Opened(config)
    if opened.device.type == "cuda":
        tune_gpu(opened)
        return
    found = matrices(opened)
    chosen: list[Choice] = []
    measure_parts([Part(0, lambda progress: chosen.extend(tune_linear(found, progress=progress)))])
    show(chosen)
    print(f"saved in {arms.table().path}", file=sys.stderr)


def tune_gpu(opened: Opened) -> None:
    from tenfold.ops.gpu.timing import GpuTimer
    from tenfold.ops.gpu.tune_attention import KEPT

    require(opened.config)
    kernels, trace, config = gpu_kernels(opened), gpu_trace(opened), opened.config
    readings = gpu_readings(opened, trace, KEPT)
    pairs = lane_parts(opened, kernels)
    decodes = [decode for _, decode in pairs]
    parts = gpu_parts(kernels, GpuTimer(opened.device), trace.works, trace.experts, readings)
    for lane, works, own in lane_loads(pairs, trace.works, readings):
        parts += gpu_parts(kernels.on(lane.sms), GpuTimer(opened.device, lane), works, trace.experts, own)
    steps = len(tune_steps.sizes_of(longest_of(opened), math.inf)) * (1 + len(decodes))
    measure_parts([*parts, Part(steps, lambda say: tune_steps.tune(config, progress=say, parts=decodes))])
    stored.forget(kernels.arms.table, model_config(opened.checkpoint.config))
    show_all(kernels, trace, readings)
    show_lanes(opened, kernels, trace, readings)
    print(f"saved in {kernels.arms.table.path}", file=sys.stderr)


def require(config: EngineConfig) -> None:
    """Raises ValueError for a model that does not fit, before anything is measured."""
    opened = Opened(config)
    opened.choose()
    opened.memory.require()


def lane_sizes(opened: Opened, total: int) -> list[tuple[int, int]]:
    """Multiprocessors of prompts and of answers in every split that phases may have; none with another schedule."""
    if opened.config.schedule != phases.PHASES:
        return []
    return [(size, total - size) for size in phases.splits_of(opened.config.border, total)]


def lane_parts(opened: Opened, kernels: Any) -> "list[tuple[Lane, Lane]]":
    """The same as parts of the GPU; none, and a line that says why, where it cannot be divided."""
    from tenfold.ops.gpu import green

    sizes = lane_sizes(opened, kernels.sms)
    reason = green.unavailable() if sizes else ""
    if reason:
        print(f"{phases.fallback(phases.PHASES, reason)}.", file=sys.stderr)
        return []
    return [green.split(opened.device, size) for size, _ in sizes]


def lane_loads(
    pairs: Sequence[tuple[T, T]], works: "list[Work]", readings: "list[Reading]"
) -> "Iterator[tuple[T, list[Work], list[Reading]]]":
    """Each lane of pairs, prompts' and answers', with the linear operations and attentions that are tuned for it: few
    tokens and old contexts are for lanes of answers, chunks for those of prompts.
    """
    for prefill, decode in pairs:
        yield decode, works, [reading for reading in readings if not reading.tokens]
        yield prefill, [], [reading for reading in readings if reading.tokens]


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of what is measured. count: measurements, as far as is known beforehand; run: makes them, and calls what
    it is given before each.
    """

    count: int
    run: Callable[[Callable[[int, int, str], None]], object]


def gpu_parts(
    kernels: Any, timer: Any, works: "list[Work]", layers: "list[ExpertsWork]", readings: "list[Reading]"
) -> list[Part]:
    """Linear operations, experts and attention, each alone."""
    from tenfold.ops.gpu import tune, tune_attention, tune_experts

    device = kernels.device
    linear, experts, attending = kernels.arms, kernels.expert_arms, kernels.attending
    return [
        Part(len(tune.missing(works, linear)), lambda say: tune.tune(works, linear, timer, progress=say)),
        Part(
            len(tune_experts.missing(layers, experts)),
            lambda say: tune_experts.tune(layers, experts, timer, device, progress=say),
        ),
        Part(
            len(tune_attention.missing(readings, attending)),
            lambda say: tune_attention.tune(readings, attending, timer, progress=say),
        ),
    ]


def measure_parts(parts: Sequence[Part]) -> None:
    """One after the other, under one progress bar; where stderr is no terminal, a line each measurement."""
    counts = [part.count for part in parts]
    bar, is_terminal = Bar("measuring", counted=True), sys.stderr.isatty()

    def progress(at: int, done: int, total: int, what: str) -> None:
        counts[at] = total
        done, total = sum(counts[:at]) + done, sum(counts)
        if is_terminal:
            bar.update(done, total, what)
        else:
            print(f"{done + 1}/{total}  {what}", file=sys.stderr, flush=True)

    try:
        for at, part in enumerate(parts):
            part.run(partial(progress, at))
    finally:
        bar.stop()


def gpu_kernels(opened: Opened) -> Any:
    """The kernels of the GPU. Raises ValueError where our own are not used."""
    config = opened.config
    options = Options(config.graphs, config.softmax, config.gemm, config.merge)
    kernels = make_kernels(config.kernels, opened.device, gpu_dtype(config), config.threads, options)
    refuse_others(kernels, "gpu")
    return kernels


def show_phases(opened: Opened, kernels: Any) -> None:
    """With schedule=phases, times of prefill and decode on parts of the GPU, as an engine measured them, and the split
    that a load would get under the targets; or why there are no phases here.
    """
    if opened.config.schedule != phases.PHASES:
        return
    opened.choose()
    if reason := unable(opened):
        print(f"\n{phases.fallback(phases.PHASES, reason)}.")
        return
    subject = stored.Subject(opened.shape, opened.config, opened.weights)
    lines = phase_lines(kernels.arms.table, subject, kernels.sms)
    title = f"schedule=phases, border {opened.config.border}"
    if lines:
        print(f"\n{title}, milliseconds on so many multiprocessors:")
        print(columns(lines))
    else:
        print(f"\n{title}: nothing was measured yet; an engine measures it when it starts.")


def phase_lines(table: Table, subject: stored.Subject, total: int) -> list[tuple[str, ...]]:
    """A row for each split that the border may have, and what for; empty where nothing was measured."""
    config = subject.config
    sizes = phases.splits_of(config.border, total)
    tokens, requests = stored.sizes_of(config.max_model_len, config.max_batch)
    parts = [total, *sizes], [total, *(total - size for size in sizes)]
    stairs = stored.recall(table, subject, *parts, tokens, requests)
    if stairs is None:
        return []
    splits = [Split(size, total - size) for size in sizes]
    uses = phase_uses(config, splits or [Split(total, total)], stairs, total, tokens[-1], requests)
    heads = [f"prefill {n}" for n in tokens] + [f"decode {n}" for n in requests]
    rows = [("prompts + answers", *heads, "for")]
    for split in [Split(total, total), *splits]:
        times = [stairs.prefill_seconds(split.prefill, n) for n in tokens]
        times += [stairs.decode_seconds(split.decode, n) for n in requests]
        rows.append((str(split), *(f"{1e3 * seconds:.2f}" for seconds in times), ", ".join(uses.get(split, []))))
    return rows


def phase_uses(
    config: EngineConfig, splits: list[Split], stairs: Stairs, total: int, tokens: int, requests: list[int]
) -> dict[Split, list[str]]:
    """What each split would be used for: what the controller of the border decides beside so many answers while so many
    tokens of prompts wait. One that goes by what requests saw is told what was measured on the split that it has at the
    start. A border that stays has one split, for all.
    """
    targets = phases.targets_of(config, stairs, total)
    first = phases.first_of(config.border, splits) or Split(total, total)
    uses: dict[Split, list[str]] = {first: ["the start"] if config.border == phases.PAPER else []}
    for n in requests:
        controller = phases.make_controller(config.border, targets, splits, stairs)
        if controller is None:
            return {first: ["all"]}
        times = stairs.prefill_seconds(first.prefill, tokens), stairs.decode_seconds(first.decode, n)
        made = controller.decide(Observed(*times, tokens, 0.0, n, 0.0), first)
        riding = f" in steps with {made.chunk} tokens of prompts" if made.chunk else ""
        uses.setdefault(made.split, []).append(f"{n} answers{riding}")
    return uses


def gpu_dtype(config: EngineConfig) -> Any:
    return DTYPES.get(config.dtype) or DTYPES["bfloat16"]


def gpu_trace(opened: Opened) -> "Trace":
    """What a model asks of the kernels."""
    from tenfold.engine.linears import traced

    return traced(opened.checkpoint, gpu_dtype(opened.config), opened.config.weights)


def gpu_readings(opened: Opened, trace: "Trace", most_bytes: int = 0) -> "list[Reading]":
    """The attentions of a model for every measured number of requests and length that it may have: of layers whose keys
    and values are kept as they are computed, for others run in one way.
    """
    from tenfold.ops.gpu.attending import readings

    config, dtype = opened.config, gpu_dtype(opened.config)
    kept = DTYPES.get(config.kv_dtype, dtype)
    packed = kv_spec(opened.shape, replace(config, kv_dtype=str(kept).removeprefix("torch."))).packed
    layers = [layer for layer in trace.attentions if kept is dtype and (packed is None or layer[0].window)]
    return readings(layers, config.page_size, dtype, longest_of(opened), most_bytes)


def longest_of(opened: Opened) -> int:
    """Tokens that a request of a model may have."""
    return opened.config.max_model_len or model_config(opened.checkpoint.config).max_positions


def refuse_others(kernels: Any, name: str) -> None:
    if kernels.name != name:
        raise ValueError(
            f"The {kernels.name} kernels have one way to run a linear operation ({kernels.reason}); "
            "choices are made among the compiled CPU kernels and among the GPU kernels. "
            "`tenfold doctor` says whether they are there."
        )


def matrices(opened: Opened) -> list[Matrix]:
    """All matrices of a model, as the compiled kernels hold them. Raises ValueError where they are not used, or where
    the model does not fit into memory.
    """
    opened.choose()
    refuse_others(opened.kernels, "native")
    opened.memory.require()
    weights = Collecting(
        opened.checkpoint, opened.kernels, opened.device, DTYPES[opened.config.dtype], opened.config.weights
    )
    weights.matrices = []
    build_model(opened.checkpoint.config, weights, opened.memory.max_model_len)
    return weights.matrices


def show_all(kernels: Any, trace: "Trace", readings: "list[Reading]") -> None:
    show_gpu(trace.works, kernels.arms)
    show_experts(trace.experts, kernels.arms)
    show_attention(readings, kernels.attending)
    if {spec for spec, _ in trace.attentions} - {reading.spec for reading in readings}:
        print(
            "\nAttention over packed pages, over keys and values of another type than the model's, and of latent "
            "vectors runs in one way; it is not listed."
        )


def show_lanes(opened: Opened, kernels: Any, trace: "Trace", readings: "list[Reading]") -> None:
    """What runs on each part of the GPU that lanes may have, as far as it was measured there."""
    from tenfold.ops.gpu.tune import copy_key

    for sms, works, own in lane_loads(lane_sizes(opened, kernels.sms), trace.works, readings):
        lane = kernels.on(sms)
        if not lane.arms.table.times(copy_key(sms)):
            continue
        print(f"\nOn {sms} of {kernels.sms} multiprocessors, a lane of {'answers' if works else 'prompts'}:")
        if works:
            print()
            show_gpu(works, lane.arms)
        show_experts(trace.experts, lane.arms)
        show_attention(own, lane.attending)


def show_gpu(works: "list[Work]", running: "Arms") -> None:
    """A table of every shape and batch size, then a chart of each shape."""
    from tenfold.ops.gpu import report

    shapes = report.explain(works, running.table, running.sms, gemm=running.gemm)
    lines = [line for shape in shapes for line in shape.lines]
    head = ("OPERATION", "WEIGHT", "FORMAT", "BATCH", "SMS", "RUNS", "TIME", "FLOOR", "SHARE", "BECAUSE")
    print(columns([head, *map(gpu_row, lines)]))
    for shape in shapes:
        print("\n" + "\n".join(report.chart(shape)))
    rate = report.bandwidth(running.table, running.sms)
    if rate is not None:
        print(f"\nfloor: bytes moved at {rate:.0f} GB/s, the rate of a copy on this GPU{reading(running)}")
    print("M1: first batch at which a flat kernel beats the GEMV; M2: first at which the library beats both")


def show_experts(works: "list[ExpertsWork]", running: "Arms") -> None:
    """A table of every layer of experts and number of tokens, where there are some."""
    from tenfold.ops.gpu import report

    lines = report.experts(works, running.table, running.sms)
    if lines:
        head = ("EXPERTS", "WEIGHT", "FORMAT", "TOKENS", "SMS", "RUNS", "TIME", "FLOOR", "SHARE", "BECAUSE")
        print("\n" + columns([head, *map(gpu_row, lines)]))


def show_attention(readings: "list[Reading]", running: "Attending") -> None:
    """A table of every attention that was measured, and its softmax, and of a few where nothing was."""
    from tenfold.ops.gpu import report

    lines = report.attention(readings, running.table, running.sms, running.merge, running.softmax)
    head = ("ATTENTION", "TOKENS", "CONTEXT", "PAGE", "SMS", "RUNS", "TIME", "FLOOR", "SHARE", "BECAUSE")
    print("\n" + columns([head, *map(attention_row, lines)]))


def attention_row(line: "Read") -> tuple[str, ...]:
    key, choice = line.choice.key, line.choice
    read = line.reading
    more = "+" if read.tokens and not read.whole else ""  # behind a context that was there before
    sizes = (str(read.tokens or read.requests), f"{read.longest}{more}", str(read.page_size))
    took, floor = microseconds(choice.microseconds), microseconds(line.floor)
    share = "" if line.share is None else f"{line.share:.0%}"
    return (key.op, *sizes, str(key.budget), choice.arm, took, floor, share, because(choice))


def reading(running: "Arms") -> str:
    from tenfold.ops.gpu import report

    rate = report.bandwidth(running.table, running.sms, "read")
    return "" if rate is None else f"; reading alone reaches {rate:.0f} GB/s"


def gpu_row(line: "Line | Routed") -> tuple[str, ...]:
    key = line.choice.key
    weight, share = f"{key.rows} x {key.cols}", "" if line.share is None else f"{line.share:.0%}"
    took, floor = microseconds(line.choice.microseconds), microseconds(line.floor)
    budget = (str(key.batch), str(key.budget))
    return (key.op, weight, key.format, *budget, line.choice.arm, took, floor, share, because(line.choice))


def microseconds(took: float | None) -> str:
    return "" if took is None else f"{took:.1f} us"


def because(choice: Choice) -> str:
    """How it was chosen, and the runner-up."""
    source = choice.source if choice.step is None else f"steps of {choice.step:.1f} us"
    if choice.runner_up is None:
        return source
    return f"{source}; {choice.runner_up} takes {choice.runner_up_microseconds:.1f} us"


def show(chosen: list[Choice]) -> None:
    rows = [("WEIGHT", "FORMAT", "BATCH", "THREADS", "RUNS", "TIME", "BECAUSE")]
    for c in chosen:
        k = c.key
        weight = f"{k.rows} x {k.cols}"
        rows.append((weight, k.format, str(k.batch), str(k.budget), c.arm, microseconds(c.microseconds), because(c)))
    print(columns(rows))
