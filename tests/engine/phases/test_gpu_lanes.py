"""Lanes on a GPU: disjoint multiprocessors, the same tokens, changes of the border in the middle of everything."""

import random
import time
from typing import Any

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.phases.controller import Split
from tenfold.engine.phases.lanes import GreenLanes
from tenfold.engine.phases.loop import Phases
from tenfold.engine.phases.measure import measure
from tenfold.engine.request import Logprob, Request, SamplingParams
from tenfold.ops.gpu import green, nvrtc
from tenfold.ops.gpu.timing import GpuTimer
from tests.engine import fake

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = "shape:llama-3.2-1b@layers=4"
ROUNDED = 0.5  # nats; a token at random lies several below the best
TIE = 0.05  # nats between the two best, which other kernels may tell in another order


def engine(lookahead: int = 1, **changes: Any) -> Engine:
    return Engine.load(
        EngineConfig(
            model=MODEL,
            device="cuda",
            kernels="native",
            max_batch=16,
            max_model_len=2048,
            max_step_tokens=1024,
            kv_memory=1 << 30,
            lookahead=lookahead,
            **changes,
        ),
        tokens_only=True,
    )


def asks(seed: int, count: int = 24) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            str(i),
            tuple(draw.choices(range(100, 20_000), k=draw.choice([3, 40, 300, 1500]))),
            SamplingParams(temperature=0.0, max_tokens=draw.randint(1, 40), ignore_eos=True),
        )
        for i in range(count)
    ]


def run(own: Engine, requests: list[Request], every: int = 2) -> dict[tuple[str, int], list[int]]:
    outputs = []
    for request in requests:
        own.add(request)
        for _ in range(every):
            outputs += own.step()
    return fake.answers([*outputs, *fake.drain(own)])


def said(own: Engine, texts: list[tuple[int, ...]], best: int = 1) -> list[list[Logprob]]:
    """What a model says of the tokens of texts but the first of each, and so many best ones."""
    for i, text in enumerate(texts):
        own.add(
            Request(str(i), text, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=best))
        )
    ends = {output.request_id: output for output in fake.drain(own) if output.finish is not None}
    return [[p for p in ends[str(i)].prompt_logprobs or () if p is not None] for i in range(len(texts))]


def check(requests: list[Request], found: dict[tuple[str, int], list[int]], **changes: Any) -> None:
    """Greedy answers are those without lanes up to the first place where rounding may decide, for other kernels break
    ties in another way, and no token of them lies further below the best than that explains.
    """
    assert {(r.id, 0): r.params.max_tokens for r in requests} == {key: len(tokens) for key, tokens in found.items()}
    expected = run(engine(**changes), requests)
    texts, others = ([(*r.prompt, *answers[r.id, 0]) for r in requests] for answers in (found, expected))
    judged = 0
    for request, read, other in zip(requests, said(engine(**changes), texts), said(engine(**changes), others, 2)):
        start = len(request.prompt) - 1
        for one in read[start:]:
            assert max(p for _, p in one.top) - one.logprob < ROUNDED
        gaps = [abs(one.top[0][1] - one.top[1][1]) for one in other[start:]]
        sure = next((i for i, gap in enumerate(gaps) if gap < TIE), len(gaps))
        assert found[request.id, 0][:sure] == expected[request.id, 0][:sure]
        judged += sure > 0
    assert judged > len(requests) // 4


def test_the_parts_of_a_split_have_no_multiprocessor_in_common() -> None:
    total = torch.cuda.get_device_properties(0).multi_processor_count
    for size in (32, 64, 96):
        group, rest = green.split(torch.device("cuda"), size)
        assert (group.sms, group.sms + rest.sms) == (size, total)
        own, others = green.where(group.stream), green.where(rest.stream)
        assert (len(own), len(others)) == (size, total - size)
        assert not own & others


def test_a_captured_graph_keeps_to_the_part_it_was_captured_on() -> None:
    group, rest = green.split(torch.device("cuda"), 64)
    allowed = green.where(rest.stream)
    found = torch.full((4096,), -1, dtype=torch.int32, device="cuda")
    kernel = nvrtc.load("smid.cu", "smid", ())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=rest.stream):
        kernel((4096, 1, 1), 128, 0, [found])
    with torch.cuda.stream(rest.stream):
        graph.replay()
    torch.cuda.synchronize()
    assert set(found.tolist()) <= allowed
    assert group.sms == 64


@pytest.mark.parametrize("split", ["shared", "64", "96"])
def test_answers_are_what_one_stream_says(split: str) -> None:
    own = engine()
    lanes = GreenLanes(own.runner, own.kernels, (64, 96))  # type: ignore[arg-type]
    lanes.use(lanes.shared if split == "shared" else Split(int(split), lanes.total - int(split)))
    own.phases = Phases(own, lanes)
    check(asks(1), run(own, asks(1)))


def test_the_border_moves_at_every_turn_and_no_token_is_lost() -> None:
    own = engine()
    lanes = GreenLanes(own.runner, own.kernels, (32, 64, 96, 112))  # type: ignore[arg-type]
    every = [lanes.shared, *lanes.splits, Split(0, lanes.total), Split(lanes.total, 0)]
    phases = own.phases = Phases(own, lanes)
    draw, turn, took = random.Random(3), phases.turn, []

    def moving(outputs: list) -> None:  # type: ignore[type-arg]
        begin = time.perf_counter()
        lanes.use(draw.choice(every))
        took.append(time.perf_counter() - begin)
        phases.chunk = draw.choice([0, 0, 0, 0, 256])
        turn(outputs)

    phases.turn = moving  # type: ignore[method-assign]
    check(asks(2), run(own, asks(2)))
    # Parts of prompts bring no token, and are waited for all the same: before others go on from them, in whichever
    # lane, and before anybody reads what was asked of them.
    texts = [request.prompt for request in asks(4) if len(request.prompt) > 40]
    for a, b in zip(said(own, texts), said(engine(), texts)):
        assert len(a) == len(b)
        assert max(abs(x.logprob - y.logprob) for x, y in zip(a, b)) < ROUNDED
    print(f"a change of split: median {sorted(took)[len(took) // 2] * 1e6:.1f} us on the host, {len(took)} changes")


@pytest.mark.parametrize("cache", ["fp8", "int4", "k2v2g64", "k2v1.5g128h2"])
def test_packed_caches_have_lanes(cache: str) -> None:
    """Chunks over them are not captured when times of phases are measured."""
    own = engine(kv_cache=cache, schedule="phases", rehearse=False)
    assert own.phases is not None
    assert isinstance(own.phases.lanes, GreenLanes)
    check(asks(6, 12), run(own, asks(6, 12)), kv_cache=cache)


def test_stairs_are_measured_and_fewer_multiprocessors_take_longer() -> None:
    own = engine()
    lanes = GreenLanes(own.runner, own.kernels, (32, 64, 96, 112))  # type: ignore[arg-type]
    stairs = measure(lanes, 2048, 16)
    print(stairs)
    assert stairs.prefill_seconds(32, 2048) > 1.5 * stairs.prefill_seconds(lanes.total, 2048)
    assert stairs.decode_seconds(lanes.total - 112, 8) > stairs.decode_seconds(lanes.total, 8)
    assert set(stairs.decode) == {lanes.total, *(split.decode for split in lanes.splits)}
    check(asks(4, 6), run(own, asks(4, 6)))  # nothing was written


def test_a_timer_of_a_part_times_on_its_multiprocessors_alone() -> None:
    device = torch.device("cuda")
    _, few = green.split(device, 112)
    whole, part = (GpuTimer(device, lane).memory_microseconds()["copy"] for lane in (None, few))
    assert part > 1.5 * whole  # 20 multiprocessors cannot keep this memory busy
