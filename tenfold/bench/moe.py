"""Times of a layer's experts on a GPU, in bfloat16 and packed, ours and the libraries': `tenfold bench moe`, or
`python -m tenfold.bench.moe` where the packages of the command line are not installed.

For each shape, number of tokens and format: both products of sorted picks by every plan of ours ("products"), and the
whole operation (route, sort, gather, products, sum) by the fastest of them. Rivals in bfloat16 are PyTorch's grouped
product and a loop of cuBLAS products over the experts, which are given sorted tokens and do no sorting, and in the
loop's case know the counts on the host. Scores are random; `--skew` draws experts as unevenly as Zipf's law of that
exponent. What must be read (experts that have tokens, once) and computed is held against copy bandwidth and the matrix
ceiling, which is twice as high where activations have 8 bits. At the end the fastest products of every format stand
side by side.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.bench.command import again, save
from tenfold.bench.floor import GB, copy_bandwidth, matmul_ceiling
from tenfold.bench.hardware import machine
from tenfold.models.table import model_config
from tenfold.ops.choose import Table
from tenfold.ops.formats import format_of
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint
from tenfold.weights.shapes import MIXED

MODELS = "shape:qwen3-30b-a3b,shape:deepseek-v2-lite,shape:qwen1.5-moe-a2.7b,shape:mixtral-8x7b"
TOKENS = "1,8,64,512,8192"
DENSE = "bfloat16"
# What a format of the measurement is made of, and in what parts.
MIXES: dict[str, dict[str, int]] = {
    "w8a16": {"int8g128": 1},
    "w4a16": {"int4g128": 1},
    "w3a16": {"int3g128": 1},
    "w2a16": {"int2g128z": 1},
    "w8a8": {"fp8a8": 1},
    "w4a8": {"int4g128a8": 1},
    **{f"mixed {bits} bits": parts for bits, parts in MIXED.items()},
}
FORMATS = ",".join((DENSE, *MIXES))
Arm = Callable[[int], Tensor]


def floor(work: Any, ids: Tensor, bits: Sequence[float], copy_gbs: float, tflops: float) -> tuple[float, float]:
    """Microseconds that picks [T, top] cannot but take, to read the experts hit and to compute. bits: of a weight of
    each expert, scales included.
    """
    hit, picks, numbers = ids.unique().tolist(), ids.numel(), 3 * work.cols * work.inner
    weights = sum(numbers * bits[expert] / 8 for expert in hit)
    activations = 2 * (2 * picks * work.cols + 2 * picks * work.inner)
    read = (weights + activations) / (copy_gbs * GB)
    return 1e6 * read, 1e6 * picks * 2 * numbers / (tflops * 1e12)


def work_of(model: str, mix: str) -> Any:
    """The experts of a layer, in the formats of a mix. Raises ValueError for a model without experts, and for an
    unknown mix.
    """
    from tenfold.ops.gpu.expert_arms import DENSE as PLAIN
    from tenfold.ops.gpu.expert_arms import ExpertsWork

    config = model_config(open_checkpoint(resolve(model)).config)
    if config.experts is None:
        raise ValueError(f"{model} has no experts; name a mixture-of-experts model, such as shape:qwen3-30b-a3b.")
    if mix != DENSE and mix not in MIXES:
        raise ValueError(f"There is no format {mix!r} here; allowed: {FORMATS.replace(',', ', ')}.")
    own = config.experts
    count = own.routing.experts
    parts = {PLAIN: 1} if mix == DENSE else MIXES[mix]
    return ExpertsWork(count, own.routing.top, config.hidden_size, own.size, shared_out(parts, count))


def shared_out(parts: Mapping[str, int], count: int) -> tuple[tuple[str, str, int], ...]:
    """How many of so many experts have each format, in whole numbers."""
    ends = [round(count * end / sum(parts.values())) for end in accumulate(parts.values())]
    return tuple((name, name, end - begin) for name, begin, end in zip(parts, [0, *ends], ends) if end > begin)


def bits_of(name: str, work: Any) -> float:
    """Of a weight of an expert, scales included."""
    if name == "dense":
        return 16.0
    sizes = ((2 * work.inner, work.cols), (work.cols, work.inner))
    return 8 * sum(format_of(name).nbytes(*size) for size in sizes) / (3 * work.cols * work.inner)


def measure(work: Any, own: Any, skew: float) -> list[dict[str, Any]]:
    """A row for every arm: name, microseconds, whether it is ours, and whether it is the whole operation."""
    from tenfold.ops.gpu import expert_arms, tune_experts
    from tenfold.ops.gpu.timing import GpuTimer

    device = torch.device("cuda")
    timer = GpuTimer(device)
    running = expert_arms.ExpertArms(Table("none", ""), timer.sms)
    case = tune_experts.make(work, own, running, timer, skew)
    plans = {str(plan): plan for plan in expert_arms.candidates(work)}
    rivals = library_arms(case) if work.dense else {}
    ours = {name: tune_experts.product_arm(case, plan) for name, plan in plans.items()}
    times = timer.measure(ours | rivals, len(case.scores))
    rows = [{"arm": name, "microseconds": t, "ours": name in plans, "whole": False} for name, t in times.items()]
    fastest = sorted((name for name in times if name in plans), key=times.__getitem__)[:2]
    arms = {name: tune_experts.whole_arm(case, plans[name]) for name in fastest}
    whole = timer.measure(arms, len(case.scores), next(iter(arms.values())), tune_experts.FARTHEST_EIGHT_BITS)
    return rows + [{"arm": name, "microseconds": t, "ours": True, "whole": True} for name, t in whole.items()]


def library_arms(case: Any) -> dict[str, Arm]:
    work, (gate_up, down) = case.work, case.own.stacked
    flat = [ids.flatten() for ids, _ in case.routed()]
    sources = [case.x.index_select(0, own.argsort(stable=True) // work.top) for own in flat]
    inner = torch.randn(work.picks, work.inner, device=case.x.device).to(case.x.dtype)
    counts = [torch.bincount(own, minlength=work.count) for own in flat]
    ends = [own.cumsum(0).to(torch.int32) for own in counts]
    parted = [
        [(e, a, b) for e, (a, b) in enumerate(zip((end - count).tolist(), end.tolist())) if b > a]
        for end, count in zip(ends, counts)
    ]

    def grouped_mm(i: int) -> Tensor:
        torch._grouped_mm(sources[i], gate_up.transpose(1, 2), offs=ends[i])
        return torch._grouped_mm(inner, down.transpose(1, 2), offs=ends[i])

    def loop(i: int) -> Tensor:
        for e, a, b in parted[i]:
            F.linear(sources[i][a:b], gate_up[e])
            last = F.linear(inner[a:b], down[e])
        return last

    return (
        {"torch grouped": grouped_mm, "cublas loop": loop} if hasattr(torch, "_grouped_mm") else {"cublas loop": loop}
    )


def line(row: dict[str, Any]) -> str:
    """For people: microseconds, and the share of the larger floor that it reaches."""
    kind = "whole   " if row["whole"] else "products"
    share = 100 * max(row["read"], row["compute"]) / row["microseconds"]
    return (
        f"{row['model'][6:]:18} {row['tokens']:5} {row['format']:12} {kind} {row['arm']:24} "
        f"{row['microseconds']:8.1f} us {share:5.1f} % of the floor "
        f"(read {row['read']:.1f}, compute {row['compute']:.1f})"
    )


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind of row the fastest of ours, and all rivals."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        name = (row["whole"], "" if row["ours"] else row["arm"])
        if name not in kept or row["microseconds"] < kept[name]["microseconds"]:
            kept[name] = row
    return list(kept.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: of every model and number of tokens the fastest products of each format, and how much faster they are
    than the fastest in bfloat16, a library's or ours.
    """
    fastest: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if not row["whole"]:
            own = fastest.setdefault((row["model"], row["tokens"]), {})
            name = row["format"] if row["ours"] else row["arm"]
            own[name] = min(row["microseconds"], own.get(name, inf))
    names = list(dict.fromkeys(name for own in fastest.values() for name in own))
    rivals = {DENSE, *(row["arm"] for row in rows if not row["ours"])}
    lines = ["| experts of | tokens | " + " | ".join(names) + " |", "|---|---" + "|---" * len(names) + "|"]
    for (model, tokens), own in sorted(fastest.items()):
        exact = min((own[name] for name in rivals if name in own), default=None)
        cells = [
            f"{own[name]:.1f} us" + (f" ({exact / own[name]:.2f}x)" if exact and name not in rivals else "")
            if name in own
            else ""
            for name in names
        ]
        lines.append(f"| {model.removeprefix('shape:')} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold bench moe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=MODELS, help="a comma between two")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise ValueError(
            "There is no GPU here, and experts are timed on one; run this where nvidia-smi shows one, or see what few "
            "bits cost in quality with tenfold bench mxmoe, on any machine."
        )
    copy_gbs, tflops = copy_bandwidth("cuda"), matmul_ceiling("cuda")
    result: dict[str, Any] = {
        "suite": "moe",
        "machine": machine("cuda"),
        "command": again(parser, given),
        "copy_gbs": copy_gbs,
        "matmul_tflops": tflops,
        "rows": [],
    }
    for model in given.models.split(","):
        for name in given.formats.split(","):
            rows = of_format(model, name, list(map(int, given.tokens.split(","))), given.skew, copy_gbs, tflops)
            for part in rows:
                result["rows"] += part
                for row in best(part):
                    print(line(row), flush=True)
                if given.out:
                    save(given.out, result, given.commit)
    print(table(result["rows"]))


def of_format(
    model: str, name: str, tokens: Sequence[int], skew: float, copy_gbs: float, tflops: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one format, by numbers of tokens."""
    from tenfold.ops.gpu import tune_experts

    work = work_of(model, name)
    own = tune_experts.random_experts(work, torch.device("cuda"))
    bits = [bits_of(up, work) for up, _ in tune_experts.dealt(work)]
    ceiling = tflops * (2 if all(kind.acts8 for kind in work.kinds) else 1)
    for count in tokens:
        one = replace(work, tokens=count)
        ids = tune_experts.scores_of(one, skew).topk(one.top).indices
        read, compute = floor(one, ids, bits, copy_gbs, ceiling)
        about = {"model": model, "tokens": count, "skew": skew, "format": name, "bits": sum(bits) / len(bits)}
        yield [about | {"read": read, "compute": compute} | row for row in measure(one, own, skew)]


if __name__ == "__main__":
    main()
