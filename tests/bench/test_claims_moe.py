"""Claims of experts' times and of whole mixture-of-experts models, from rows as the benches write them."""

from dataclasses import replace
from typing import Any

import pytest

from tenfold.bench import claims_moe
from tenfold.bench.floor import Sizes, model_sizes
from tenfold.bench.hardware import ROOT
from tenfold.bench.single import Result, Row

MACHINE = {"hardware": "a GPU", "commit": "c", "date": "2026-11-28"}
MODEL = "shape:qwen3-30b-a3b"


def row(
    format: str, tokens: int, took: float, arm: str = "ours", ours: bool = True, whole: bool = False
) -> dict[str, Any]:
    bound = {"read": 4.0, "compute": 2.0}
    about = {"model": MODEL, "tokens": tokens, "format": format, "arm": arm, "ours": ours, "whole": whole}
    return about | bound | {"microseconds": took}


ROWS = [
    *(row("bfloat16", 64, 5.0), row("bfloat16", 64, 1.0, whole=True), row("bfloat16", 64, 6.0, "torch grouped", False)),
    *(row("bfloat16", 64, 20.0, "cublas loop", False), row("mixed 4 bits", 64, 2.0), row("mixed 4 bits", 64, 3.0)),
    *(
        row("bfloat16", 8192, 50.0),
        row("bfloat16", 8192, 40.0, "torch grouped", False),
        row("mixed 5 bits", 8192, 20.0),
    ),
    *(row("w8a8", 8192, 30.0), row("w4a16", 8192, 16.0), row("mixed 4.5 bits", 8192, 12.5)),
    row("mixed 4.5 bits", 64, 2.5),
]


def test_mixed_formats_are_held_against_the_fastest_in_sixteen_bits() -> None:
    data = {"rows": ROWS, "command": "a command", "machine": MACHINE, "copy_gbs": 3000.0}
    found = {(c.id, c.what): c for c in claims_moe.of_kernels(data)}
    few = found["M1", "experts of qwen3-30b-a3b, 64 tokens, mixed 4 bits, over bfloat16"]
    assert (few.value, few.met) == (2.5, True)
    assert "200 % of what reading allows" in few.note
    many = found["M1", "experts of qwen3-30b-a3b, 8192 tokens, mixed 5 bits, over bfloat16"]
    assert (many.value, many.target, many.met) == (2.0, ">= 1.2 x", True)
    between = [c.value for (_, what), c in found.items() if "mixed 4.5 bits, over bfloat16" in what]
    assert between == [2.0, 3.2]
    against = found["M2", "time of W4A16 experts over that of mixed 4.5 bits, mean of 1"]
    assert against.value == pytest.approx(28)
    mean = found["M2", "time of W8A8 experts over that of mixed 5 bits, mean of 1"]
    assert mean.value == pytest.approx(50)
    assert "w8a8 1.50, w4a16 0.80" in mean.note
    narrow = found["M2", "time of W4A16 experts over that of mixed 5 bits, mean of 1"]
    assert (narrow.value, narrow.met) == (pytest.approx(-20), False)
    assert not any("W4A16 experts over that of mixed 4 bits" in what for _, what in found)
    worst = found["M3", "speed of bfloat16 experts over the better library's, worst of 2"]
    assert (worst.value, worst.met) == (0.8, False)
    assert found["M3", "speed of bfloat16 experts over a loop of cuBLAS products, worst of 1"].value == 4.0
    assert found["M3", "bytes of bfloat16 experts, share of a copy, worst of 1"].value == 80.0


def test_uniform_experts_of_four_bits_are_held_against_the_mix_of_as_many() -> None:
    rows = [row("mixed 4 bits", 64, 2.0), row("w4a16", 64, 1.5), row("mixed 4 bits", 8, 2.0), row("w4a16", 8, 3.0)]
    data = {"rows": rows, "command": "a command", "machine": MACHINE, "copy_gbs": 3000.0}
    mean, best = claims_moe.of_kernels(data)
    assert (mean.id, mean.what) == ("M2", "time of W4A16 experts over that of mixed 4 bits, mean of 2")
    assert (mean.value, mean.spread) == (pytest.approx(6.07, abs=0.01), (-25, 50))
    assert (mean.met, best.value, best.met) == (False, 50, True)


def result(took: float, engine: str = "tenfold", hardware: str = "NVIDIA H100", **settings: Any) -> Result:
    own = Row(engine, 8, 512, 3, long=[1 + 2e-3 * took], short=[1.0])
    machine = MACHINE | {"hardware": hardware}
    return Result(MODEL, machine, "a command", settings={"tenfold": settings}, rows=[own], floors=[(8, 512, 8.4)])


def test_whole_models_are_held_against_vllm_and_fewer_bits_against_sixteen() -> None:
    plain, mixed = claims_moe.of_models([result(10.0), result(4.0, weights="int4")])
    assert plain.value == pytest.approx(1.199)
    assert "floor 8.40 ms" in plain.note
    assert "vLLM 11.99 ms, measured before" in plain.note
    assert mixed.value == pytest.approx(2.5)
    assert mixed.target == ">= 2 x"
    assert claims_moe.of_models([Result("shape:llama-3-8b", MACHINE)]) == []


def test_experts_of_mixed_bits_are_held_against_the_same_model_in_sixteen() -> None:
    mixed = replace(result(4.0, weights="int4"), model="shape:qwen3-30b-a3b@mixed=4")
    found = {each.what: each.value for each in claims_moe.of_models([mixed, result(10.0)])}
    what = "decode, qwen3-30b-a3b, batch 8, context 512, experts of mixed 4 bits, the rest int4 over bfloat16"
    assert found[what] == pytest.approx(2.5)


def test_the_fastest_run_in_sixteen_bits_counts_and_its_commit_is_told() -> None:
    slow, fast, few = result(12.0), result(10.0), result(4.0, weights="int4")
    fast.command, few.command = "plain", "few"
    fast.machine["commit"] = "old"
    fast.rows[0].long, fast.rows[0].short = [1 + 2e-3 * took for took in (9.0, 10.0, 11.0)], [1.0] * 3
    *_, mixed = claims_moe.of_models([few, fast, slow])
    assert (mixed.value, mixed.spread) == (pytest.approx(2.5), (pytest.approx(2.25), pytest.approx(2.75)))
    assert (mixed.command, mixed.commit) == ("plain; few", "c")
    assert "medians of 3 and 1 rounds, one run after the other" in mixed.note
    assert mixed.note.endswith("floor 8.40 ms; bfloat16 at commit old")
    same = claims_moe.of_models([slow, few])[-1]
    assert "commit" not in same.note


def test_the_script_measures_every_mix_that_claims_are_of() -> None:
    script = (ROOT / "scripts" / "bench-gpu").read_text()
    for format in (claims_moe.FOUR, claims_moe.ABOVE, claims_moe.FIVE, *claims_moe.UNIFORM, "@mixed=4+", "@mixed=4.5+"):
        assert format in script


def test_vllm_counts_on_the_same_hardware_alone() -> None:
    assert claims_moe.of_models([result(10.0, hardware="NVIDIA H200")]) == []
    beside = [result(9.0, "vllm", "NVIDIA H200"), result(10.0, hardware="NVIDIA H200"), result(8.0)]
    found = claims_moe.of_models(beside)
    assert [each.value for each in found] == [pytest.approx(0.9), pytest.approx(1.499)]
    assert "vLLM 9 ms, one after the other" in found[0].note
    assert claims_moe.of_models([result(10.0), result(4.0, hardware="NVIDIA H200", weights="int4")])[1:] == []


def test_a_step_reads_the_experts_that_tokens_are_likely_to_hit() -> None:
    sizes = Sizes(weights=100, streamed=90, kv_token=0, flops_token=0, experts=64, routed=0.25)
    assert sizes.decode_bytes(1, 0) == 90 - 48
    assert sizes.decode_bytes(100, 0) == 90
    found = model_sizes(MODEL, "cuda")
    assert found.experts == pytest.approx(2 * 48 * 128 * 3 * 2048 * 768, rel=0.01)
    assert found.decode_bytes(1, 0) == pytest.approx(6.1e9, rel=0.05)  # 3 billion weights a token
    assert found.flops_token < 8e9
