"""Kernel times become the rows that claims read; what is timed there is timed by a stand-in here."""

from pathlib import Path

import pytest
import torch

from tenfold.bench import claims_gpu, kernels
from tenfold.bench.files import results_in
from tenfold.ops.choose import Table
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint
from tests.ops.gpu.test_arms import SMALL, FakeTimer, running


def test_linear_operations_are_timed_with_the_library_beside_ours(tmp_path: Path) -> None:
    own = running(Table("gpu test", "1", tmp_path / "t.json"))
    rows = kernels.linear([SMALL, SMALL], own, FakeTimer(), (1, 40), ("stream",))
    assert {row["batch"] for row in rows} == {1, 40}
    families = {(row["batch"], row["arm"].partition(":")[0]) for row in rows}
    assert families == {(1, "stream"), (1, "cublas"), (40, "stream"), (40, "cublas")}
    assert {row["bytes"] for row in rows} == {SMALL.rows * SMALL.cols * 2}
    machine = {"hardware": "a GPU", "commit": "c", "date": "2026-11-28"}
    found = claims_gpu.of_kernels(rows, 3000.0, machine, "a command")
    assert [claim.id for claim in found] == ["F4", "F4"]


def test_packed_weights_are_timed_with_the_library_beside_them(tmp_path: Path) -> None:
    own = running(Table("gpu test", "1", tmp_path / "t.json"))
    rows = kernels.packed([(64, 128)], ["int3g128z"], own, FakeTimer(), (1, 16))
    assert {(row["format"], row["batch"]) for row in rows} == {(f, b) for f in ("dense", "int3g128z") for b in (1, 16)}
    assert {row["arm"] for row in rows if row["format"] == "dense"} == {"cublas"}
    assert {row["arm"].partition(":")[0] for row in rows if row["format"] != "dense"} == {"stream3", "fused"}


def test_three_bits_are_held_against_the_library_and_a_copy() -> None:
    def row(format: str, arm: str, took: float, nbytes: int, shape: str = "18944 x 3584") -> dict[str, object]:
        about = {"op": "packed", "shape": shape, "format": format, "batch": 1}
        return about | {"arm": arm, "microseconds": took, "bytes": nbytes}

    rows = [
        *(row("dense", "cublas", 45.0, 136 << 20), row("int3g128z", "stream3:8x4x2", 10.0, 27 << 20)),
        *(row("int3g128z", "fused", 30.0, 27 << 20), row("int4g128z", "stream4:8x4x2", 5.0, 35 << 20)),
        *(row("dense", "cublas", 9.0, 1 << 20, "small"), row("int3g128z", "fused", 6.0, 1 << 18, "small")),
    ]
    machine = {"hardware": "a GPU", "commit": "c", "date": "2026-11-28"}
    found = claims_gpu.of_kernels(rows, 3000.0, machine, "a command")
    assert [(claim.id, round(claim.value, 2), claim.met) for claim in found] == [
        ("V1", 4.5, True),
        ("V1", round(100 * (27 << 20) / 10.0 / 1e3 / 3000.0, 2), True),
        ("V1", 1.5, True),
    ]


def test_a_model_says_what_its_attention_is() -> None:
    spec = kernels.layer(open_checkpoint(resolve("shape:llama-3-8b")).config)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim) == (32, 8, 128, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command_writes_every_part(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    small = ["--models", "shape:llama-3.2-1b@vocab=1024", "--batches", "1", "--context", "1024", "--prompt", "256"]
    assert kernels.main(["--out", str(out), *small]) == 0
    (data,) = results_in(tmp_path)["kernels"]
    assert {row["op"] for row in data["rows"]} == {"linear", "attention", "prefill", "uneven"}
