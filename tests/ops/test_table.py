"""Which kernels are picked, and that the choice says why."""

import re
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from tenfold.ops import table
from tenfold.ops.oracle import Oracle
from tenfold.ops.table import make_kernels

CPU = torch.device("cpu")


class Fake:
    name = "native"
    reason = ""

    def __init__(self, threads: int) -> None:
        if threads > 64:
            raise RuntimeError("no C compiler was found.")
        self.threads = threads


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled kernels that need no compiler, and are not there with more than 64 threads."""
    module = types.ModuleType("fake_native")
    module.Native = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_native", module)
    monkeypatch.setitem(table.KERNELS, "native", "fake_native:Native")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "picked", "reason"),
    [
        ("auto", "cpu", torch.float32, "native", "fit a CPU"),
        ("native", "cpu", torch.float32, "native", "fit a CPU"),
        ("torch", "cpu", torch.float32, "torch", "asked for"),
        ("auto", "cpu", torch.bfloat16, "torch", "compute type is bfloat16"),
        ("auto", "meta", torch.float32, "torch", "device is meta"),
    ],
)
def test_choice(name: str, device: str, dtype: torch.dtype, picked: str, reason: str) -> None:
    kernels = make_kernels(name, torch.device(device), dtype, threads=0)
    assert kernels.name == picked
    assert reason in kernels.reason


def test_falls_back_when_nothing_compiles() -> None:
    kernels = make_kernels("auto", CPU, torch.float32, threads=65)
    assert isinstance(kernels, Oracle)
    assert "no C compiler was found" in kernels.reason
    assert torch.get_num_threads() == 65


def test_torch_keeps_off_the_cores_of_compiled_kernels() -> None:
    assert make_kernels("native", CPU, torch.float32, threads=2).threads == 2  # type: ignore[attr-defined]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("name", "dtype", "threads", "message"),
    [
        ("fast", torch.float32, 1, "kernels is 'fast'; allowed: auto, native, torch"),
        ("native", torch.float16, 1, "kernels=native cannot be used, .*float16.*Use kernels=auto"),
        ("native", torch.float32, 65, "no C compiler was found"),
    ],
)
def test_refusal(name: str, dtype: torch.dtype, threads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_kernels(name, CPU, dtype, threads)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """As if PyTorch saw a GPU; what it can is in the list."""
    pytest.importorskip("cuda.bindings.nvrtc")
    able = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: able[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    return able


@pytest.mark.parametrize("able", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_a_gpu_that_is_no_hopper_runs_on_torch(gpu: list[tuple[int, int]], able: tuple[int, int]) -> None:
    gpu[0] = able
    device = torch.device("cuda")
    told = rf"made for compute capability 9\.0 \(Hopper\), and a GPU has {able[0]}\.{able[1]}\."
    with pytest.raises(ValueError, match=rf"kernels=native cannot be used: .*{told} Use kernels=auto"):
        make_kernels("native", device, torch.bfloat16)
    kernels = make_kernels("auto", device, torch.bfloat16)
    assert kernels.name == "torch"
    assert re.search(told, kernels.reason)


def test_what_cuda_needs_and_lacks_is_said(gpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.ops.gpu import nvrtc

    class Broken:
        @staticmethod
        def nvrtcVersion() -> None:
            raise RuntimeError("Failed to dlopen libnvrtc")

    device = torch.device("cuda")
    monkeypatch.setattr(nvrtc, "_driver", lambda: None)
    with monkeypatch.context() as there:
        there.setattr(nvrtc, "_nvrtc", Broken)
        assert "finds no libnvrtc of its CUDA version (Failed" in make_kernels("auto", device, torch.bfloat16).reason
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(nvrtc.shutil, "which", lambda _: None)
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    with pytest.raises(ValueError, match="neither gcc nor clang, nor does CC name one"):
        make_kernels("native", device, torch.bfloat16)
