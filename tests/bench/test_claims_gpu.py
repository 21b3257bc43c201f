"""Claims F1 to F7 from recorded results: the arithmetic, the targets, and where the numbers say they come from."""

import json
import sys
from pathlib import Path

import pytest

from tenfold.bench import arms, claims_gpu, plots, report, throughput
from tenfold.bench.claims import Claim
from tenfold.bench.floor import model_sizes
from tenfold.bench.lengths import parse
from tenfold.bench.single import Result, Row
from tenfold.ops.kernels import AttentionSpec

MACHINE = {"hardware": "NVIDIA H100 80GB HBM3", "commit": "abc1234", "date": "2026-11-23"}


def row(engine: str, batch: int, context: int, *ms: float, beside: tuple[str, ...] = (), prefill: float = 20.0) -> Row:
    """TPOT samples in ms, from runs of 129 tokens."""
    short = [prefill / 1e3] * len(ms)
    return Row(engine, batch, context, 129, [s + 128 * t / 1e3 for s, t in zip(short, ms)], short, [], list(beside))


def result(*rows: Row, model: str = "shape:llama-2-7b@positions=40960") -> Result:
    floors = [(r.batch, r.context, 4.5) for r in rows]
    sizes = model_sizes("shape:llama-2-7b", "cuda")
    return Result(model, MACHINE, "tenfold bench single", 3000.0, 790.0, {}, sizes, list(rows), [], floors)


def by_id(found: list[Claim]) -> dict[str, list[Claim]]:
    return {id: [c for c in found if c.id == id] for id in dict.fromkeys(c.id for c in found)}


def test_eager_counts_its_best_case_and_compiled_every_point() -> None:
    pair = {"beside": ("hf-generate",)}
    results = [
        result(
            *(row("tenfold", 1, 128, 5.0, 5.5, **pair), row("hf-generate", 1, 128, 75.0, 77.0, beside=("tenfold",))),
            *(row("tenfold", 8, 1024, 6.0, **pair), row("hf-generate", 8, 1024, 60.0, beside=("tenfold",))),
        ),
        result(row("tenfold", 1, 1024, 5.0, beside=("hf-compiled",)), row("hf-compiled", 1, 1024, 5.5)),
    ]
    eager, compiled = by_id(claims_gpu.of_single(results))["F1"]
    assert eager.value == pytest.approx((75 / 5 + 77 / 5.5) / 2, rel=1e-3)
    assert eager.spread == (14.0, 15.0)
    assert eager.met
    assert "batch 1, context 128" in eager.note
    assert (compiled.value, compiled.met) == (1.1, False)
    assert (eager.hardware, eager.commit, eager.date) == tuple(MACHINE.values())


def test_batches_outside_the_grid_are_told_apart() -> None:
    ours = result(row("tenfold", 1, 128, 5.0), row("tenfold", 64, 512, 8.0))
    theirs = result(row("vllm", 1, 128, 6.0), row("vllm", 64, 512, 7.6))
    average, worst, large = by_id(claims_gpu.of_single([ours, theirs]))["F2"]
    assert average.value == worst.value == pytest.approx(1.2)
    assert (large.value, large.met) == (pytest.approx(0.95), False)
    assert "above 8" in large.what
    assert "64 x 512: 0.95" in large.note


def test_contexts_that_differ_are_told_apart_from_those_that_do_not() -> None:
    ours = result(row("tenfold", 1, 128, 5.0), row("tenfold", 32, 8400, 5.0))
    theirs = result(row("vllm", 1, 128, 6.0), row("vllm", 32, 8400, 5.5))
    for one in (*ours.rows, *theirs.rows):
        one.lengths = [8400] * 2 + [300] * 30 if one.batch == 32 else []
    found = {c.what: c.value for c in claims_gpu.of_single([ours, theirs]) if c.id == "F2"}
    assert found["decode, llama-2-7b, worst of 1 points, contexts that differ, against vLLM"] == pytest.approx(1.1)
    assert found["decode, llama-2-7b, worst of 1 points, against vLLM"] == pytest.approx(1.2)
    assert len(found) == 3


def test_vllm_counts_on_average_and_at_its_worst_point() -> None:
    ours = result(row("tenfold", 1, 128, 5.0), row("tenfold", 8, 128, 8.0), row("tenfold", 8, 32768, 9.0))
    theirs = result(row("vllm", 1, 128, 6.0), row("vllm", 8, 128, 7.6), row("vllm", 1, 8192, 9.0))
    average, worst = by_id(claims_gpu.of_single([ours, theirs]))["F2"]
    assert average.value == pytest.approx((1.2 * 0.95) ** 0.5, rel=1e-3)  # only points that both have
    assert (worst.value, worst.met) == (0.95, False)
    assert "one after the other" in worst.note


@pytest.mark.parametrize(
    ("model", "ms", "met"),
    [("llama-2-7b", 5.15, True), ("llama-2-7b", 5.3, False), ("llama-3-8b", 5.55, True), ("llama-3-8b", 5.7, False)],
)
def test_time_per_token_has_a_limit_for_each_model(model: str, ms: float, met: bool) -> None:
    (found,) = by_id(claims_gpu.of_single([result(row("tenfold", 1, 1024, ms), model=f"shape:{model}")]))["F3"]
    assert (found.value, found.met, found.against) == (ms, met, "floor 4.50 ms")


def test_other_models_have_no_limit_and_are_no_claim() -> None:
    assert "F3" not in by_id(claims_gpu.of_single([result(row("tenfold", 1, 1024, 5), model="shape:qwen3-8b")]))


def test_the_limit_is_of_one_kind_of_gpu() -> None:
    other = result(row("tenfold", 1, 1024, 4.0))
    other.machine = MACHINE | {"hardware": "NVIDIA H200"}
    assert "F3" not in by_id(claims_gpu.of_single([other]))


def test_prefill_is_a_share_of_the_matrix_ceiling() -> None:
    work = model_sizes("shape:llama-2-7b", "cuda").prefill_flops(1, 8192)
    seconds = work / (0.5 * 790e12)
    prefill = Row("tenfold", 1, 8192, 1, [], [seconds])
    (found,) = by_id(claims_gpu.of_single([result(prefill)]))["F6"]
    assert (found.value, found.met) == (pytest.approx(50, rel=1e-3), False)


def kernel(op: str, arm: str, us: float, nbytes: float = 0, batch: int = 1, shape: str = "a", **more: object) -> dict:
    return {"op": op, "shape": shape, "batch": batch, "arm": arm, "microseconds": us, "bytes": nbytes, **more}


def test_linears_count_at_their_worst() -> None:
    rows = [
        kernel("linear", "stream", 10.0, 28e6),  # 2,800 GB/s
        kernel("linear", "cublas", 15.0, 28e6),
        kernel("linear", "stream", 20.0, 42e6, batch=8),
        kernel("linear", "cublas", 15.0, 42e6, batch=8),  # the library is what runs: 2,800 GB/s
        kernel("linear", "stream", 10.0, 24e6, batch=4),  # 2,400 GB/s
        kernel("linear", "stream", 99.0, 24e6, batch=128),  # not a decode
    ]
    del rows[0]["op"]  # a linear unless it says otherwise
    traffic, speed = claims_gpu.of_kernels(rows, 3000.0, MACHINE, "tenfold tune")
    assert (traffic.id, traffic.value, traffic.met) == ("F4", 80, False)
    assert traffic.spread == (80, pytest.approx(93.33, rel=1e-3))
    assert "a at 4 (80 %)" in traffic.note
    assert (speed.value, speed.met, speed.spread) == (1.0, True, (1.0, 1.5))
    assert "wins at 1 of 2" in speed.note


def test_attention_counts_our_arm_at_32k_only() -> None:
    rows = [
        kernel("attention", "splits", 100.0, 270e6, context=32768),
        kernel("attention", "flash-attn", 50.0, 270e6, context=32768),
        kernel("attention", "splits", 100.0, 100e6, context=1024),
        kernel("attention", "splits", 100.0, 200e6, batch=8, context=32768),
    ]
    one, eight = claims_gpu.of_kernels(rows, 3000.0, MACHINE, "tenfold tune")
    assert (one.id, one.value, one.met) == ("F5", 90, True)
    assert (eight.value, eight.met) == (pytest.approx(66.67, rel=1e-3), False)


def test_uneven_contexts_against_splits_that_are_the_same_for_all() -> None:
    names = ("decode:4x3:even", "decode:8x1:even", "decode:4x3:s4:global", "decode:8x1:s8:cluster", "triton")
    rows = [kernel("uneven", arm, us, 60e6, batch=32, context=8700) for arm, us in zip(names, (25.0, 20, 40, 50, 10))]
    (found,) = claims_gpu.of_kernels(rows, 4000.0, MACHINE, "tenfold tune")
    assert (found.id, found.value, found.met, found.against) == ("F5", 2.0, True, "decode:4x3:s4:global")
    assert "decode:8x1:even 20.0 us, 75 % of a copy" in found.note
    assert claims_gpu.of_kernels(rows[2:], 4000.0, MACHINE, "tenfold tune") == []


def test_attention_of_a_prefill_against_the_fastest_library() -> None:
    rows = [kernel("prefill", arm, us, context=8192) for arm, us in (("ours", 900.0), ("cudnn", 990.0), ("sdpa", 1500))]
    (found,) = claims_gpu.of_kernels(rows, 3000.0, MACHINE, "tenfold tune")
    assert (found.id, found.value, found.against) == ("F6", 1.1, "cudnn")
    slower = [kernel("prefill", "x", 1e3, context=8192), *rows[1:]]
    (other,) = claims_gpu.of_kernels(slower, 1.0, MACHINE, "c")
    assert (other.value, other.met) == (0.99, False)  # the library's is not ours


def test_notes_say_what_the_rules_reach() -> None:
    linears, attention = pytest.importorskip("tenfold.ops.gpu.arms"), pytest.importorskip("tenfold.ops.gpu.attending")
    shape = "linear+norm+silu 28672 x 4096"
    work = linears.Work(28672, 4096, "dense", linears.Use(norm=True, act="silu"), 1)
    rule = linears.rule(work, 132)
    assert claims_gpu.rule_of(kernel("linear", "x", 1.0, shape=shape), 132) == rule
    rows = [kernel("linear", arm, us, 28e6, shape=shape) for arm, us in ((rule, 12.0), ("ring", 10.0), ("cublas", 11))]
    heads = "32/8 heads of 128"
    spec = AttentionSpec(32, 8, 128, 128**-0.5)
    arm = attention.rule(attention.Reading(spec, 1, 32768, 16), 132)
    times = {arm.replace("decode:", "decode:lazy:"): 100.0, arm.replace("decode:", "decode:unified:"): 90.0}
    rows += [kernel("attention", name, us, 270e6, shape=heads, context=32768) for name, us in times.items()]
    rows.append(kernel("attention", "triton", 90.0, 270e6, 8, heads, context=32768))
    traffic, speed, one, eight = claims_gpu.of_kernels(rows, 3000.0, MACHINE, "tenfold tune")
    assert f"by the rule, where nothing was measured, from 78 % ({shape} at 1, {rule}; timed at 1 of 1)" in traffic.note
    assert "cuBLAS is one of the arms, so less than 1 cannot be: our own alone reach 1.1x at least" in speed.note
    assert f"by the rule from 0.92x ({shape} at 1, {rule}; timed at 1 of 1)" in speed.note
    assert (speed.value, speed.met) == (1.1, True)
    assert "by the rule decode:lazy:" in one.note
    assert "100.0 us, 90 %" in one.note
    assert "the rule's, decode:" in eight.note
    assert "was not timed" in eight.note
    on_another = claims_gpu.of_kernels(rows, 3000.0, MACHINE | {"hardware": "another GPU"}, "tenfold tune")
    assert not any("by the rule" in made.note for made in on_another)


def ablation() -> arms.Result:
    def of(name: str, batch: int, off: list[float], on: list[float]) -> arms.Row:
        return arms.Row("weights", name, {}, {"weights": name.split()[0]}, batch, 1024, off, on)

    rows = [
        of("int4 over bfloat16", 1, [5.0, 5.0, 5.2], [1.9, 2.0, 2.0]),
        of("int4 over bfloat16", 8, [6.0], [6.0]),
        of("fp8 over bfloat16", 64, [13.0], [10.0]),
    ]
    return arms.Result("shape:llama-2-7b", MACHINE, "tenfold bench arms", rows, [("CUDA graphs", "no setting")])


def test_fewer_bits_count_at_the_batch_they_are_for() -> None:
    four, eight = claims_gpu.of_arms(ablation())
    assert (four.value, four.met, four.command) == (2.6, True, "tenfold bench arms")
    assert (eight.value, eight.met) == (1.3, False)


def folder_of_results(folder: Path) -> Path:
    rows = [row(name, b, c, t) for name, t in (("tenfold", 5.0), ("vllm", 6.0)) for b in (1, 8) for c in (128, 1024)]
    (folder / "single.json").write_text(json.dumps(result(*rows).plain()))
    (folder / "arms.json").write_text(json.dumps(ablation().plain()))
    kernels = {
        "suite": "kernels",
        "rows": [kernel("linear", "stream", 10.0, 28e6)],
        "copy_gbs": 3e3,
        "machine": MACHINE,
    }
    (folder / "kernels.json").write_text(json.dumps(kernels))
    (folder / "claims.json").write_text("[]")
    runs = [{"rate": r, "output_tokens": 9, "seconds": 1.0} for r in (1.0, 2.0)]
    times = {name: {"p50": 1.0, "p99": None} for name in ("ttft", "tpot")}
    serving = {"suite": "serving", "model": "m", "machine": MACHINE, "lines": ["2 requests/s"]}
    serving["runs"] = [run | {"percentiles": times} for run in runs]
    (folder / "serving.json").write_text(json.dumps(serving))
    return folder


def test_a_folder_of_results_becomes_claims(tmp_path: Path) -> None:
    found = claims_gpu.of_folder(folder_of_results(tmp_path))
    assert list(dict.fromkeys(c.id for c in found)) == ["F2", "F3", "F7", "F4"]
    assert all(c.command and c.hardware == MACHINE["hardware"] for c in found)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("single.json", "{", r"single\.json is no JSON"),
        ("single.json", "[" * 100_000, r"single\.json is no JSON"),
        (
            "kernels.json",
            '{"suite": "kernels"}',
            r"kernels\.json is no complete .* .'rows' is missing",
        ),
        ("single.json", '{"suite": "single", "rows": [{"engine": 1}]}', r"single\.json is no complete result"),
        ("arms.json", '{"suite": "arms", "rows": 3}', r"arms\.json is no complete result of suite 'arms'"),
    ],
)
def test_a_file_that_is_not_complete_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (folder_of_results(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        claims_gpu.of_folder(tmp_path)


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    (tmp_path / "claims.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds no raw results; allowed: .*--out"):
        claims_gpu.of_folder(tmp_path)


def test_runs_with_fewer_bits_are_no_answer_for_the_model_as_it_is(tmp_path: Path) -> None:
    folder = folder_of_results(tmp_path)
    whole = [c.id for c in claims_gpu.of_folder(folder)]
    data = json.loads((folder / "single.json").read_text())
    data["settings"] = {"tenfold": {"weights": "int4"}}
    (folder / "single.json").write_text(json.dumps(data))
    left = [c.id for c in claims_gpu.of_folder(folder)]
    assert left == [id for id in whole if id not in ("F2", "F3")]


def test_a_folder_of_results_becomes_tables(tmp_path: Path) -> None:
    text = report.tables(folder_of_results(tmp_path))
    assert "| 1024 | 8 | 4.50 | 5.00 (90 %) | 6.00 (75 %) | 20.0 | 20.0 |" in text
    assert "| weights: fp8 over bfloat16 | default | weights=fp8 | 64 | 1024 | 13.000 | 10.000 | 1.30x |" in text
    assert "Not measured: CUDA graphs, no setting." in text
    assert "2 requests/s" in text
    assert "copies run at 3000 GB/s" in text


def test_a_document_is_filled_with_the_tables_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    folder_of_results(tmp_path / "gpu")
    text = "a\n<!-- results:gpu -->STALE<!-- /results -->\nb\n<!-- results:none --><!-- /results -->\n"
    filled = report.fill_results(text, tmp_path)
    assert "STALE" not in filled
    assert "### shape:llama-2-7b" in filled
    assert filled.endswith("b\n<!-- results:none -->\nNot measured yet.\n<!-- /results -->\n")
    assert report.fill_results(filled, tmp_path) == filled


def test_charts_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = folder_of_results(tmp_path)
    work = throughput.Work(2, parse("8"), parse("4"))
    offline = throughput.Result("m", MACHINE, work, {"tenfold": [1.0, 2.0], "vllm": [2.0, 2.5]}, [16, 16], [8, 8])
    (folder / "throughput.json").write_text(json.dumps(offline.plain()))
    made = report.charts(folder)
    assert [path.name for path in made] == [
        *("tpot-context-llama-2-7b.png", "tpot-batch-llama-2-7b.png"),
        *("arms.png", "serving.png", "throughput.png"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_without_matplotlib_charts_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'tenfold\[bench\]'"):
        plots.tpot([result(row("tenfold", 1, 128, 5.0))], tmp_path / "x.png")
