"""On a GPU: every arm of attention that is said to be legal runs in a captured graph and gives the oracle's result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.choose import Table
from tenfold.ops.gpu import nvrtc
from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.oracle import Oracle

attending = pytest.importorskip("tenfold.ops.gpu.attending")
tuning = pytest.importorskip("tenfold.ops.gpu.tune_attention")
timing = pytest.importorskip("tenfold.ops.gpu.timing")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
HEADS = [(32, 8, 128, 0), (32, 32, 128, 0), (9, 3, 64, 0), (16, 2, 128, 300), (8, 8, 96, 0)]


def made(tmp_path: Path) -> Any:
    nvrtc.check_available()
    device = torch.device("cuda")
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return attending.Attending(device, sms, Table("test", "1", tmp_path / "t.json"))


def spec_of(heads: int, kv_heads: int, head_dim: int, window: int) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window, 0.0, head_dim)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("requests", "longest"), [(1, 256), (1, 2048), (3, 2048), (17, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decodes(
    tmp_path: Path, heads: tuple[int, int, int, int], requests: int, longest: int, dtype: torch.dtype
) -> None:
    check(tmp_path, attending.Reading(spec_of(*heads), requests, longest, 16, dtype))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", [64, 257])
def test_chunks(tmp_path: Path, heads: tuple[int, int, int, int], tokens: int) -> None:
    check(tmp_path, attending.Reading(spec_of(*heads), 1, tokens, 16, torch.bfloat16, tokens, whole=True))


def check(tmp_path: Path, reading: Any) -> None:
    running = made(tmp_path)
    names = [*attending.candidates(reading, running.sms), *([] if reading.tokens else [attending.TRITON_TWO])]
    inputs = tuning.Inputs(reading, 2, running.device)
    keys, values, table = inputs.stores[0]
    oracle = Oracle(running.device, reading.dtype)
    expected = oracle.attention(inputs.qkv, inputs.heads, keys, values, inputs.contexts(table)).double()
    for name in names:
        result = inputs.bind(name, running, "lazy")(0).double()
        assert (result - expected).norm() <= timing.FARTHEST * expected.norm(), name
    timer = timing.GpuTimer(running.device)
    timer.rotated = 2 << 20
    assert sorted(tuning.measure(reading, running, timer, names)) == sorted(names)
    for workspace in running.decoding:
        assert not workspace.counters.any()


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("requests", "longest", "tokens"), [(3, 2048, 0), (1, 257, 257)])
def test_every_softmax(
    tmp_path: Path, heads: tuple[int, int, int, int], requests: int, longest: int, tokens: int
) -> None:
    reading = attending.Reading(spec_of(*heads), requests, longest, 16, torch.bfloat16, tokens, unified=True)
    running = made(tmp_path)
    timer = timing.GpuTimer(running.device)
    timer.rotated = 2 << 20
    assert sorted(tuning.measure_softmax(reading, running, timer)) == sorted(attending.softmaxes(reading))
