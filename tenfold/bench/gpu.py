"""All GPU measurements in one command: `python -m tenfold.bench.gpu --out FOLDER --models A,B --parts single,hf,vllm`.

Each part runs in a process of its own with a time limit, so that neither a fault of the device nor a peer that hangs
takes the others along; a part writes its JSON after every point, so what was measured before its end is kept. A table
of everything comes last. Only what the engine itself imports is needed here.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.bench import arms, launches, load, single, throughput
from tenfold.bench.command import again, portable, save, settings
from tenfold.bench.files import each_in
from tenfold.bench.fit import Point, points_of
from tenfold.bench.hardware import machine
from tenfold.bench.lengths import parse
from tenfold.bench.throughput import Work

GRACE = 30.0  # seconds before its limit at which a part begins no more points


@dataclass(frozen=True, slots=True)
class Job:
    """One part for one model, as its process is told. seconds: until it is ended."""

    part: str
    model: str
    out: str
    seconds: float
    options: dict[str, Any]

    @property
    def path(self) -> Path:
        """Results with settings, or of some groups of arms, lie beside those without."""
        own = (f"{name}-{portable(str(value))}" for name, value in self.options["set"].items())
        parts = [self.part, portable(self.model).removeprefix("shape:"), *own]
        parts += self.options["groups"] if self.part == "arms" else []
        return Path(self.out) / f"{re.sub('[/@,=]', '-', '-'.join(parts))}.json"

    def numbers(self, name: str) -> list[int]:
        return [int(n) for n in str(self.options[name]).split(",") if n]


def grid_of(job: Job, prefill: bool = True) -> tuple[Point, ...]:
    prefills = job.numbers("prefill") if prefill else []
    tokens = job.options["tokens"]
    points = single.grid(job.numbers("batch"), job.numbers("context"), prefills, tokens)
    return (*points, *points_of(job.options["points"], tokens))


def measured(job: Job, engines: Sequence[str], points: Sequence[Point]) -> None:
    """`single.run` with its result written after every point."""

    def keep(result: single.Result) -> None:
        save(job.path, result.plain(), job.options["commit"])

    plan = single.Plan(
        job.model,
        tuple(engines),
        tuple(points),
        job.options["rounds"],
        job.options["device"],
        tuning={"tenfold": job.options["set"]},
        peer_path=job.options["peer_path"],
        deadline=deadline(job),
        patience=job.options["patience"],
    )
    keep(single.run(plan, say, keep, job.options["command"]))


def deadline(job: Job) -> float:
    """When a part begins no more points."""
    return time.monotonic() + max(5.0, job.seconds - GRACE)


def say(text: str) -> None:
    print(text, flush=True)


def ours(job: Job) -> None:
    """Tenfold alone, over the whole grid."""
    measured(job, ["tenfold"], grid_of(job))


def against(peer: str) -> Callable[[Job], None]:
    """Tenfold and a peer in turn; a peer that takes the whole GPU alone, for `single` has ours."""

    def part(job: Job) -> None:
        alone = peer in single.ALONE
        points = grid_of(job, prefill=alone)
        if peer == "hf-compiled":
            points = tuple(p for p in points if p.context == single.COMPILED_CONTEXT)
        if points:
            measured(job, [peer] if alone else ["tenfold", peer], points)

    return part


def ablations(job: Job) -> None:
    """Every arm off and on."""
    options = job.options

    def keep(result: arms.Result) -> None:
        result.command = options["command"]
        save(job.path, result.plain(), job.options["commit"])

    found = arms.run(
        job.model,
        options["device"],
        options["rounds"],
        options["tokens"],
        cases=arms.cases_of(options["groups"]),
        common=options["set"],
        deadline=deadline(job),
        say=say,
        done=keep,
    )
    keep(found)


def offline(engine: str) -> Callable[[Job], None]:
    """Throughput of one engine, which has the GPU for itself."""

    def part(job: Job) -> None:
        options = job.options
        work = Work(options["requests"], parse(options["prompts"]), parse(options["answers"]))
        found = throughput.run(
            job.model,
            [engine],
            work,
            options["rounds"],
            options["device"],
            options["max_batch"],
            tuning={"tenfold": options["set"]},
            peer_path=options["peer_path"],
            say=say,
        )
        save(job.path, found.plain() | {"command": options["command"]}, options["commit"])

    return part


def under_load(*peers: str) -> Callable[[Job], None]:
    """Random arrivals at an engine in this process, and at peers in turn with it. Needs the packages of the server's
    engine loop.
    """

    def part(job: Job) -> None:
        options = job.options
        work = Work(options["requests"], parse(options["prompts"]), parse(options["answers"]))
        rates = [float(rate) for rate in options["rates"].split(",")]
        given, promised = (job.model, options["device"], options["set"], work, rates), load.Objective()
        runs = load.in_process(*given, promised, say, peers, options["peer_path"])
        data = load.plain(runs, machine(options["device"]), job.model, work, promised)
        save(job.path, data | {"command": options["command"]}, options["commit"])

    return part


def tuned(job: Job) -> None:
    """The table of choices that the engines of later parts go by; what it holds is not measured again."""
    from tenfold.bench import tune  # Triton is there on GPU machines only

    own = job.options["set"]
    formats = [word for name in ("dtype", "weights") if name in own for word in (f"--{name}", own[name])]
    tune.main(["--model", job.model, *formats])


def counted(job: Job) -> None:
    """Launches and bytes of a step."""
    found = launches.measure(
        *(job.model, job.options["device"], job.numbers("batch"), [1024], job.options["set"], say),
        command=job.options["command"],
    )
    save(job.path, found.plain(), job.options["commit"])


PARTS: dict[str, Callable[[Job], None]] = {
    "tune": tuned,
    "launches": counted,
    "single": ours,
    "hf": against("hf-generate"),
    "hf-compiled": against("hf-compiled"),
    "vllm": against("vllm"),
    "arms": ablations,
    "throughput": offline("tenfold"),
    "throughput-vllm": offline("vllm"),
    "serving": under_load(),
    "serving-vllm": under_load("vllm"),
}


def run_part(job: Job) -> str:
    """Run a part in a process of its own; how it ended, "" where all went well."""
    command = [sys.executable, "-m", "tenfold.bench.gpu", "--job", json.dumps([getattr(job, s) for s in Job.__slots__])]
    begin = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(job.seconds)
        found = "" if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        found = f"stopped after {job.seconds:.0f} s"
    finally:
        end(process)
    say(f"-- {job.part} {job.model}: {time.monotonic() - begin:.0f} s {found}")
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and the workers it started: they are a process group of their own."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def table(folder: Path) -> str:
    """Every result in a folder, a line for each engine and point."""
    lines = []
    for path, data in each_in(folder):
        if data.get("suite") == "single":
            result = single.loaded(data)
            head = f"== {path.stem}: copy {result.copy_gbs:.0f} GB/s, matmul {result.matmul_tflops:.0f} TFLOP/s"
            lines += [head, *(single.line(row, result) for row in result.rows)]
            lines += [f"{s.batch} x {s.context:<6} {s.engine:12} skipped, {s.why[:240]}" for s in result.skipped]
            lines += result.notes
        elif "lines" in data:
            lines += [f"== {path.stem}", *data["lines"]]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.gpu", description=__doc__)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench/results/gpu", help="folder for the JSON files")
    parser.add_argument("--models", default="shape:llama-2-7b,shape:llama-3-8b", help="a comma between two models")
    parser.add_argument("--parts", default="single", help=f"of {', '.join(PARTS)}; NAME:SECONDS sets a limit")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a part that names none")
    parser.add_argument("--total", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--context", default="128,1024,8192,32768")
    parser.add_argument("--prefill", default="1024,8192,32768")
    parser.add_argument("--points", default="", help="further decodes outside the grid, as 32x512,2x8192+30x256")
    parser.add_argument("--tokens", type=int, default=single.TOKENS, help="of a long run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds of a point before its last round")
    parser.add_argument("--requests", type=int, default=256, help="of the throughput parts")
    parser.add_argument("--prompts", default="128-1024", help="their lengths: N, A-B or lognormal:MEDIAN:SIGMA")
    parser.add_argument("--answers", default="64-512")
    parser.add_argument("--groups", default="", help=f"of {', '.join(arms.GROUPS)}: which arms; all unless told")
    parser.add_argument("--rates", default="2,4,8,16", help="requests a second of the serving part")
    parser.add_argument("--max-batch", type=int, default=256, help="requests computed together in those parts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig")
    parser.add_argument("--peer-path", default="", help="folder with the packages of vLLM, for its process alone")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.job:
        job = Job(*json.loads(given.job))
        PARTS[job.part](job)
        return 0
    return run_all(given, again(parser, given))


def run_all(given: argparse.Namespace, command: str) -> int:
    """Every part for every model; the number of parts that did not end well. command: that would do it again."""
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    options = {k: v for k, v in vars(given).items() if k not in ("job", "out", "models", "parts", "limit", "total")}
    options["set"] = settings(given.set)
    options["command"] = command
    options["groups"] = [group for group in given.groups.split(",") if group]
    arms.cases_of(options["groups"])  # fails at once
    end_at, failed = time.monotonic() + given.total, 0
    for name, seconds in parts_of(given.parts, given.limit):
        for model in filter(None, given.models.split(",")):
            left = end_at - time.monotonic()
            if left < GRACE:
                say(f"-- {name} {model}: not begun, the time is up")
                failed += 1
                continue
            failed += bool(run_part(Job(name, model, str(folder), min(seconds, left), options)))
    say(table(folder))
    return failed


def parts_of(text: str, limit: float) -> list[tuple[str, float]]:
    """Names and seconds. Raises ValueError for an unknown part."""
    found = []
    for entry in filter(None, text.split(",")):
        name, _, seconds = entry.partition(":")
        if name not in PARTS:
            raise ValueError(f"There is no part {name!r}; allowed: {', '.join(PARTS)}.")
        found.append((name, float(seconds) if seconds else limit))
    return found


if __name__ == "__main__":
    sys.exit(main())
