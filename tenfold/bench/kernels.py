"""Times of single GPU kernels as claims F4 to F6 read them: `python -m tenfold.bench.kernels --out FILE`.

linear: every linear operation of the models, all fast arms and the library's, at several numbers of tokens. packed:
products with packed weights of `--shapes` beside the library's in bfloat16. attention: decode at long context, the
kernel that an engine runs and Triton's. uneven: decodes whose contexts differ in length. prefill: attention of a
prompt, ours and PyTorch's.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.bench.command import again, save
from tenfold.bench.floor import copy_bandwidth
from tenfold.bench.hardware import machine
from tenfold.engine.linears import traced
from tenfold.models.table import model_config
from tenfold.ops.attention import tune as attention
from tenfold.ops.choose import Table
from tenfold.ops.gpu import arms, attending, decode, tune, tune_attention
from tenfold.ops.gpu.timing import GpuTimer
from tenfold.ops.kernels import AttentionSpec, Heads
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

PARTS = ("linear", "attention", "uneven", "prefill")  # unless told otherwise
SHAPES = "3584x3584,10752x3584,18944x3584,3584x18944"  # rows x cols: linear operations of a model of 7B (MBQ, 5.3)
MIXES = ((300,) * 30 + (8400, 8700), (200,) * 7 + (16000,), tuple(range(100, 6500, 100)))  # tokens of contexts
OUT = Path("bench/results/gpu/kernels.json")
FAMILIES = ("stream", "ring", "flat", "gemv", "cublas")
Row = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="file of the result")
    parser.add_argument("--models", default="shape:llama-2-7b,shape:llama-3-8b", help="a comma between two models")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join((*PARTS, 'packed'))}")
    parser.add_argument("--shapes", default=SHAPES, help="of the part packed")
    parser.add_argument("--formats", default="int3g128z,int4g128z", help="of the part packed")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--families", default="stream,ring", help=f"of {', '.join(FAMILIES)}; cublas is always timed")
    parser.add_argument("--context", type=int, default=32768, help="tokens, for decode attention")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens, for prefill attention")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    device = torch.device("cuda")
    parts, batches = given.parts.split(","), [int(b) for b in given.batches.split(",")]
    result: dict[str, Any] = {
        "suite": "kernels",
        "machine": machine("cuda"),
        "command": again(parser, given),
        "copy_gbs": copy_bandwidth("cuda"),
        "rows": [],
    }
    timer = GpuTimer(device)
    for model in given.models.split(","):
        checkpoint = open_checkpoint(resolve(model))
        spec = layer(checkpoint.config)
        if "linear" in parts:
            running = tune.open_arms(device, torch.bfloat16, Table("kernels", "1", given.out.with_suffix(".table")))
            works = traced(checkpoint, torch.bfloat16).works
            result["rows"] += linear(works, running, timer, batches, given.families.split(","))
        if "attention" in parts:
            for batch in (1, 8):
                result["rows"] += decodes(spec, batch, given.context, timer)
        if "uneven" in parts:
            for mix in MIXES:
                result["rows"] += uneven(spec, mix, timer, given.out)
        if "prefill" in parts:
            ours = attention.chunk_candidates(spec, ("lazy", "online", "unified"))
            plans: list[attention.PrefillPlan | attention.ChunkPlan] = [*ours, *attention.prefill_candidates(spec)[:4]]
            for timing in attention.measure_prefill(spec, 1, given.prompt, plans):
                result["rows"].append(row("prefill", spec, 1, timing.name, timing.microseconds, 0, given.prompt))
        save(given.out, result, given.commit)
    if "packed" in parts:
        running = tune.open_arms(device, torch.bfloat16, Table("kernels", "1", given.out.with_suffix(".table")))
        shapes = [(int(rows), int(cols)) for rows, cols in (shape.split("x") for shape in given.shapes.split(","))]
        result["rows"] += packed(shapes, given.formats.split(","), running, timer, batches)
        save(given.out, result, given.commit)
    print(f"wrote {given.out}: {len(result['rows'])} rows, copies at {result['copy_gbs']:.0f} GB/s")
    return 0


def layer(raw: Any) -> AttentionSpec:
    """The attention of a model's layers, without windows."""
    c = model_config(raw)
    return AttentionSpec(c.heads, c.kv_heads, c.head_dim, c.scale, 0, c.attention_softcap, c.rope.rotary_dim)


def row(op: str, spec: AttentionSpec, batch: int, arm: str, microseconds: float, nbytes: int, context: int) -> Row:
    shape = f"{spec.heads}/{spec.kv_heads} heads of {spec.head_dim}"
    return {"op": op, "shape": shape, "batch": batch, "context": context, "arm": arm} | {
        "microseconds": microseconds,
        "bytes": nbytes,
    }


def linear(
    works: Sequence[arms.Work], running: arms.Arms, timer: tune.Timer, batches: Sequence[int], families: Sequence[str]
) -> list[Row]:
    """Every different work at every number of tokens; bytes: of the weight, read once."""
    rows = []
    for work in tune.distinct(works):
        matrices = tune.weights(work, timer, running.context.device)
        for batch in batches:
            one = replace(work, tokens=batch)
            found = [name for name in arms.candidates(one, running.sms) if name.partition(":")[0] in families]
            times = tune.measure(one, matrices, running, timer, list(dict.fromkeys([*found, "cublas"])))
            shape = f"{one.use} {one.rows} x {one.cols}"
            rows += [
                {"op": "linear", "shape": shape, "batch": batch, "arm": arm, "microseconds": took}
                | {"bytes": one.rows * one.cols * one.dtype.itemsize}
                for arm, took in times.items()
            ]
            print(f"{shape}, batch {batch}: {min(times, key=times.__getitem__)} of {len(times)}", flush=True)
    return rows


def packed(
    shapes: Sequence[tuple[int, int]],
    formats: Sequence[str],
    running: arms.Arms,
    timer: tune.Timer,
    batches: Sequence[int],
) -> list[Row]:
    """Every arm of each format, and the library's in bfloat16 under "dense"; bytes: of the weight, read once."""
    rows = []
    for height, cols in shapes:
        for name in ("dense", *formats):
            work = arms.Work(height, cols, name, arms.Use(), 1)
            matrices = tune.weights(work, timer, running.context.device)
            for batch in batches:
                one = replace(work, tokens=batch)
                names = ["cublas"] if name == "dense" else arms.candidates(one, running.sms)
                times = tune.measure(one, matrices, running, timer, names)
                about = {"op": "packed", "shape": f"{height} x {cols}", "format": name, "batch": batch}
                rows += [
                    about | {"arm": arm, "microseconds": took, "bytes": matrices[0].nbytes}
                    for arm, took in times.items()
                ]
                arm = min(times, key=times.__getitem__)
                gbs = matrices[0].nbytes / times[arm] / 1e3
                print(
                    f"{height} x {cols} {name}, batch {batch}: {times[arm]:.1f} us, {gbs:.0f} GB/s, {arm}", flush=True
                )
    return rows


def decodes(spec: AttentionSpec, batch: int, context: int, timer: GpuTimer, page: int = 16) -> list[Row]:
    """One decode step's attention over `batch` contexts: the rule's plan with every softmax, all that are worth trying
    with the usual one, and Triton's best plan.
    """
    device, dtype = timer.device, torch.bfloat16
    sms = timer.sms
    nbytes = 2 * batch * context * spec.kv_heads * spec.head_dim * dtype.itemsize
    copies = timer.copies(nbytes)
    stores = [attention.paged(spec, batch, context, page, dtype, device, seed) for seed in range(copies)]
    qkv = torch.randn(batch, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype=dtype, device=device)
    rope = torch.randn(context, max(2, spec.rotary_dim), device=device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    slots = torch.full((batch,), -1, dtype=torch.int32, device=device)
    workspace = decode.Workspace(device, batch * spec.kv_heads)
    heads = Heads(spec, rope, phi=torch.full((spec.heads,), 2.0, device=device))

    def ours(plan: decode.DecodePlan) -> Any:
        found = decode.share(plan, spec, lengths, sms, {}, 0)
        shared = found and replace(found, fresh=False)  # once a step for all layers

        def call(i: int) -> Tensor:
            keys, values, table = stores[i]
            inputs = (qkv, heads, lengths - 1, slots, keys, values, table, lengths)
            return decode.run(plan, workspace, *inputs, shared=shared)

        return call

    reading = attending.Reading(spec, batch, context, page, dtype)
    own = [plan for plan in attending.own_plans(reading, sms) if attending.legal(attending.name_of(plan), reading, sms)]
    plans = [*(decode.plan(spec, batch, context, sms, softmax) for softmax in decode.SOFTMAX), *own]
    times = timer.measure({str(plan): ours(plan) for plan in plans}, copies)
    others = attention.measure_decode(spec, batch, context, attention.decode_candidates(spec, batch, context, sms)[:6])
    best = {"triton " + t.name: t.microseconds for t in others[:1]}
    return [row("attention", spec, batch, arm, took, nbytes, context) for arm, took in (times | best).items()]


def uneven(spec: AttentionSpec, contexts: Sequence[int], timer: GpuTimer, out: Path) -> list[Row]:
    """Attention of one decode step over contexts of these lengths, by every arm that can do it."""
    running = attending.Attending(timer.device, timer.sms, Table("kernels", "1", out.with_suffix(".table")))
    reading = attending.Reading(spec, len(contexts), max(contexts), 16)
    times = tune_attention.measure(reading, running, timer, contexts=contexts)
    nbytes = 2 * sum(contexts) * spec.kv_heads * spec.head_dim * reading.dtype.itemsize
    best = min(times, key=times.__getitem__)
    print(f"{len(contexts)} contexts of {min(contexts)} to {max(contexts)}: {times[best]:.1f} us, {best}", flush=True)
    return [row("uneven", spec, len(contexts), arm, took, nbytes, max(contexts)) for arm, took in times.items()]


if __name__ == "__main__":
    sys.exit(main())
