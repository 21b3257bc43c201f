"""Charts of benchmark results as PNG files. Needs matplotlib, the package's optional extra `bench`."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from tenfold.bench import arms as arms_bench
from tenfold.bench import kv as kv_bench
from tenfold.bench import phases as phases_bench
from tenfold.bench.case import Figure
from tenfold.bench.files import NoCharts
from tenfold.bench.single import Result
from tenfold.engine.phases.table import MOVING

# Colours that people with the common colour blindnesses tell apart (Okabe and Ito 2008), and another marker for each.
STYLES = {
    "tenfold": ("#0072B2", "o"),
    "vllm": ("#D55E00", "s"),
    "hf-compiled": ("#009E73", "^"),
    "hf-generate": ("#CC79A7", "D"),
    "hf": ("#E69F00", "v"),
    "llama.cpp": ("#56B4E9", "P"),
}
NAMES = {
    "tenfold": "Tenfold",
    "vllm": "vLLM",
    "hf-compiled": "transformers, static cache + compile",
    "hf-generate": "transformers, generate",
    "hf": "transformers, bare loop",
}
FLOOR = "#555555"


def pyplot() -> Any:
    """matplotlib without a screen. Raises NoCharts where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise NoCharts("Charts need matplotlib; install it with: pip install 'tenfold[bench]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def engines_in(results: Sequence[Result]) -> list[str]:
    found = dict.fromkeys(row.engine for result in results for row in result.rows)
    return [name for name in STYLES if name in found] + [name for name in found if name not in STYLES]


def tpot(results: Sequence[Result], path: Path, over: str = "context") -> Path:
    """TPOT of every engine and the floor, over the context with a panel for each batch size, or over the batch with a
    panel for each context. results: of one model; contexts that differ are on no axis.
    """
    plt = pyplot()
    rows = [row for result in results for row in result.rows if row.tpot is not None and not row.lengths]
    if not rows:
        raise ValueError("There is no decode in these results to draw.")
    apart = "batch" if over == "context" else "context"
    panels, ticks = (sorted({getattr(row, name) for row in rows}) for name in (apart, over))
    figure, axes = plt.subplots(
        *(1, len(panels)),
        figsize=(max(5.0, 3.3 * len(panels)), 4.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    floors = {(b, c): ms for result in reversed(results) for b, c, ms in result.floors}
    for axis, panel in zip(axes[0], panels):
        here = [row for row in rows if getattr(row, apart) == panel]
        for engine in engines_in(results):
            first: dict[int, float] = {}
            for row in here:  # of those measured beside a peer and alone, the first
                if row.engine == engine and row.tpot is not None:
                    first.setdefault(getattr(row, over), row.tpot)
            colour, marker = STYLES.get(engine, ("#000000", "x"))
            line = {"color": colour, "marker": marker, "linewidth": 1.8}
            if first:
                axis.plot(*zip(*sorted(first.items())), label=NAMES.get(engine, engine), **line)
        floor = {getattr(r, over): floors[r.batch, r.context] for r in here if (r.batch, r.context) in floors}
        if floor:
            axis.plot(*zip(*sorted(floor.items())), color=FLOOR, linestyle="--", label="memory floor")
        decorate(axis, ticks, f"{apart} {short(panel)}", "prompt tokens" if over == "context" else "batch size")
    axes[0][0].set_ylabel("ms per output token (TPOT), lower is better")
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title(results[0].model, results[0].machine, results[0].weights))
    return saved(figure, path, plt)


def decorate(axis: Any, ticks: Sequence[int], heading: str, below: str) -> None:
    axis.set_title(heading, fontsize=11)
    axis.set_xlabel(below)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [short(t) for t in ticks])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    marks = [m for m in MARKS if low * 0.9 <= m <= high * 1.1]
    axis.set_yticks(marks, [f"{m:g}" for m in marks])
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


MARKS = [m * 10**e for e in range(-4, 5) for m in (1, 2, 3, 5, 7)]  # labels of a logarithmic axis


def short(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def title(model: str, machine: Mapping[str, str], weights: str = "") -> str:
    name = model.removeprefix("shape:").partition("@")[0]
    parts = [f"{name} (random weights)" if model.startswith("shape:") else name, weights, machine.get("hardware", "")]
    return " · ".join(filter(None, [*parts, machine.get("commit", "")]))


def serving(data: Mapping[str, Any], path: Path) -> Path:
    """TTFT and TPOT of every engine against the rate of requests, median and 99th percentile, and latency against
    throughput. data: of `load.plain`.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.0), layout="constrained")
    series: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(data["runs"], key=lambda run: run["rate"]):
        series.setdefault(run.get("engine", "tenfold"), []).append(run)
    for engine, runs in series.items():
        (colour, marker), name = STYLES[engine], NAMES[engine]
        style = {"color": colour, "marker": marker, "markersize": 4}
        rates = [run["rate"] for run in runs]
        for axis, measure in zip(axes, ("ttft", "tpot")):
            for which, line in (("p50", "-"), ("p99", ":")):
                values = [run["percentiles"][measure][which] for run in runs]
                axis.plot(rates, values, line, label=f"{name} {which}", **style)
        served = [run["output_tokens"] / run["seconds"] for run in runs]
        axes[2].plot(served, [run["percentiles"]["tpot"]["p50"] for run in runs], label=f"{name} p50", **style)
    headings = ("time to first token (ms)", "time per output token (ms)", "latency against throughput")
    for axis, heading, below in zip(axes, headings, ("requests/s", "requests/s", "output tokens/s")):
        axis.set_title(heading, fontsize=11)
        axis.set_xlabel(below)
        axis.set_ylim(bottom=0)
        axis.grid(True, color="#dddddd", linewidth=0.7)
        axis.legend(frameon=False, fontsize=9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[2].set_ylabel("ms per output token")
    figure.suptitle(title(data["model"], data["machine"]))
    return saved(figure, path, plt)


def throughput(data: Mapping[str, Any], path: Path) -> Path:
    """Tokens a second of every engine, of answers alone and of prompts too. data: of `throughput.Result.plain`."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.5 * len(data["seconds"])), sharey=True, layout="constrained")
    answers = data["answer_tokens"]
    both = [a + p for a, p in zip(answers, data["prompt_tokens"])]
    for axis, tokens, below in zip(axes, (answers, both), ("answers", "prompts and answers")):
        rates = {NAMES[name]: [t / s for t, s in zip(tokens, own)] for name, own in data["seconds"].items()}
        bars(axis, rates, [STYLES[name][0] for name in data["seconds"]])
        axis.set_xlabel(f"tokens a second, {below}")
        axis.set_xlim(left=0)
    figure.suptitle(title(data["model"], data["machine"]))
    return saved(figure, path, plt)


def arms(result: arms_bench.Result, path: Path) -> Path:
    """How many times as fast decoding is with every arm as without. Raises ValueError where nothing was measured."""
    if not result.rows:
        raise ValueError("There is no arm in this result to draw.")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.28 * len(result.rows)), layout="constrained")
    gains = {f"{row.group}: {row.name}, {row.batch} x {row.context}": row.gain.samples for row in result.rows}
    bars(axis, gains, STYLES["tenfold"][0])
    axis.axvline(1.0, color=FLOOR, linestyle="--", linewidth=1.2)
    axis.set_xlabel("time per output token without / with, above 1 where it helps")
    figure.suptitle(title(result.model, result.machine))
    return saved(figure, path, plt)


def bars(axis: Any, samples: Mapping[str, Sequence[float]], colours: Any) -> None:
    """A bar for each name, from the top down, as long as the median of its samples, and their range."""
    figures = [Figure(tuple(own)) for own in samples.values()]
    reach = [[f.median - f.spread[0] for f in figures], [f.spread[1] - f.median for f in figures]]
    axis.barh(list(samples), [f.median for f in figures], xerr=reach, color=colours, ecolor=FLOOR, capsize=3)
    axis.invert_yaxis()
    axis.grid(True, axis="x", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)


def mxmoe(data: Mapping[str, Any], path: Path) -> Path:
    """Perplexity, and divergence from the exact model, over bits a weight: uniform experts and every way of mixing, of
    as many bits as there are mixed ones of.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    series: dict[str, list[Mapping[str, Any]]] = {}
    bits = [row["bits"] for row in data["rows"] if row["kind"].startswith("mixed")]
    near = [row for row in data["rows"] if min(bits) - 0.1 < row["bits"] < max(bits) + 0.1]
    for row in sorted(near, key=lambda row: row["bits"]):
        series.setdefault("uniform" if row["kind"].startswith("uniform") else row["kind"], []).append(row)
    for axis, measure in zip(axes, ("perplexity", "divergence")):
        for (name, rows), colour, marker in zip(series.items(), cycle(plt.colormaps["tab10"].colors), cycle("osD^vPX")):
            points = [(row["bits"], row[measure]) for row in rows]
            axis.plot(*zip(*points), color=colour, marker=marker, linewidth=1.2, label=name)
        axis.set_xlabel("bits a weight of experts, scales and zeros included")
        axis.grid(True, which="both", color="#dddddd", linewidth=0.7)
    axes[0].axhline(data["rows"][0]["perplexity"], color=FLOOR, linestyle="--", linewidth=1.2, label="exact")
    axes[0].set_ylabel("perplexity")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("divergence from the exact model, nats a token")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title(data["model"], data["machine"]))
    return saved(figure, path, plt)


def saved(figure: Any, path: Path, plt: Any, dpi: int = 130) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path


MARKERS = "os^DvPX*<>ph"


def arm_styles(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A style of its own for each arm: lines of those whose border moves are solid, of those that take prompts in the
    order they come dotted.
    """
    colours = [colour for colour, _ in STYLES.values()]

    def dashes(arm: str) -> str:
        return "-" if arm in MOVING else ":" if phases_bench.ARRIVAL in arm else "--"

    return {
        arm: {
            "color": colours[(i + i // len(MARKERS)) % len(colours)],  # by twelves, for the markers are that many
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": dashes(arm),
        }
        for i, arm in enumerate(arms)
    }


def phases(result: phases_bench.Result, path: Path) -> Path:
    """The share of requests that kept both targets, over the rate, of every arm. Raises ValueError without rows."""
    plt = pyplot()
    if not result.rows:
        raise ValueError("There is no rate in this result to draw.")
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharex=True, sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("tight", "loose")):
        for arm, style in arm_styles(result.arms).items():
            points = sorted((row.rate, 100 * getattr(row, kind)) for row in result.rows if row.arm == arm)
            if points:
                axis.plot(*zip(*points), **style, label=arm)
        axis.axhline(90, color=FLOOR, linewidth=0.8)
        axis.set(xlabel="requests a second", ylabel="% of requests within both targets", title=f"{kind} targets")
        axis.grid(True, color="#dddddd", linewidth=0.7)
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title(result.model, result.machine))
    return saved(figure, path, plt, dpi=100)


def kv(result: kv_bench.Result, path: Path) -> Path:
    """What a cache of every format takes for a context, and how long a decode step lasts, over the tokens of all
    contexts. Raises ValueError where nothing was measured.
    """
    plt = pyplot()
    rows = [row for row in result.rows if row.steps]
    if not rows:
        raise ValueError("There is no decode in this result to draw.")
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    largest = max(row.batch * row.context for row in result.rows)
    for (name, own), (colour, marker) in zip(result.formats.items(), cycle([*STYLES.values(), ("#000000", "x")])):
        label = f"{name}, {own['bits']:.2f} bits"
        sizes = [(own["bytes_per_room"] + tokens * own["bytes_per_token"]) / 2**30 for tokens in (0, largest)]
        memory.plot([0, largest], sizes, color=colour, label=label)
        measured = sorted((r.batch * r.context, r.median) for r in rows if r.format == name)
        if measured:
            speed.plot(*zip(*measured), color=colour, marker=marker, label=name)
    memory.set(ylabel="GiB", title="what the cache takes")
    speed.set(ylabel="ms", title="a decode step")
    ticks = sorted({row.batch * row.context for row in result.rows})
    for axis in (memory, speed):
        axis.set(xlabel="tokens in all contexts", xlim=(0, 1.05 * largest), ylim=(0, None))
        axis.set_xticks(ticks, [short(tick) for tick in ticks])
        axis.grid(True, color="#dddddd", linewidth=0.7)
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(title(result.model, result.machine))
    return saved(figure, path, plt, dpi=90)
