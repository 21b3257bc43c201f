"""Tables of README.md and docs/measured.md, generated from recorded claims and raw results between marker comments."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.bench import arms, kv, launches, phases, plots, sentiment, sentiment_serving, single, vlm
from tenfold.bench.case import Figure
from tenfold.bench.claims import Claim, load, number
from tenfold.bench.files import Suites, by_suite, each_in, made_of
from tenfold.bench.hardware import ROOT
from tenfold.bench.kv_quality import subject
from tenfold.bench.kv_tasks import TASKS
from tenfold.bench.single import Result, Row

RESULTS = ROOT / "bench" / "results"
PAGES = ("measured", "gpu", "kv-cache", "mbq", "moe", "schedules", "sentiment")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES))


def table(claims: Sequence[Claim]) -> str:
    """A Markdown table, one claim a row, each with the machine, commit and date it rests on; the machines' full names
    below.
    """
    if not claims:
        return "Not measured yet."
    names = short_names(sorted({c.hardware for c in claims}))
    head = ["id", "what", "measured", "spread", "target", "met", "on", "note"]
    rows = [_cells(head), _cells(["---"] * len(head))]
    for c in claims:
        value = "not measured" if c.value is None else f"**{number(c.value)}** {c.unit}".strip()
        spread = "" if c.spread is None else f"{c.spread[0]:g} to {c.spread[1]:g}"
        met = {True: "yes", False: "no", None: ""}[c.met]
        origin = f"{names[c.hardware]}, {c.commit}, {c.date}"
        rows.append(_cells([c.id, c.what, value, spread, c.target, met, origin, c.note]))
    legend = "; ".join(full if name == full else f"{name}: {full}" for full, name in names.items())
    return "\n".join(rows) + f"\n\nOn: hardware, commit and date. {legend}."


def short_names(machines: Sequence[str]) -> dict[str, str]:
    """What a table calls each machine: "NVIDIA H100 80GB HBM3" is H100, as long as no other would be called so."""
    found = {full: (full.partition(",")[0].split()[1:] or [full])[0] for full in machines}
    return found if len(set(found.values())) == len(found) else {full: full for full in machines}


def details(claims: Sequence[Claim]) -> str:
    """The same table followed by the commands that measure it again."""
    commands: dict[str, list[str]] = {}
    for c in claims:
        commands.setdefault(c.command, []).append(c.id)
    lines = [f"- {', '.join(dict.fromkeys(ids))}: `{command}`" for command, ids in commands.items()]
    return table(claims) + ("\n\nMeasured again by:\n\n" + "\n".join(lines) if lines else "")


def fill(text: str, claims: Sequence[Claim]) -> str:
    """Put the table of ids that start with a PREFIX between `<!-- claims:PREFIX,...[:details] -->` and its end mark."""

    def block(match: re.Match[str]) -> str:
        chosen = [c for c in claims if c.id.startswith(tuple(match["prefix"].split(",")))]
        body = details(chosen) if match["form"] else table(chosen)
        return f"{match['open']}\n{body}\n<!-- /claims -->"

    pattern = r"(?P<open><!-- claims:(?P<prefix>[\w,]*)(?P<form>:details)? -->).*?<!-- /claims -->"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def fill_results(text: str, root: Path = RESULTS) -> str:
    """Put the tables of the raw results in a folder under `root` between `<!-- results:FOLDER -->` and its end mark."""

    def block(match: re.Match[str]) -> str:
        folder = root / match["folder"]
        body = tables(folder).strip() if any(folder.glob("*.json")) else ""
        return f"{match['open']}\n{body or 'Not measured yet.'}\n<!-- /results -->"

    pattern = r"(?P<open><!-- results:(?P<folder>[\w-]+) -->).*?<!-- /results -->"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def write(documents: Sequence[Path] = DOCUMENTS) -> list[Path]:
    """Renew the tables in place; returns the documents that changed."""
    claims = load()
    changed = []
    for document in documents:
        text = document.read_text()
        filled = fill_results(fill(text, claims))
        if filled != text:
            document.write_text(filled)
            changed.append(document)
    return changed


# Tables of raw results


def grid_table(results: Sequence[Result]) -> str:
    """TPOT and prefill of every engine, a point a row. results: of one model; of several rows of one engine at a point
    the first counts.
    """
    engines = list(dict.fromkeys(row.engine for result in results for row in result.rows))
    points = sorted({(row.context, row.batch) for result in results for row in result.rows})
    head = [
        "context",
        "batch",
        "floor",
        *(f"{name} TPOT" for name in engines),
        *(f"{name} prefill" for name in engines),
    ]
    lines = [_cells(head), _cells(["---"] * len(head))]
    for context, batch in points:
        floors = [f for result in results if (f := result.floor(batch, context)) is not None]
        floor = floors[0] if floors else None
        decodes = [_first(results, name, batch, context, True) for name in engines]
        prefills = [_first(results, name, batch, context, False) for name in engines]
        rows = [row for row in decodes if row is not None]
        reach = f"up to {context}" if any(row.lengths for row in rows) else str(context)
        cells = [reach, str(batch), "" if floor is None else f"{floor:.2f}"]
        cells += [_tpot(row, floor) for row in decodes]
        cells += ["" if row is None else f"{row.prefill:.1f}" for row in prefills]
        lines.append(_cells(cells))
    first = results[0]
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    below = [
        f"Milliseconds, medians. {first.model} on {first.machine.get('hardware', '')}, commit "
        f"{first.machine.get('commit', '')}, {first.machine.get('date', '')}; copies run at "
        f"{first.copy_gbs:.0f} GB/s, bf16 matrix products at {first.matmul_tflops:.0f} TFLOP/s there. "
        "In brackets: floor / TPOT.",
        *(note[:1].upper() + note[1:] + "." for note in notes),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(below)


def _first(results: Sequence[Result], engine: str, batch: int, context: int, decode: bool) -> Row | None:
    rows = (result.row(engine, batch, context, decode) for result in results)
    return next((row for row in rows if row is not None), None)


def _tpot(row: Row | None, floor: float | None) -> str:
    if row is None or row.tpot is None:
        return ""
    return f"{row.tpot:.2f}" + (f" ({100 * floor / row.tpot:.0f} %)" if floor else "")


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def arms_table(result: arms.Result) -> str:
    """Every case off and on, and what was left out."""
    head = ["arm", "off", "on", "batch", "context", "off ms", "on ms", "gain", "spread"]
    lines = [_cells(head), _cells(["---"] * len(head))]
    for row in result.rows:
        off, on = (Figure(tuple(samples)).median for samples in (row.off_ms, row.on_ms))
        low, high = row.gain.spread
        settings = [", ".join(f"{k}={v}" for k, v in given.items()) or "default" for given in (row.off, row.on)]
        numbers = [str(row.batch), str(row.context), f"{off:.3f}", f"{on:.3f}", f"{row.gain.median:.2f}x"]
        lines.append(_cells([f"{row.group}: {row.title}", *settings, *numbers, f"{low:.2f} to {high:.2f}"]))
    machine = result.machine
    lines += ["", f"TPOT, medians of interleaved rounds. {result.model} on {machine.get('hardware', '')}, commit "]
    lines[-1] += f"{machine.get('commit', '')}, {machine.get('date', '')}."
    lines += [f"{note[:1].upper()}{note[1:]}." for note in result.notes]
    lines += [f"Not measured: {name}, {why}." for name, why in result.skipped]
    return "\n".join(lines)


def launches_table(result: launches.Result) -> str:
    """Launches and MiB of a block and of a step, a point a row; then the operations of a block at the first point."""
    head = ["batch", "context", "launches a block", "beside blocks", "a step", "MiB a block", "weights", "KV", "rest"]
    lines = [_cells(head), _cells(["---"] * len(head))]
    for row in result.rows:
        parts = [[m.weights, m.kv, m.activations] for m in row.moved[:-1]]
        sums = [sum(column) / launches.MIB for column in zip(*parts)]
        cells = [str(row.batch), str(row.context), str(row.per_block), str(sum(row.rest.values()))]
        cells += [str(row.per_step(result.layers)), *(f"{n:.1f}" for n in (sum(sums), *sums))]
        lines.append(_cells(cells))
    first, machine = result.rows[0], result.machine
    lines += ["", f"A block launches {launches.named(first.block)}; beside the blocks {launches.named(first.rest)}."]
    lines += ["", _cells(["operation", "weights MiB", "KV MiB", "activations KiB"]), _cells(["---"] * 4)]
    for m in first.moved:
        numbers = [f"{m.weights / launches.MIB:.2f}", f"{m.kv / launches.MIB:.2f}", f"{m.activations / 1024:.1f}"]
        lines.append(_cells([m.op, *numbers]))
    lines += ["", f"Operations at batch {first.batch}, the head last. {result.model}, {result.kernels} on "]
    lines[-1] += f"{machine.get('hardware', '')}, commit {machine.get('commit', '')}, {machine.get('date', '')}."
    return "\n".join(lines)


def kv_table(result: kv.Result) -> str:
    """What every format takes, then every format at every point."""
    lines = [_cells(["format", "stored as", "bits a number", "bytes a token", "exact a sequence", "longest context"])]
    lines.append(_cells(["---"] * 6))
    for name, own in result.formats.items():
        room = f"{own['bytes_per_room'] / 2**20:.1f} MiB" if own["bytes_per_room"] else ""
        lines.append(
            _cells([name, own["spec"], f"{own['bits']:.2f}", str(own["bytes_per_token"]), room, str(own["tokens"])])
        )
    head = [
        "sequences",
        "context",
        "format",
        "ms a step",
        "against dense",
        "attention of a layer",
        "against dense",
        "of a copy",
    ]
    lines += ["", _cells(head), _cells(["---"] * len(head))]
    for row in result.rows:
        gains = [f"{gain:.2f}x" if gain else "" for gain in (result.gain(row), result.layer_gain(row))]
        timed = f"{row.layer_us:.1f} us" if row.layer_us else ""
        share = f"{row.layer_read / row.layer_us / 10 / result.copy_gbs:.0f} %" if row.layer_us else ""
        step = f"{row.median:.2f}" if row.steps else "does not fit"
        lines.append(_cells([str(row.batch), str(row.context), row.format, step, gains[0], timed, gains[1], share]))
    machine = result.machine
    lines += ["", f"{result.model} on {machine.get('hardware', '')}, commit {machine.get('commit', '')}, "]
    lines[-1] += f"{machine.get('date', '')}; formats in turn, medians; contexts are filled, not computed."
    return "\n".join(lines)


def kv_quality_table(data: Mapping[str, Any]) -> str:
    """Perplexity, KL divergence, recall and tasks of every format."""
    tasks = {name: TASKS[name] for name in TASKS if name in data["rows"][0]}
    head = ["format", "bits", "bits here", "perplexity", "change", "KL", "codes found"]
    head += [title for title, _ in tasks.values()]
    lines = [_cells(head), _cells(["---"] * len(head))]
    base = data["rows"][0]["perplexity"]
    for r in data["rows"]:
        numbers = [
            f"{r['bits']:.2f}",
            f"{r['bits_here']:.2f}",
            f"{r['perplexity']:.2f}",
            f"{r['perplexity'] / base - 1:+.1%}",
            f"{r['kl']:.4f}",
            f"{r['found']} of {r['asked']}",
        ]
        lines.append(_cells([r["format"], *numbers, *(format(r[name], form) for name, (_, form) in tasks.items())]))
    machine = data["machine"]
    sizes = f"{data['windows']} windows of {data['length']} tokens, the first {data['unjudged']} of each not judged"
    items = "".join(f", {count} items of {name}" for name, count in data.get("items", {}).items())
    commit = f"commit {machine.get('commit', '')}, {machine.get('date', '')}"
    lines += ["", f"{sizes}{items}; {commit}. `{data['command']}`"]
    return "\n".join(lines)


def phases_table(result: phases.Result) -> str:
    """Every arm at every rate."""
    head = ["requests/s", "schedule", "tight", "loose", "TTFT p90", "TTFT p99", "TPOT p90", "ITL p99"]
    head += ["ITL p99 beside long prompts"] * bool(result.long) + ["latency", "tokens/s"]
    lines = [_cells(head), _cells(["---"] * len(head))]
    for row in sorted(result.rows, key=lambda row: (row.rate, result.arms.index(row.arm))):
        times = [f"{value:.0f} ms" for value in (row.ttft["p90"], row.ttft["p99"])]
        times += [f"{value:.1f} ms" for value in (row.tpot["p90"], row.itl["p99"])]
        times += [f"{row.beside['p99']:.1f} ms" if row.beside else ""] * bool(result.long)
        shares = [f"{row.tight:.0%}", f"{row.loose:.0%}"]
        speed = f"{row.tokens / row.seconds:.0f}"
        lines.append(_cells([f"{row.rate:g}", row.arm, *shares, *times, f"{row.latency:.2f} s", speed]))
    machine = result.machine
    mix = f", {result.long:.0%} prompts of {result.long_tokens} tokens" if result.long else ""
    alone = f"alone {result.alone['ttft']:.1f} ms and {result.alone['tpot']:.2f} ms a token"
    lines += [
        "",
        f"tight: within {phases.TIGHT:g} times what requests take {alone}, loose: {phases.LOOSE:g} times{mix}. ",
    ]
    lines[-1] += f"{result.stairs}. " if result.stairs else ""
    lines[-1] += f"{result.model} on {machine.get('hardware', '')}, commit {machine.get('commit', '')}, "
    lines[-1] += f"{machine.get('date', '')}. `{result.command}`"
    return "\n".join(lines)


def mxmoe_table(data: Mapping[str, Any]) -> str:
    """Perplexity of exact, uniform and mixed experts, and divergence from the exact model in nats a token."""
    exact = data["rows"][0]["perplexity"]
    lines = [_cells(["experts", "bits", "perplexity", "change", "divergence"]), _cells(["---"] * 5)]
    for r in data["rows"]:
        change = f"{r['perplexity'] / exact - 1:+.1%}"
        cells = [r["kind"], f"{r['bits']:.3f}", f"{r['perplexity']:.3f}", change, f"{r['divergence']:.4f}"]
        lines.append(_cells(cells))
    machine, (measured, judged) = data["machine"], data["texts"]
    told = f"measured on {measured}, judged on {judged}; commit {machine.get('commit', '')}, {machine.get('date', '')}"
    return "\n".join([*lines, "", f"{told}. `{data['command']}`"])


def sentiment_table(data: Mapping[str, Any]) -> str:
    """Of each set, every variant: mean and standard deviation over seeds."""
    parts = []
    for name, told in data["sets"].items():
        lines = [_cells(["variant", "parameters", "accuracy", "F1 weighted", "F1 macro", "calibration error", "Brier"])]
        lines.append(_cells(["---"] * 7))
        for variant, rows in sentiment.by_variant(data["rows"], name).items():
            cells = [variant, f"{rows[0]['parameters']:,}"]
            for score in ("accuracy", "f1_weighted", "f1_macro", "ece", "brier"):
                mean, off = sentiment.spread([row["scores"][score] for row in rows])
                cells.append(f"{mean:.4f} ± {off:.4f}")
            lines.append(_cells(cells))
        posts = ", ".join(f"{sum(count.values())} {split}" for split, count in told["counts"].items())
        parts.append("\n".join([f"{name} ({posts}):", "", *lines]))
    machine = data["machine"]
    told = f"{machine.get('hardware', '')}, commit {machine.get('commit', '')}, {machine.get('date', '')}"
    return "\n\n".join([*parts, f"{told}. `{data['command']}`"])


def sentiment_serving_table(data: Mapping[str, Any]) -> str:
    lines = [_cells(["engine", "posts at once", "posts/s", "p50", "p99"]), _cells(["---"] * 5)]
    for row in (sentiment_serving.Row(**row) for row in data["rows"]):
        engine = row.engine + (" beside generation" if row.beside else "")
        lines.append(_cells([engine, str(row.batch), f"{row.rate:.1f}", f"{row.p50:.2f} ms", f"{row.p99:.2f} ms"]))
    machine = data["machine"]
    told = f"{machine.get('hardware', '')}, commit {machine.get('commit', '')}, {machine.get('date', '')}"
    return "\n".join([*lines, "", f"{told}. `{data['command']}`"])


def lines_table(data: Mapping[str, Any]) -> str:
    """A result that comes with its lines, as a block of text."""
    return "\n".join([f"{data['model']} on {data['machine'].get('hardware', '')}:", "", "```", *data["lines"], "```"])


def by_model(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of one model together, whatever changes of the shape they needed; those with weights of fewer bits are a
    model of their own.
    """
    found: dict[str, list[Result]] = {}
    for result in results:
        name = result.model.partition("@")[0] + (result.weights and f" {result.weights}")
        found.setdefault(name, []).append(result)
    return found


def tables(folder: Path) -> str:
    """Markdown of every result in a folder. Raises ValueError for one without results, and for a file that is not
    complete.
    """
    return made_of(folder, tables_of)


def write_tables(folder: Path) -> Path:
    """`tables.md` of the raw results in a folder, beside them. Raises ValueError as `tables`."""
    text = tables(folder)
    path = folder / "tables.md"
    path.write_text(text, encoding="utf-8")
    return path


def tables_of(found: Suites) -> str:
    """Markdown of results by suite."""
    parts = []
    for model, results in by_model([single.loaded(data) for data in found.get("single", ())]).items():
        if measured := [result for result in results if result.rows]:
            parts.append(f"### {model}\n\n{grid_table(measured)}")
    parts += [f"### Arms, {data['model']}\n\n{arms_table(arms.loaded(data))}" for data in found.get("arms", ())]
    for result in map(launches.loaded, found.get("launches", ())):
        parts += [f"### Launches and bytes, {result.model.partition('@')[0]}\n\n{launches_table(result)}"]
    parts += [f"### KV formats, {result.name}\n\n{kv_table(result)}" for result in map(kv.loaded, found.get("kv", ()))]
    parts += [
        f"### Quality of KV formats, {subject(data)}\n\n{kv_quality_table(data)}"
        for data in found.get("kv-quality", ())
    ]
    parts += [f"### Bits of experts, {data['model']}\n\n{mxmoe_table(data)}" for data in found.get("mxmoe", ())]
    parts += [f"### Sentiment, parts and sets\n\n{sentiment_table(data)}" for data in found.get("sentiment", ())]
    parts += [
        f"### Sentiment served, {data['size']}\n\n{sentiment_serving_table(data)}"
        for data in found.get("sentiment-serving", ())
    ]
    parts += [f"### Bits of a model that sees, {data['model']}\n\n{vlm.table(data)}" for data in found.get("vlm", ())]
    for served in map(phases.loaded, found.get("phases", ())):
        parts += [f"### Schedules, {served.model.partition('@')[0]}\n\n{phases_table(served)}"]
    for suite in ("throughput", "serving", "soak", "quality"):
        parts += [f"### {suite.capitalize()}\n\n{lines_table(data)}" for data in found.get(suite, ())]
    return "\n\n".join(parts) + "\n"


def charts(folder: Path) -> list[Path]:
    """PNG files beside the results. Raises NoCharts where matplotlib is not installed, and ValueError for a file that
    is no JSON.
    """
    each = each_in(folder)
    found = by_suite(data for _, data in each)
    made = []
    for model, results in by_model([single.loaded(data) for data in found.get("single", ())]).items():
        if any(row.tpot is not None for result in results for row in result.rows):
            name = model.removeprefix("shape:").replace("/", "-").replace(" ", "-")
            made.append(plots.tpot(results, folder / f"tpot-context-{name}.png"))
            made.append(plots.tpot(results, folder / f"tpot-batch-{name}.png", over="batch"))
    for path, data in each:
        name = path.stem
        if data["suite"] == "kv" and any(row["steps"] for row in data["rows"]):
            made.append(plots.kv(kv.loaded(data), folder / f"{name}.png"))
        if data["suite"] == "phases" and data["rows"]:
            made.append(plots.phases(phases.loaded(data), folder / f"attainment-{name}.png"))
        if data["suite"] == "arms" and data["rows"]:
            made.append(plots.arms(arms.loaded(data), folder / f"{name}.png"))
        if data["suite"] == "throughput" and data["seconds"]:
            made.append(plots.throughput(data, folder / f"{name}.png"))
        if data["suite"] == "serving":
            made.append(plots.serving(data, folder / f"{name}.png"))
    for data in found.get("mxmoe", ()):
        made.append(plots.mxmoe(data, folder / f"bits-{data['model']}.png"))
    return made
