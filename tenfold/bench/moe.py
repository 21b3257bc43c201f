"""Times of a layer's experts on a GPU, in bfloat16 and packed, ours and the libraries': `python -m tenfold.bench.moe`.

For each shape, number of tokens and format: both products of sorted picks by every plan of ours ("products"), and the
whole operation (route, sort, gather, products, sum) by the fastest of them. Rivals in bfloat16 are PyTorch's grouped
product and a loop of cuBLAS products over the experts, which are given sorted tokens and do no sorting, and in the
loop's case know the counts on the host. Scores are random; `--skew` draws experts as unevenly as Zipf's law of that
exponent. What must be read (experts that have tokens, once) and computed is held against copy bandwidth and the matrix
ceiling, which is twice as high where activations have 8 bits.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.bench.command import save
from tenfold.bench.floor import GB, copy_bandwidth, matmul_ceiling
from tenfold.bench.hardware import machine
from tenfold.models.table import model_config
from tenfold.ops.formats import format_of, raw_tensor
from tenfold.ops.route import Routing, route
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

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
    "mixed 4 bits": {"int8g128": 1, "int4g128": 4, "int3g128z": 2, "int2g128z": 1},
    "mixed 5 bits": {"fp8a8": 1, "int4g128a8": 3},
}
FORMATS = ",".join((DENSE, *MIXES))
Arm = Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """The routed experts of one layer: features of tokens, and inside an expert."""

    experts: int
    top: int
    hidden: int
    inner: int

    @property
    def numbers(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner

    def floor(self, ids: Tensor, bits: Sequence[float], copy_gbs: float, tflops: float) -> tuple[float, float]:
        """Microseconds that picks [T, top] cannot but take, to read the experts hit and to compute. bits: of a weight
        of each expert, scales included.
        """
        hit, picks = ids.unique().tolist(), ids.numel()
        weights = sum(self.numbers * bits[expert] / 8 for expert in hit)
        activations = 2 * (2 * picks * self.hidden + 2 * picks * self.inner)
        read = (weights + activations) / (copy_gbs * GB)
        return 1e6 * read, 1e6 * picks * 2 * self.numbers / (tflops * 1e12)


def layer_of(model: str) -> Layer:
    """Raises ValueError for a model without experts."""
    config = model_config(open_checkpoint(resolve(model)).config)
    if config.experts is None:
        raise ValueError(f"{model} has no experts; name a mixture-of-experts model, such as shape:qwen3-30b-a3b.")
    own = config.experts
    return Layer(own.routing.experts, own.routing.top, config.hidden_size, own.size)


def scores_of(layer: Layer, tokens: int, skew: float, seed: int = 0) -> Tensor:
    """A router's scores [tokens, experts], whose best are draws without replacement; skew: exponent of Zipf's law over
    experts, 0 for none.
    """
    draw = torch.Generator().manual_seed(seed)
    chance = torch.arange(1, layer.experts + 1, dtype=torch.float64) ** -skew
    chance = chance[torch.randperm(layer.experts, generator=draw)]
    noise = torch.rand(tokens, layer.experts, dtype=torch.float64, generator=draw)
    return (chance.log() - (-noise.log()).log()).float()  # Gumbel's trick


def formats_of(mix: str, experts: int, seed: int = 0) -> list[str]:
    """The format of each expert, in the parts of MIXES, dealt out at random. Raises ValueError for an unknown mix."""
    if mix not in MIXES:
        raise ValueError(f"There is no format {mix!r} here; allowed: {FORMATS.replace(',', ', ')}.")
    parts = [name for name, count in MIXES[mix].items() for _ in range(count)]
    dealt = [parts[i * len(parts) // experts] for i in range(experts)]
    random.Random(seed).shuffle(dealt)
    return dealt


def bits_of(name: str, layer: Layer) -> float:
    """Of a weight of an expert, scales included."""
    if name == DENSE:
        return 16.0
    sizes = ((2 * layer.inner, layer.hidden), (layer.hidden, layer.inner))
    return 8 * sum(format_of(name).nbytes(*size) for size in sizes) / layer.numbers


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Experts of one layer and picks for several calls, each with other experts where few are hit, so that a call finds
    its weights as cold as in a real step. own: dense [experts, rows, cols] or tiled gate_up and down.
    """

    layer: Layer
    x: Tensor
    scores: list[Tensor]
    routing: Routing
    own: tuple[Any, Any]

    @property
    def picks(self) -> int:
        return len(self.x) * self.layer.top

    def routed(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and weights of each call."""
        return [route(scores, self.routing) for scores in self.scores]


def normal(spread: float, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, spread, generator=generator)


def dense_experts(layer: Layer) -> tuple[Tensor, Tensor]:
    sizes = (layer.experts, 2 * layer.inner, layer.hidden), (layer.experts, layer.hidden, layer.inner)
    return normal(0.02, 2, *sizes[0]), normal(0.02, 3, *sizes[1])


def packed_experts(layer: Layer, dense: tuple[Tensor, Tensor], names: Sequence[str]) -> tuple[Any, Any]:
    """The same rounded to the format of each expert, in tiles."""
    from tenfold.ops import tiles

    def tiled(w: Tensor, pairs: bool) -> Any:
        parts = []
        for name, each in zip(names, w):
            format = format_of(name)
            parts.append([raw_tensor("w", format, len(each), each.shape[1], format.pack(each))])
        return tiles.bank(parts, pairs, lambda own: own[0].data, w.device, w.dtype)

    return tiled(dense[0], True), tiled(dense[1], False)


def make(layer: Layer, own: tuple[Any, Any], tokens: int, skew: float, copies: int) -> Case:
    scores = [scores_of(layer, tokens, skew, seed).cuda() for seed in range(copies)]
    return Case(
        layer, normal(1.0, 1, tokens, layer.hidden), scores, Routing(layer.experts, layer.top, normed=True), own
    )


def measure(
    layer: Layer, own: tuple[Any, Any], tokens: int, skew: float, bits: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for every arm: name, microseconds, whether it is ours, and whether it is the whole operation."""
    from tenfold.ops.gpu.timing import GpuTimer

    timer = GpuTimer(torch.device("cuda"))
    hit = layer.floor(scores_of(layer, tokens, skew).topk(layer.top).indices, bits, 1.0, 1.0)[0] * GB / 1e6
    case = make(layer, own, tokens, skew, min(16, timer.copies(int(hit))))
    plans = {str(plan): plan for plan in plans_of(case)}
    rivals = library_arms(case) if isinstance(own[0], Tensor) else {}
    times = timer.measure({name: product_arm(case, plan) for name, plan in plans.items()} | rivals, len(case.scores))
    rows = [{"arm": name, "microseconds": t, "ours": name in plans, "whole": False} for name, t in times.items()]
    ours = sorted((name for name in times if name in plans), key=times.__getitem__)[:2]
    arms = {name: whole_arm(case, plans[name]) for name in ours}
    whole = timer.measure(arms, len(case.scores), next(iter(arms.values())), 0.1)
    return rows + [{"arm": name, "microseconds": t, "ours": True, "whole": True} for name, t in whole.items()]


def plans_of(case: Case) -> list[Any]:
    from tenfold.ops.gemm import grouped
    from tenfold.ops.gpu import experts, experts_packed

    layer, (gate_up, down) = case.layer, case.own
    if not isinstance(gate_up, Tensor):
        return list(experts_packed.candidates(case.picks, layer.experts, gate_up.kinds + down.kinds))
    sizes = ((2 * layer.inner, layer.hidden, True), (layer.hidden, layer.inner, False))
    every = experts.candidates(case.picks, layer.experts)
    ours = [plan for plan in every if all(experts.legal(plan, *size) for size in sizes)]
    return [*ours, grouped.plan(case.picks, layer.experts)]


def width_of(plan: Any) -> int:
    """Picks of a tile."""
    width: int = plan.height if str(plan).startswith("grouped") else plan.width
    return width


def products(case: Case, plan: Any, by: Any, shares: Tensor, gathered: Tensor) -> Tensor:
    """What each pick gives, of picks sorted before."""
    from tenfold.ops.gemm import grouped
    from tenfold.ops.gpu import experts, experts_packed

    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    if isinstance(plan, grouped.GroupedPlan):
        return grouped.products(plan, case.x, by, shares, *case.own, "silu")
    if isinstance(plan, experts.ExpertsPlan):
        return experts.products(plan, sms, gathered, by, shares, *case.own, "silu")
    return experts_packed.products(plan, sms, case.x, gathered, by, shares, *case.own, "silu")


def turns_of(case: Case) -> Tensor | None:
    """The order in which experts come."""
    from tenfold.ops.gpu import experts_packed

    return None if isinstance(case.own[0], Tensor) else experts_packed.turns(*case.own)


def product_arm(case: Case, plan: Any) -> Arm:
    """Both products."""
    from tenfold.ops.gemm import grouped
    from tenfold.ops.gpu import experts

    routed, turns = case.routed(), turns_of(case)
    own = [grouped.sort(ids, case.layer.experts, width_of(plan), turns) for ids, _ in routed]
    sources = [experts.gather(case.x, by, shares) for by, (_, shares) in zip(own, routed)]
    return lambda i: products(case, plan, own[i], routed[i][1], sources[i])


def whole_arm(case: Case, plan: Any) -> Arm:
    """As the engine runs them: routed and sorted in one launch where tokens are few."""
    from tenfold.ops.gemm import grouped
    from tenfold.ops.gpu import experts

    few, turns = experts.routes(len(case.x), case.routing), turns_of(case)

    def run(i: int) -> Tensor:
        if few:
            shares, by = experts.routed(case.scores[i], case.routing, width_of(plan), turns)
        else:
            ids, shares = route(case.scores[i], case.routing)
            by = grouped.sort(ids, case.layer.experts, width_of(plan), turns)
        needed = not isinstance(plan, grouped.GroupedPlan)
        gathered = experts.gather(case.x, by, shares) if needed else case.x
        return experts.summed(products(case, plan, by, shares, gathered), None, case.layer.top)

    return run


def library_arms(case: Case) -> dict[str, Arm]:
    layer, (gate_up, down) = case.layer, case.own
    flat = [ids.flatten() for ids, _ in case.routed()]
    sources = [case.x.index_select(0, own.argsort(stable=True) // layer.top) for own in flat]
    inner = torch.randn(case.picks, layer.inner, device=case.x.device).to(case.x.dtype)
    counts = [torch.bincount(own, minlength=layer.experts) for own in flat]
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tenfold.bench.moe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=MODELS, help="a comma between two")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    given = parser.parse_args(arguments)
    copy_gbs, tflops = copy_bandwidth("cuda"), matmul_ceiling("cuda")
    command = f"python -m tenfold.bench.moe --models {given.models} --tokens {given.tokens} --formats '{given.formats}'"
    result: dict[str, Any] = {
        "suite": "moe",
        "machine": machine("cuda"),
        "command": f"{command} --skew {given.skew}",
        "copy_gbs": copy_gbs,
        "matmul_tflops": tflops,
        "rows": [],
    }
    for model in given.models.split(","):
        layer = layer_of(model)
        dense = dense_experts(layer)
        for name in given.formats.split(","):
            names = [DENSE] * layer.experts if name == DENSE else formats_of(name, layer.experts)
            own = dense if name == DENSE else packed_experts(layer, dense, names)
            bits = [bits_of(each, layer) for each in names]
            ceiling = tflops * (2 if all(each.endswith("a8") for each in names) else 1)
            for tokens in map(int, given.tokens.split(",")):
                ids = scores_of(layer, tokens, given.skew).topk(layer.top).indices
                read, compute = layer.floor(ids, bits, copy_gbs, ceiling)
                about = {"model": model, "tokens": tokens, "skew": given.skew, "format": name, "read": read}
                about |= {"compute": compute, "bits": sum(bits) / len(bits)}
                rows = [about | row for row in measure(layer, own, tokens, given.skew, bits)]
                result["rows"] += rows
                for row in best(rows):
                    print(line(row), flush=True)
                if given.out:
                    save(given.out, result, given.commit)


if __name__ == "__main__":
    main()
