"""The grid of batches and contexts: what is measured, what is skipped and why, and the arithmetic of the result."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tenfold.bench import gpu, report, single
from tenfold.bench.command import settings
from tenfold.bench.engines import NotInstalled, Prompts, Setup, Timing
from tenfold.bench.fit import RESERVE, Point, need, points_of, sessions
from tenfold.bench.floor import Sizes, floor_ms, model_sizes

SIZES = Sizes(weights=14 << 30, streamed=13 << 30, kv_token=1 << 19, flops_token=0)


class Fake:
    """An engine whose time is `prefill` seconds and `step` for every further token; it remembers what it ran."""

    def __init__(self, step: float, prefill: float = 0.5, capacity: int | None = None, fails: int = 0) -> None:
        self.step, self.prefill, self.capacity, self.fails = step, prefill, capacity, fails
        self.runs: list[tuple[int, int, int]] = []
        self.prompts: list[list[int]] = []

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        assert isinstance(tokens, int)
        if len(prompts[0]) == self.fails:
            raise MemoryError("out of memory\nat this size")
        self.runs.append((len(prompts), len(prompts[0]), tokens))
        self.prompts += [list(p) for p in prompts]
        return Timing(self.prefill, self.step * (tokens - 1), [[0] * tokens] * len(prompts))


def measured(points: Sequence[Point], rounds: int = 3, **engines: Fake) -> tuple[single.Result, list[str]]:
    result, lines = single.Result("m"), []
    single.measure(engines, points, rounds, result, lines.append, vocabulary=50)
    return result, lines


def test_tpot_is_the_difference_of_runs_over_the_tokens_between() -> None:
    engine = Fake(step=0.004)
    result, lines = measured(single.grid([1, 2], [8], [8, 16], 129), tenfold=engine)
    assert [(r.batch, r.context, r.tokens) for r in result.rows] == [(1, 8, 129), (2, 8, 129), (1, 16, 1)]
    assert result.rows[0].tpot == pytest.approx(4.0)
    assert result.rows[0].prefill == pytest.approx(500)
    assert result.rows[2].tpot is None
    assert [len(r.short) for r in result.rows] == [3, 3, 3]
    assert "TPOT" in lines[0]
    assert "TPOT" not in lines[2]


def test_engines_take_turns_and_no_prompt_comes_twice() -> None:
    order: list[str] = []

    class Named(Fake):
        def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
            order.append("a" if self.step == 1 else "b")
            return super().generate(prompts, tokens)

    a, b = Named(1), Named(2)
    result, _ = measured([Point(2, 40, 3)], a=a, b=b)
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"
    assert [row.beside for row in result.rows] == [["b"], ["a"]]
    assert a.prompts == b.prompts
    assert len({tuple(p) for p in a.prompts}) == len(a.prompts)


def test_prompts_of_several_lengths_are_one_point() -> None:
    (point,) = points_of("2x40+3x8", 3)
    assert point == Point(5, 40, 3, (40, 40, 8, 8, 8))
    assert points_of("2x8+1x8", 3) == [Point(3, 8, 3)]
    engine = Fake(1)
    result, lines = measured([point], a=engine)
    (row,) = result.rows
    assert (row.batch, row.context, row.lengths) == (5, 40, [40, 40, 8, 8, 8])
    assert {len(prompt) for prompt in engine.prompts} == {40, 8}
    assert "5 x up to 40" in lines[-1]
    assert single.loaded(result.plain()).rows == [row]
    small, _ = measured([point], a=Fake(1, capacity=118))
    assert small.skipped
    assert "| up to 40 | 5 |" in report.grid_table([result])


def test_what_does_not_fit_is_skipped_with_a_line_and_the_rest_goes_on() -> None:
    points = [Point(1, 8, 3), Point(4, 8, 3), Point(1, 16, 3)]
    result, lines = measured(points, small=Fake(1, capacity=20), frail=Fake(1, fails=16))
    assert {(s.engine, s.batch, s.context) for s in result.skipped} == {("small", 4, 8), ("frail", 1, 16)}
    assert any("holds 20 tokens" in line for line in lines)
    assert any("MemoryError: out of memory at this size" in line for line in lines)
    assert [(r.engine, r.batch, r.context) for r in result.rows] == [
        *(("small", 1, 8), ("frail", 1, 8)),
        *(("frail", 4, 8), ("small", 1, 16)),
    ]


def test_after_the_deadline_nothing_is_begun() -> None:
    engine, result = Fake(1), single.Result("m")
    single.measure({"a": engine}, [Point(1, 8, 3)], 1, result, lambda _: None, deadline=0.0)
    assert not engine.runs
    assert result.skipped[0].why == "the time was up"


def test_a_slow_point_gets_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(single.time, "monotonic", lambda: float(next(clock)))
    result, lines = single.Result("m"), []
    engines = {"a": Fake(1), "b": Fake(1)}
    single.measure(engines, [Point(1, 8, 3)], 5, result, lines.append, vocabulary=50, patience=15)
    assert [len(row.long) for row in result.rows] == [2, 2]
    assert "2 of 5 rounds" in lines[0]


def test_time_inside_the_long_runs_checks_the_difference() -> None:
    result, lines = measured([Point(1, 8, 129)], tenfold=Fake(0.004))
    assert result.rows[0].inside == pytest.approx(4.0)
    assert "inside 4.000" in lines[0]
    result.rows[0].first.clear()
    assert result.rows[0].inside is None


def test_eager_peers_make_fewer_tokens_and_say_so() -> None:
    peer = Fake(0.07)
    result, _ = measured([Point(1, 8, 129)], **{"hf-generate": peer})
    assert result.rows[0].tokens == 33
    assert result.rows[0].tpot == pytest.approx(70)


def test_compiled_transformers_run_short_contexts_only() -> None:
    result, _ = measured([Point(1, 1024, 3), Point(1, 8192, 3), Point(1, 64)], **{"hf-compiled": Fake(1)})
    assert [r.context for r in result.rows] == [1024]
    assert len(result.skipped) == 2


def test_a_result_survives_its_file() -> None:
    result, _ = measured([Point(1, 8, 3)], tenfold=Fake(1, capacity=100), small=Fake(1, capacity=1))
    result.floors, result.sizes = [(1, 8, 0.25)], SIZES
    again = single.loaded(json.loads(json.dumps(result.plain())))
    assert again == result
    assert again.floor(1, 8) == 0.25
    assert again.row("tenfold", 1, 8) == result.rows[0]
    assert again.row("tenfold", 2, 8) is None


def test_floor_of_the_reference_table() -> None:
    """Llama-2-7B at 3,028 GB/s: the values the GPU tables are compared with."""
    sizes = model_sizes("shape:llama-2-7b", "cuda")
    for batch, context, wanted in ((1, 128, 4.4), (1, 1024, 4.6), (4, 1024, 5.1), (8, 1024, 5.8), (8, 8192, 15.7)):
        assert floor_ms(sizes, batch, context, 3028) == pytest.approx(wanted, abs=0.06)
    assert model_sizes("shape:llama-3-8b", "cuda").kv_token == 131072
    tied = model_sizes("shape:llama-3.2-1b", "cuda")
    assert tied.streamed == tied.weights  # its table is the head, too
    assert model_sizes("shape:tiny", "cpu").weights == 2 * model_sizes("shape:tiny", "cuda").weights


def test_prefill_work_of_a_known_model() -> None:
    sizes = model_sizes("shape:llama-2-7b", "cuda")
    assert sizes.flops_token == pytest.approx(2 * 6.476e9, rel=1e-3)  # without table and head
    attention = sizes.prefill_flops(1, 8192) - 8192 * sizes.flops_token
    assert attention == 2 * 2 * 32 * 4096 * 8192 * 8192 // 2


def test_what_sees_is_not_read_by_steps_of_text() -> None:
    sees, text = (model_sizes(f"shape:{name}", "cuda") for name in ("llava-onevision-7b", "qwen2.5-7b"))
    assert sees.weights - text.weights == pytest.approx(2 * 0.415e9, rel=0.01)
    assert sees.streamed == pytest.approx(text.streamed, rel=1e-3)
    assert sees.flops_token == text.flops_token


def test_prompts_of_a_model_that_sees_have_no_marks_of_pictures() -> None:
    assert model_sizes("shape:qwen2.5-7b").vocab == 152064
    assert model_sizes("shape:llava-onevision-7b").vocab == 151646  # the mark itself is the next


def test_engines_share_a_gpu_where_they_fit() -> None:
    points = [Point(1, 1024, 129), Point(8, 8192, 129), Point(8, 32768, 129)]
    free = 78 << 30
    found, missing = sessions(["tenfold", "hf-generate"], points, SIZES, free)
    assert [(s.engines, s.points) for s in found] == [
        (("tenfold", "hf-generate"), (points[0],)),
        (("tenfold",), (points[1],)),
        (("hf-generate",), (points[1],)),
    ]
    assert missing == [("tenfold", points[2]), ("hf-generate", points[2])]
    assert need(["tenfold"], points[0], SIZES) == SIZES.weights + RESERVE + points[0].cached * SIZES.kv_token
    two_peers, one = (need(names, points[0], SIZES) for names in (["hf", "hf-compiled"], ["hf"]))
    assert two_peers == one  # one copy of the weights


def test_a_run_from_a_name_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "copy_bandwidth", lambda device: 100.0)
    monkeypatch.setattr(single, "matmul_ceiling", lambda device, size: 1.0)
    points = (Point(2, 30, 4), Point(1, 2100))
    saved: list[int] = []
    plan = single.Plan("shape:tiny@layers=1", ("tenfold",), points, rounds=1, threads=1)
    result = single.run(plan, lambda _: None, lambda r: saved.append(len(r.rows)))
    assert saved == [1, 2]
    assert result.model == "shape:tiny@layers=1,positions=2101"
    assert result.floor(2, 30) == pytest.approx(1e3 * result.sizes.decode_bytes(2, 30) / 100e9)  # type: ignore[union-attr]
    assert result.machine["hardware"]


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "machine", lambda device: {"hardware": device})
    monkeypatch.setattr(single, "copy_bandwidth", lambda device: 3000.0)
    monkeypatch.setattr(single, "matmul_ceiling", lambda device, size: 790.0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (78 << 30, 80 << 30))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)


def test_on_a_gpu_engines_share_it_where_they_fit_and_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, int, int]] = []

    def make(name: str, setup: Setup) -> Fake:
        built.append((name, setup.batch, setup.kv_tokens))
        return Fake(0.004, capacity=setup.kv_tokens or None)

    class Missing:
        def __init__(self, *_: object) -> None:
            error = RuntimeError("vllm: no such module")
            error.add_note("the end of its log")
            raise error

    monkeypatch.setattr(single, "make_engine", make)
    monkeypatch.setattr(single, "Worker", Missing)
    pretend_gpu(monkeypatch)
    points = tuple(single.grid([1, 8], [1024, 8192, 32768], [], 129))
    plan = single.Plan("shape:llama-2-7b", ("tenfold", "hf-generate", "vllm"), points, 1, "cuda")
    lines: list[str] = []
    result = single.run(plan, lines.append)
    assert lines.count("the end of its log") == 1
    beside = {(r.batch, r.context) for r in result.rows if r.engine == "tenfold" and r.beside == ["hf-generate"]}
    alone = {(r.batch, r.context) for r in result.rows if r.engine == "tenfold" and not r.beside}
    assert beside == {(1, 1024), (8, 1024), (1, 8192)}
    assert alone == {(1, 32768), (8, 8192)}
    assert [name for name, _, _ in built] == ["tenfold", "hf-generate", "tenfold", "hf-generate"]
    assert all((tokens > 0) == (name == "tenfold") for name, _, tokens in built)
    missing = {(s.engine, s.batch, s.context) for s in result.skipped}
    assert missing >= {("tenfold", 8, 32768), ("hf-generate", 8, 32768), ("vllm", 1, 1024)}
    assert any("process of its own" in note for note in result.notes)
    assert any("33 tokens" in note for note in result.notes)


def test_peers_that_are_not_installed_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in one of its own: a line each, and the others are measured."""

    def make(name: str, setup: Setup) -> Fake:
        if name != "tenfold":
            raise NotInstalled(f"{name} is not installed here.")
        return Fake(0.004)

    def missing(name: str, *_: object) -> None:
        make(name, Setup("shape:tiny"))

    monkeypatch.setattr(single, "make_engine", make)
    monkeypatch.setattr(single, "Worker", missing)
    pretend_gpu(monkeypatch)
    points = tuple(single.grid([1, 2], [128], [], 129))
    lines: list[str] = []
    result = single.run(
        single.Plan("shape:llama-2-7b", ("tenfold", "hf-generate", "vllm"), points, 1, "cuda"), lines.append
    )
    assert [row.engine for row in result.rows] == ["tenfold"] * 2
    assert [(skip.engine, skip.batch, skip.why) for skip in result.skipped] == [
        (name, batch, f"{name} is not installed here.") for name in ("hf-generate", "vllm") for batch in (1, 2)
    ]
    assert sum("not installed" in line for line in lines) == 2


def test_names_of_peers_mean_engines() -> None:
    assert single.engines_of([]) == ["tenfold"]
    assert single.engines_of(["hf", "hf-compiled", "vllm"]) == ["tenfold", "hf-generate", "hf-compiled", "vllm"]
    assert single.engines_of(["hf-generate", "hf-loop"]) == ["tenfold", "hf-generate", "hf"]
    with pytest.raises(ValueError, match="hf-compiled"):
        single.engines_of(["tensorrt"])


def test_both_forms_of_transformers_take_turns_with_ours_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "make_engine", lambda name, setup: Fake(0.004))
    pretend_gpu(monkeypatch)
    points = (Point(1, 1024, 129), Point(1, 8192, 129))
    plan = single.Plan("shape:llama-2-7b", tuple(single.engines_of(["hf"])), points, 1, "cuda")
    result = single.run(plan, lambda _: None)
    assert [(row.engine, row.context, row.beside) for row in result.rows] == [
        ("tenfold", 1024, ["hf-generate", "hf-compiled"]),
        ("hf-generate", 1024, ["tenfold", "hf-compiled"]),
        ("hf-compiled", 1024, ["tenfold", "hf-generate"]),
        ("tenfold", 8192, ["hf-generate"]),
        ("hf-generate", 8192, ["tenfold"]),
    ]
    assert [(skip.engine, skip.context) for skip in result.skipped] == [("hf-compiled", 8192)]


# The driver for a GPU machine


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[tuple[str, str]] = []

    def run_part(job: gpu.Job) -> str:
        ended.append((job.part, job.model))
        if job.part == "hf":
            return "ended with status 1"
        result = single.Result(job.model, rows=[single.Row("tenfold", 1, 8, 3, [1.0], [0.5])])
        job.path.write_text(json.dumps(result.plain()))
        return ""

    monkeypatch.setattr(gpu, "run_part", run_part)
    failed = gpu.main(["--out", str(tmp_path), "--models", "shape:a,shape:b", "--parts", "hf:5,single"])
    assert failed == 2
    assert ended == [("hf", "shape:a"), ("hf", "shape:b"), ("single", "shape:a"), ("single", "shape:b")]
    shown = capsys.readouterr().out
    assert shown.count("TPOT  250.000 ms") == 2


def test_a_part_past_its_limit_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sleep")  # `sleep -m ...` fails at once
    job = gpu.Job("single", "shape:tiny", str(tmp_path), 0.5, {})
    assert "status" in gpu.run_part(job)
    command = tmp_path / "hang"
    command.write_text("#!/bin/sh\nsleep 60\n")
    command.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(command))
    assert gpu.run_part(job) == "stopped after 0 s"


def test_settings_of_a_command_line() -> None:
    assert settings(["lookahead=0", "weights=dense", "prefix_cache=False"]) == {
        "lookahead": 0,
        "weights": "dense",
        "prefix_cache": False,
    }
    with pytest.raises(ValueError, match="NAME=VALUE"):
        settings(["lookahead"])
    with pytest.raises(ValueError, match="no part"):
        gpu.parts_of("single,nothing", 1.0)
    assert gpu.parts_of("single,hf:30", 120.0) == [("single", 120.0), ("hf", 30.0)]


def test_the_driver_needs_nothing_but_the_engine(tmp_path: Path) -> None:
    """Where only what the engine imports is installed, it must start: web and command line packages are kept out."""
    import subprocess
    import sys

    script = (
        "import sys\n"
        "for name in ('fastapi', 'pydantic', 'llguidance', 'uvicorn', 'httptools', 'typer',\n"
        "             'prometheus_client', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from tenfold.bench import gpu\n"
        "from tenfold.bench.engines import Setup, make_engine\n"
        "print(len(make_engine('tenfold', Setup('shape:tiny', 1, 1, 64)).generate([[5]], 3).tokens[0]))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "3", found.stderr


def test_fewer_bits_make_a_lower_floor() -> None:
    whole, packed = (model_sizes("shape:llama-2-7b", "cuda", {"weights": w}) for w in ("auto", "int4"))
    assert 3.6 < whole.streamed / packed.streamed < 4  # a quarter, the scales, and a head of 8 bits
    assert whole.kv_token == packed.kv_token
