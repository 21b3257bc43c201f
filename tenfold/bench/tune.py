"""Tune a GPU for models without the command line's packages: `python -m tenfold.bench.tune --model shape:llama-3-8b`.

Measures the arms of every linear operation, layer of experts and attention, writes the table of choices, and prints
what runs. `tenfold tune` does the same for one model. `--stages FILE` also times the flat GEMM with no buffering,
double buffering and more.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tenfold.bench.engines import engine_config
from tenfold.bench.hardware import machine
from tenfold.engine import tune_steps
from tenfold.engine.linears import traced
from tenfold.engine.memory import DTYPES
from tenfold.engine.phases.table import splits_of
from tenfold.ops.choose import Table
from tenfold.ops.gemm import flat
from tenfold.ops.gpu import arms, green, report, tune, tune_attention, tune_experts
from tenfold.ops.gpu.attending import Attending, readings
from tenfold.ops.gpu.expert_arms import ExpertArms
from tenfold.ops.gpu.timing import GpuTimer
from tenfold.serve.cli.choices import lane_loads
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

PARTS = ("linear", "experts", "attention", "steps")  # steps: what was fastest alone, tried in whole steps of decodes
PAGE = 16  # tokens of a page, as engines have them


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.tune", description=__doc__)
    parser.add_argument("--model", required=True, help="a comma between two models")
    parser.add_argument("--out", help="file of the table; without it the one that engines on this machine read")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--weights", default="auto", help="as the engine's setting: auto, int4, int8, fp8")
    parser.add_argument("--batches", default=",".join(map(str, arms.BATCHES)))
    parser.add_argument("--families", default="", help=f"of {', '.join(arms.FAMILIES)}; without it all")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, a comma between two")
    parser.add_argument("--longest", type=int, default=32768, help="tokens of the longest context of attention")
    parser.add_argument(
        "--contexts", default=",".join(map(str, tune_steps.CONTEXTS)), help="tokens of each request, for steps"
    )
    parser.add_argument("--border", default="", help="also on the parts of the GPU of schedule=phases with this border")
    parser.add_argument("--force", action="store_true", help="measure again what the table holds")
    parser.add_argument("--stages", help="file for times of the flat GEMM by tiles under way")
    given = parser.parse_args(arguments)
    formats = {"dtype": given.dtype, "weights": given.weights}
    configs = [engine_config(formats, model=model, device="cuda") for model in given.model.split(",")]
    device, dtype = torch.device("cuda"), DTYPES[given.dtype]
    name = torch.cuda.get_device_name(device)
    table = Table(f"gpu {name}", arms.version(), Path(given.out)) if given.out else arms.table(name)
    running = tune.open_arms(device, dtype, table)
    models = [traced(open_checkpoint(resolve(own.model)), dtype, own.weights) for own in configs]
    works = [work for model in models for work in model.works]
    batches = [int(batch) for batch in given.batches.split(",")]
    families = [family for family in given.families.split(",") if family]
    begin = time.monotonic()

    def progress(done: int, total: int, what: str) -> None:
        print(f"{done + 1}/{total}  {time.monotonic() - begin:.0f} s  {what}", file=sys.stderr, flush=True)

    parts = given.parts.split(",")
    layers = [layer for model in models for layer in model.experts]
    attentions = list(dict.fromkeys(layer for model in models for layer in model.attentions))
    reads = readings(attentions, PAGE, dtype, given.longest, tune_attention.KEPT)
    sizes = splits_of(given.border, running.sms) if given.border else ()
    pairs = [green.split(device, size) for size in sizes]
    for lane, own, read in [(None, works, reads), *lane_loads(pairs, works, reads)]:
        sms, timer = lane.sms if lane else running.sms, GpuTimer(device, lane)
        if "linear" in parts:
            tune.tune(own, arms.Arms(device, dtype, sms, table), timer, batches, families, given.force, progress)
        if "experts" in parts:
            tune_experts.tune(layers, ExpertArms(table, sms), timer, device, force=given.force, progress=progress)
        if "attention" in parts:
            tune_attention.tune(read, Attending(device, sms, table), timer, given.force, progress)
    if "steps" in parts:
        wanted = [batch for batch in batches if batch in tune_steps.REQUESTS]
        contexts = [int(context) for context in given.contexts.split(",")]
        for config in configs:
            tune_steps.tune(config, table, wanted, contexts, given.force, progress, [decode for _, decode in pairs])
    rate = report.bandwidth(table, running.sms)
    print(f"{name}, {running.sms} SMs, copy {rate:.0f} GB/s, table {table.path}")
    for shape in report.explain(works, table, running.sms, batches):
        print("\n".join(report.chart(shape)))
    for layer in report.experts(layers, table, running.sms):
        print(f"{layer.choice}{shared(layer)}")
    print("\n".join(map(told, report.attention(reads, table, running.sms))))
    if given.stages:
        rows = stages(works, running, GpuTimer(device), [batch for batch in batches if batch <= flat.MOST_TOKENS])
        Path(given.stages).write_text(json.dumps({"machine": machine("cuda"), "rows": rows}, indent=1))
    return 0


def told(line: report.Read) -> str:
    """One attention in a line."""
    return f"{line.reading.tokens or line.reading.requests} x {line.reading.longest}: {line.choice}{shared(line)}"


def shared(line: report.Timed) -> str:
    return "" if line.share is None else f", {line.share:.0%} of the floor"


def stages(
    works: Sequence[arms.Work], running: arms.Arms, timer: tune.Timer, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Times of the best flat plan of each work and batch with other numbers of stages, beside the library's."""
    rows = []
    for work in tune.distinct(works):
        if work.format != "dense":
            continue
        matrices = tune.weights(work, timer, running.context.device)
        for batch in batches:
            one = replace(work, tokens=batch)
            plan = arms.best_flat(one, running.table, running.sms)
            if plan is None:
                continue
            names = ["cublas", *map(str, flat.ablation(plan, batch, one.rows, one.cols))]
            times = tune.measure(one, matrices, running, timer, names)
            rows.append({"op": str(one.use), "rows": one.rows, "cols": one.cols, "batch": batch, "microseconds": times})
            print(f"{one.use} {one.rows} x {one.cols}, batch {batch}: {times}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
