"""Which configurations of attention are worth timing, and timing them on a GPU.

Keys and values rotate through sets larger than the L2 cache together, and launches are replayed from CUDA graphs, so a
time is that of a step and not of the host or of a warm cache.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from tenfold.ops.attention import decode, prefill
from tenfold.ops.attention.attend import library
from tenfold.ops.attention.plan import MOST_SPLITS, DecodePlan, PrefillPlan, plan_decode, plan_prefill, seen
from tenfold.ops.gpu import prefill as tensor_prefill
from tenfold.ops.gpu.prefill import ChunkPlan
from tenfold.ops.kernels import AttentionSpec

COLD_BYTES = 160 << 20  # of all sets together: three times the L2 cache of an H100
MOST_SETS = 64
REPLAYS = 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Median microseconds of one launch, and the rate it means: GB/s of keys and values, or TFLOP/s."""

    name: str
    microseconds: float
    rate: float
    share: float  # of the ceiling


def decode_candidates(
    spec: AttentionSpec,
    requests: int,
    max_kv: int,
    sms: int,
    softmax: Sequence[str] = ("lazy",),
    merge: Sequence[str] = ("last",),
) -> list[DecodePlan]:
    """Plans worth timing for steps of decodes: the rule's splits, and those that fill the GPU one to four times; tiles
    with two or three of them in flight; CUDA cores where a KV head has one query head. The rule's plan comes first.
    """
    rule = plan_decode(spec, requests, max_kv, sms)
    pairs = requests * spec.kv_heads
    counts = {rule.splits} | {max(1, sms * n // pairs) for n in (1, 2, 3, 4)}
    tiles = -(-seen(spec, max_kv) // rule.tile)
    counts = {min(count, MOST_SPLITS, max(1, tiles // 2)) for count in counts}
    shapes = [(rule.tile, 4, stages, True) for stages in (3, 5, 7)]
    shapes += [(rule.tile // 2, 4, 5, True), (rule.tile // 2, 2, 5, True), (2 * rule.tile, 4, 3, True)]
    if spec.heads == spec.kv_heads:
        shapes += [(16, 4, 4, False), (32, 4, 3, False), (32, 8, 3, False)]
    plans = [rule]
    plans += [
        DecodePlan(count, tile, warps, stages, dot=dot)
        for count in sorted(counts)
        for tile, warps, stages, dot in shapes
    ]
    return list(dict.fromkeys(replace(plan, softmax=s, merge=m) for plan in plans for s in softmax for m in merge))


def measure_decode(
    spec: AttentionSpec,
    requests: int,
    context: int,
    plans: Sequence[DecodePlan],
    *,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    ceiling: float = 3028.0,
    say: Callable[[str], None] = print,
) -> list[Timing]:
    """Time plans for `requests` contexts of `context` tokens on the current CUDA device, fastest first. ceiling: the
    bandwidth in GB/s that shares are given of. A plan that cannot run is named with its error and left out.
    """
    device = torch.device("cuda")
    size = 2 * requests * seen(spec, context) * spec.kv_heads * spec.head_dim * dtype.itemsize
    sets = [
        paged(spec, requests, context, page_size, dtype, device, seed)
        for seed in range(min(MOST_SETS, max(2, math.ceil(COLD_BYTES / size))))
    ]
    q = torch.randn(requests, spec.heads * spec.head_dim, dtype=dtype, device=device)
    lengths = torch.full((requests,), context, dtype=torch.int32, device=device)
    phi = torch.full((spec.heads,), 2.0, device=device)
    heads = f"{spec.heads}/{spec.kv_heads} heads of {spec.head_dim}"
    say(f"decode attention: {requests} x {context} tokens, {heads}, {dtype}")
    timings = []
    for plan in plans:
        workspace = decode.Workspace(device)

        def call(keys: Tensor, values: Tensor, table: Tensor, plan: DecodePlan = plan, w: object = workspace) -> None:
            decode.run(plan, w, q, keys, values, table, lengths, spec, phi=phi)  # type: ignore[arg-type]

        try:
            took = time_graph([lambda s=s: call(*s) for s in sets])  # type: ignore[misc]
        except Exception as error:  # a configuration that the compiler or the GPU refuses must not end the others
            say(f"  {plan}: {str(error).splitlines()[0][:120]}")
            continue
        rate = size / took / 1e3
        timings.append(Timing(str(plan), took, rate, rate / ceiling))
    return show(timings, "GB/s", say)


def chunk_candidates(
    spec: AttentionSpec,
    softmax: Sequence[str] = ("lazy",),
    *,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> list[ChunkPlan]:
    """Plans of the kernel in CUDA C++ worth timing for chunks on the current CUDA device, if it can run; the rule's
    comes first.
    """
    if not tensor_prefill.legal(spec, dtype, page_size) or not tensor_prefill.runs_on(torch.device("cuda")):
        return []
    return list(tensor_prefill.candidates(spec, [arm for arm in softmax if arm in tensor_prefill.ARMS]))


def prefill_candidates(spec: AttentionSpec, softmax: Sequence[str] = ("lazy",)) -> list[PrefillPlan]:
    """Plans of the kernel in Triton worth timing for chunks; the rule's come first."""
    shapes = [(64, 64, 4, 3), (64, 64, 4, 5), (128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 3), (64, 128, 4, 3)]
    if spec.head_dim > 128:
        shapes = [(64, 32, 4, 3), (64, 32, 4, 5), (128, 32, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)]
    rule = plan_prefill(spec)
    plans = [rule, *(PrefillPlan(*shape) for shape in shapes)]
    found = [replace(plan, softmax=s, branch=branch) for plan in plans for s in softmax for branch in (True, False)]
    return list(dict.fromkeys(plan for plan in found if plan.branch or plan.softmax == "lazy"))


def measure_prefill(
    spec: AttentionSpec,
    requests: int,
    tokens: int,
    plans: Sequence[PrefillPlan | ChunkPlan],
    *,
    prefix: int = 0,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    ceiling: float = 790.0,
    say: Callable[[str], None] = print,
) -> list[Timing]:
    """Time plans for `requests` chunks of `tokens` behind `prefix` tokens each on the current CUDA device, and
    PyTorch's attention with the gathering of pages ("sdpa") and without ("sdpa, gathered"), fastest first. ceiling: the
    matrix rate in TFLOP/s that shares are given of.
    """
    device = torch.device("cuda")
    context = prefix + tokens
    keys, values, table = paged(spec, requests, context, page_size, dtype, device, 0)
    q = torch.randn(requests * tokens, spec.heads * spec.head_dim, dtype=dtype, device=device)
    out = torch.empty_like(q)
    starts = torch.arange(0, requests * tokens + 1, tokens, dtype=torch.int32, device=device)
    lengths = torch.full((requests,), context, dtype=torch.int32, device=device)
    phi = torch.full((spec.heads,), 2.0, device=device)
    recomputed = torch.zeros(1, dtype=torch.int64, device=device)
    queue = torch.zeros(2, dtype=torch.int32, device=device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count

    def ours(plan: PrefillPlan | ChunkPlan) -> Callable[[], object]:
        own = (q, keys, values, table, starts, lengths, spec, tokens)
        if isinstance(plan, ChunkPlan):
            return lambda: tensor_prefill.run(plan, queue, sms, *own, recomputed=recomputed, phi=phi, out=out)
        return lambda: prefill.run(plan, *own, recomputed=recomputed, phi=phi, out=out)

    calls: dict[str, Callable[[], object]] = {str(plan): ours(plan) for plan in plans}
    if not spec.window and not spec.softcap:
        host = [(tokens, context)] * requests
        calls["sdpa"] = lambda: library(q, keys, values, table, host, 0, spec, out)
        calls["sdpa, gathered"] = gathered_sdpa(spec, requests, tokens, context, dtype, device)
    work = 4 * spec.head_dim * spec.heads * requests * sum(seen(spec, prefix + i + 1) for i in range(tokens))
    heads = f"{spec.heads}/{spec.kv_heads} heads of {spec.head_dim}"
    say(f"prefill attention: {requests} x {tokens} tokens behind {prefix}, {heads}, {dtype}")
    timings = []
    for name, call in calls.items():
        try:
            took = time_graph([call])
        except Exception as error:  # as in measure_decode
            say(f"  {name}: {str(error).splitlines()[0][:120]}")
            continue
        rate = work / took / 1e6
        timings.append(Timing(name, took, rate, rate / ceiling))
    return show(timings, "TFLOP/s", say)


def gathered_sdpa(
    spec: AttentionSpec, requests: int, tokens: int, context: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """PyTorch's attention on keys and values that lie as it likes them."""
    q = torch.randn(requests, spec.heads, tokens, spec.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(requests, spec.kv_heads, context, spec.head_dim, dtype=dtype, device=device) for _ in range(2))
    mask = None if tokens == context else causal_lower_right(tokens, context)
    return lambda: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=spec.heads != spec.kv_heads
    )


def paged(
    spec: AttentionSpec,
    requests: int,
    context: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random keys, values and a shuffled page table [requests, pages]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    each = -(-context // page_size)
    shape = (requests * each, spec.kv_heads, page_size, spec.head_dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(2))
    table = torch.randperm(requests * each, device=device, generator=generator).view(requests, each).int()
    return keys, values, table


def time_graph(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Median microseconds of one of `calls`, which are captured into one graph that runs all of them in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def show(timings: list[Timing], unit: str, say: Callable[[str], None]) -> list[Timing]:
    """Say them, fastest first."""
    ordered = sorted(timings, key=lambda t: t.microseconds)
    for t in ordered:
        say(f"  {t.microseconds:9.1f} us {t.rate:8.1f} {unit} {t.share:6.1%}  {t.name}")
    return ordered
