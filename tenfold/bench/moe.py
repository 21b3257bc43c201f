"""Times of a layer's experts on a GPU, ours and the libraries': `python -m tenfold.bench.moe --out FILE`.

For each shape and number of tokens: every plan of ours over the whole operation (sort, gather, both products, sum), the
two products alone, and as rivals PyTorch's grouped product and a loop of cuBLAS products over the experts, which are
given sorted tokens, do no sorting, and in the loop's case know the counts on the host. Picks are random; `--skew` draws
experts as unevenly as Zipf's law of that exponent. What must be read (experts that have tokens, once) and computed is
held against copy bandwidth and the matrix ceiling.
"""

import argparse
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
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

MODELS = "shape:qwen3-30b-a3b,shape:deepseek-v2-lite,shape:qwen1.5-moe-a2.7b,shape:mixtral-8x7b"
TOKENS = "1,8,64,512,8192"
Arm = Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """The routed experts of one layer: features of tokens, and inside an expert."""

    experts: int
    top: int
    hidden: int
    inner: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * 2

    def floor(self, ids: Tensor, copy_gbs: float, tflops: float) -> tuple[float, float]:
        """Microseconds that picks [T, top] cannot but take: to read the experts hit, and to compute."""
        hit, picks = len(ids.unique()), ids.numel()
        activations = 2 * (2 * picks * self.hidden + 2 * picks * self.inner)
        read = (hit * self.expert_bytes + activations) / (copy_gbs * GB)
        return 1e6 * read, 1e6 * picks * 6 * self.hidden * self.inner / (tflops * 1e12)


def layer_of(model: str) -> Layer:
    """Raises ValueError for a model without experts."""
    config = model_config(open_checkpoint(resolve(model)).config)
    if config.experts is None:
        raise ValueError(f"{model} has no experts; name a mixture-of-experts model, such as shape:qwen3-30b-a3b.")
    own = config.experts
    return Layer(own.routing.experts, own.routing.top, config.hidden_size, own.size)


def drawn(layer: Layer, tokens: int, skew: float, seed: int = 0) -> Tensor:
    """Picks [tokens, top] int64, different for each token; skew: exponent of Zipf's law over experts, 0 for none."""
    draw = torch.Generator().manual_seed(seed)
    chance = torch.arange(1, layer.experts + 1, dtype=torch.float64) ** -skew
    chance = chance[torch.randperm(layer.experts, generator=draw)]
    return torch.multinomial(chance.expand(tokens, -1), layer.top, generator=draw)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Experts of one layer and picks for several calls, each with other experts where few are hit, so that a call finds
    its weights as cold as in a real step.
    """

    layer: Layer
    x: Tensor
    ids: list[Tensor]
    shares: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def picks(self) -> int:
        return self.ids[0].numel()


def make(layer: Layer, tokens: int, skew: float, copies: int, device: torch.device) -> Case:
    generator, half = torch.Generator(device).manual_seed(1), torch.bfloat16

    def normal(spread: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=half, device=device).normal_(0, spread, generator=generator)

    ids = [drawn(layer, tokens, skew, seed).to(device) for seed in range(copies)]
    return Case(
        layer,
        normal(1.0, tokens, layer.hidden),
        ids,
        torch.rand(ids[0].shape, device=device, generator=generator),
        normal(0.02, layer.experts, 2 * layer.inner, layer.hidden),
        normal(0.02, layer.experts, layer.hidden, layer.inner),
    )


def measure(layer: Layer, tokens: int, skew: float) -> list[dict[str, Any]]:
    """A row for every arm: name, microseconds, whether it is ours, and whether it is the whole operation."""
    from tenfold.ops.gpu.timing import GpuTimer

    timer = GpuTimer(torch.device("cuda"))
    copies = min(16, timer.copies(len(drawn(layer, tokens, skew).unique()) * layer.expert_bytes))
    case = make(layer, tokens, skew, copies, timer.device)
    whole, products, rivals = whole_arms(case), product_arms(case), library_arms(case)
    first = next(iter(whole.values()))
    rows = []
    for name, took in timer.measure(whole, copies, first).items():
        rows.append({"arm": name, "microseconds": took, "ours": True, "whole": True})
    for name, took in timer.measure(products | rivals, copies).items():
        rows.append({"arm": name, "microseconds": took, "ours": name not in rivals, "whole": False})
    return rows


def plans_of(case: Case) -> list[Any]:
    from tenfold.ops.gpu import experts

    layer, sms = case.layer, torch.cuda.get_device_properties("cuda").multi_processor_count
    sizes = ((2 * layer.inner, layer.hidden, True), (layer.hidden, layer.inner, False))
    every = experts.candidates(case.picks, layer.experts)
    return [p for p in every if all(experts.legal(p, case.picks, layer.experts, *size, sms) for size in sizes)]


def whole_arms(case: Case) -> dict[str, Arm]:
    from tenfold.ops.gemm import grouped
    from tenfold.ops.gpu import experts
    from tenfold.ops.gpu.sums import Workspace

    workspace, sms = Workspace(case.x.device), torch.cuda.get_device_properties("cuda").multi_processor_count
    triton = grouped.plan(case.picks, case.layer.experts)
    rest = case.shares, case.gate_up, case.down, "silu"
    found: dict[str, Arm] = {str(triton): lambda i: grouped.run(triton, case.x, case.ids[i], *rest)}
    for plan in plans_of(case):

        def run(i: int, plan: Any = plan) -> Tensor:
            by = grouped.sort(case.ids[i], case.layer.experts, plan.width)
            return experts.run(plan, workspace, sms, case.x, by, *rest)

        found[str(plan)] = run
    return found


def product_arms(case: Case) -> dict[str, Arm]:
    """Of ours: both products, of picks sorted before."""
    from tenfold.ops.gemm import grouped
    from tenfold.ops.gpu import experts
    from tenfold.ops.gpu.sums import Workspace

    layer, sms = case.layer, torch.cuda.get_device_properties("cuda").multi_processor_count
    workspace = Workspace(case.x.device)
    halfway = case.x.new_empty(case.picks, layer.inner)
    parts = case.x.new_empty(case.picks, layer.hidden)
    sources = [case.x.index_select(0, ids.flatten().argsort(stable=True) // layer.top) for ids in case.ids]
    sorted_by: dict[int, list[Any]] = {}

    def arm(plan: Any) -> Arm:
        if plan.width not in sorted_by:
            sorted_by[plan.width] = [grouped.sort(ids, layer.experts, plan.width) for ids in case.ids]
        own = sorted_by[plan.width]

        def run(i: int) -> Tensor:
            experts.product(plan, workspace, sms, sources[i], case.gate_up, halfway, own[i], case.shares, "silu")
            experts.product(plan, workspace, sms, halfway, case.down, parts, own[i], case.shares, None)
            return parts

        return run

    return {f"products {plan}": arm(plan) for plan in plans_of(case)}


def library_arms(case: Case) -> dict[str, Arm]:
    layer = case.layer
    flat = [ids.flatten() for ids in case.ids]
    sources = [case.x.index_select(0, own.argsort(stable=True) // layer.top) for own in flat]
    inner = torch.randn(case.picks, layer.inner, device=case.x.device).to(case.x.dtype)
    counts = [torch.bincount(own, minlength=layer.experts) for own in flat]
    ends = [own.cumsum(0).to(torch.int32) for own in counts]
    parted = [
        [(e, a, b) for e, (a, b) in enumerate(zip((end - count).tolist(), end.tolist())) if b > a]
        for end, count in zip(ends, counts)
    ]

    def grouped_mm(i: int) -> Tensor:
        torch._grouped_mm(sources[i], case.gate_up.transpose(1, 2), offs=ends[i])
        return torch._grouped_mm(inner, case.down.transpose(1, 2), offs=ends[i])

    def loop(i: int) -> Tensor:
        for e, a, b in parted[i]:
            F.linear(sources[i][a:b], case.gate_up[e])
            last = F.linear(inner[a:b], case.down[e])
        return last

    return (
        {"torch grouped": grouped_mm, "cublas loop": loop} if hasattr(torch, "_grouped_mm") else {"cublas loop": loop}
    )


def line(model: str, tokens: int, row: dict[str, Any], floor: tuple[float, float]) -> str:
    """For people: microseconds, and the share of the larger floor that it reaches."""
    kind = "whole   " if row["whole"] else "products"
    return (
        f"{model:28} {tokens:5} {kind} {row['arm']:28} {row['microseconds']:9.1f} us  "
        f"{100 * max(floor) / row['microseconds']:5.1f} % of the floor (read {floor[0]:.1f}, compute {floor[1]:.1f})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tenfold.bench.moe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=MODELS, help="a comma between two")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    given = parser.parse_args(arguments)
    copy_gbs, tflops = copy_bandwidth("cuda"), matmul_ceiling("cuda")
    result: dict[str, Any] = {
        "suite": "moe",
        "machine": machine("cuda"),
        "command": f"python -m tenfold.bench.moe --models {given.models} --tokens {given.tokens} --skew {given.skew}",
        "copy_gbs": copy_gbs,
        "matmul_tflops": tflops,
        "rows": [],
    }
    for model in given.models.split(","):
        layer = layer_of(model)
        for tokens in map(int, given.tokens.split(",")):
            floor = layer.floor(drawn(layer, tokens, given.skew), copy_gbs, tflops)
            for row in measure(layer, tokens, given.skew):
                about = {"model": model, "tokens": tokens, "skew": given.skew, "read": floor[0], "compute": floor[1]}
                result["rows"].append(about | row)
                print(line(model, tokens, row, floor), flush=True)
            if given.out:
                save(given.out, result, given.commit)


if __name__ == "__main__":
    main()
