"""Time the compiled linear operation alone: `python -m tenfold.bench.linear_cpu --formats Q4_1,Q8_0 --batches 1,8,512`.

For each shape of a model, batch size and arm: microseconds (the 5th percentile of passes over more weights than the
caches hold, so that other work on the machine disturbs little; with one thread its CPU time), weight bytes and
multiply-accumulates a second, and the tokens a second that the linears of a model would allow. Under it the read
bandwidth of the machine, the floor at batch 1.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tenfold.ops.blocks import BLOCKS, DENSE, row_bytes
from tenfold.ops.cpu import arms, lib, pack, tune
from tenfold.ops.matrix import Matrix, RawTensor

HALVES = dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)) | {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where the float16 scales of a block stand; (0,) where not named."""
PASSES = 15


@dataclass(frozen=True, slots=True)
class Shape:
    """One linear of a model. count: how often it runs in a step; act: 1 when gated."""

    name: str
    rows: int
    cols: int
    count: int
    norm: bool = False
    act: int = 0


def shapes(layers: int, hidden: int, query: int, kv: int, inner: int, vocabulary: int) -> tuple[Shape, ...]:
    return (
        Shape("qkv", query + 2 * kv, hidden, layers, norm=True),
        Shape("o", hidden, query, layers),
        Shape("gate-up", 2 * inner, hidden, layers, norm=True, act=1),
        Shape("down", hidden, inner, layers),
        Shape("head", vocabulary, hidden, 1, norm=True),
    )


MODELS = {
    "smollm2-135m": shapes(30, 576, 576, 192, 1536, 49152),
    "qwen2.5-0.5b": shapes(24, 896, 896, 128, 4864, 151936),
    "qwen2.5-1.5b": shapes(28, 1536, 1536, 256, 8960, 151936),
    "llama-7b": shapes(32, 4096, 4096, 4096, 11008, 32000),
}


def random_weight(storage: str, rows: int, cols: int) -> RawTensor:
    """Random numbers in a storage; K formats are widened to whole blocks."""
    if storage in DENSE:
        return RawTensor("random", storage, (rows, cols), torch.randn(rows, cols).to(DENSE[storage]))
    block = BLOCKS[storage]
    cols = -(-cols // block.elements) * block.elements
    data = torch.randint(0, 256, (rows, cols // block.elements, block.nbytes), dtype=torch.uint8)
    for at in HALVES.get(storage, (0,)):
        data[:, :, at : at + 2] = (torch.randn(*data.shape[:2], 1) * 0.02).half().view(torch.uint8)
    return RawTensor("random", storage, (rows, cols), data.view(rows, row_bytes(storage, cols)))


def packed(storage: str, shape: Shape) -> Matrix:
    if not shape.act:
        return pack.pack([random_weight(storage, shape.rows, shape.cols)])
    return pack.pack([random_weight(storage, shape.rows // 2, shape.cols) for _ in range(2)])


def seconds(matrices: Sequence[Matrix], batch: int, arm: str, shape: Shape) -> float:
    """5th percentile of the time of one call."""
    calls = min(len(matrices), max(1, 4096 // batch))
    series = tune.Series(matrices[:calls], batch, arm, norm=shape.norm, act=shape.act)
    clock = time.thread_time if lib.status().threads == 1 else time.perf_counter
    return statistics.quantiles([series.time(clock) for _ in range(PASSES)], n=20, method="inclusive")[0]


def read_bandwidth() -> float:
    """Bytes a second of summing memory with one thread: what a step that reads every weight once cannot beat by far."""
    data = torch.ones(64 << 20)
    best = min(_timed(data) for _ in range(5))
    return data.nbytes / best


def _timed(data: torch.Tensor) -> float:
    start = time.thread_time()
    data.sum()
    return time.thread_time() - start


def report(storage: str, model: str, batches: Sequence[int], names: Sequence[str], skip: Sequence[str] = ()) -> None:
    totals: dict[tuple[int, str], float] = {}
    for shape in MODELS[model]:
        if shape.name in skip:
            continue
        matrices = tune.rotation([packed(storage, shape)])
        first = matrices[0]
        for batch in batches:
            for arm in names:
                took = seconds(matrices, batch, arm, shape)
                totals[batch, arm] = totals.get((batch, arm), 0.0) + took * shape.count
                work = batch * first.rows * first.cols / took
                print(
                    f"{storage:5} {shape.name:8} {first.rows:6} x {first.cols:<5} batch {batch:<4} {arm:6} "
                    f"{took * 1e6:10.1f} us {first.nbytes / took / 1e9:7.1f} GB/s {work / 1e9:8.1f} GMAC/s"
                )
    for (batch, arm), total in totals.items():
        print(f"{storage:5} {model}: batch {batch:<4} {arm:6} {total * 1e3:8.2f} ms {batch / total:9.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the compiled linear operation alone.")
    parser.add_argument("--formats", default="Q4_1")
    parser.add_argument("--batches", default="1,8,512")
    parser.add_argument("--arms", default=",".join(arms.ARMS))
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(MODELS))
    parser.add_argument("--skip", default="", help="names of shapes to leave out, e.g. head")
    parser.add_argument("--isa", default="", help="instruction set; the best there is")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    isa, threads = lib.set_isa(options.isa), lib.set_threads(options.threads)
    print(f"{arms.processor()}, {isa}, {threads} threads")
    torch.set_num_threads(1)
    for storage in options.formats.split(","):
        batches = [int(n) for n in options.batches.split(",")]
        report(storage, options.model, batches, options.arms.split(","), options.skip.split(","))
    print(f"reading memory, 1 thread: {read_bandwidth() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
