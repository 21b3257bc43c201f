"""On a GPU: every arm that is said to be legal runs in a captured graph and gives the reference's result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenfold.ops.choose import Table
from tenfold.ops.gpu import nvrtc

arms = pytest.importorskip("tenfold.ops.gpu.arms")
tuning = pytest.importorskip("tenfold.ops.gpu.tune")
timing = pytest.importorskip("tenfold.ops.gpu.timing")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # a kernel compiles in a second, and there are hundreds
]

USES = [arms.Use(), arms.Use(norm=True), arms.Use(norm=True, act="silu"), arms.Use(residual=True), arms.HEAD]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 33, 64])
def test_dense(tmp_path: Path, tokens: int, use: "arms.Use", dtype: torch.dtype) -> None:
    check(tmp_path, arms.Work(1056, 1024, "dense", use, tokens, dtype))


@pytest.mark.parametrize("tokens", [5, 17, 64])
def test_routers(tmp_path: Path, tokens: int) -> None:
    """So few weights that more than 16 tokens stream in pieces."""
    work = arms.Work(128, 2048, "dense", arms.ROUTER, tokens)
    assert any(name.startswith("stream:") for name in arms.candidates(work, 132))
    check(tmp_path, work)


@pytest.mark.parametrize("format", ["dense", "int4g128", "fp8a8"])
def test_more_tiles_than_blocks(tmp_path: Path, format: str) -> None:
    check(tmp_path, arms.Work(17072, 512, format, arms.Use(norm=True, act="silu"), 40))


@pytest.mark.parametrize("tokens", [1, 40, 128])
@pytest.mark.parametrize("format", ["int4g128", "int8g128", "fp8a8", "int4a8"])
def test_packed(tmp_path: Path, format: str, tokens: int) -> None:
    check(tmp_path, arms.Work(1056, 1024, format, arms.Use(norm=True, act="silu"), tokens))


def check(tmp_path: Path, work: "arms.Work") -> None:
    nvrtc.check_available()
    device = torch.device("cuda")
    running = tuning.open_arms(device, work.dtype, Table("test", "1", tmp_path / "t.json"))
    timer = timing.GpuTimer(device)
    timer.rotated = 2 << 20
    names = arms.candidates(work, running.sms)
    times = tuning.measure(work, tuning.weights(work, timer, device), running, timer, names)
    assert sorted(names) == sorted(times)
    assert not running.context.sums.counters.any()


def test_linear_repeats_bit_for_bit_whatever_arm_is_picked(tmp_path: Path) -> None:
    device, work = torch.device("cuda"), arms.Work(1056, 1024, "dense", arms.Use(norm=True), 8)
    running = tuning.open_arms(device, work.dtype, Table("test", "1", tmp_path / "t.json"))
    (w, *_), (x, fused) = tuning.weights(work, timing.GpuTimer(device), device), tuning.inputs(work, device)
    for name in arms.candidates(work, running.sms):
        running.table.record(arms.key(replace(work, tokens=8), running.sms), {name: 1.0})
        w.arms.clear()
        results = [running(x, w, fused.bias, fused.norm, fused.act, fused.residual) for _ in range(4)]
        assert all(torch.equal(results[0], other) for other in results), name
