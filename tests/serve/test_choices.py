"""What `tenfold explain` prints for a GPU, from a table that was recorded."""

from types import SimpleNamespace

import pytest
import torch

from tenfold.engine.memory import DoesNotFit
from tenfold.ops.choose import Table
from tenfold.ops.kernels import AttentionSpec
from tenfold.serve.cli import choices

arms = pytest.importorskip("tenfold.ops.gpu.arms")
attending = pytest.importorskip("tenfold.ops.gpu.attending")
expert_arms = pytest.importorskip("tenfold.ops.gpu.expert_arms")
green = pytest.importorskip("tenfold.ops.gpu.green")
tuning = pytest.importorskip("tenfold.ops.gpu.tune")


def test_the_table_and_charts_of_a_gpu(tmp_path, capsys):
    table = Table("gpu", "1", tmp_path / "t.json")
    work = arms.Work(6144, 4096, "dense", arms.Use(norm=True), 1)
    table.record(arms.key(work, 132), {"cublas": 22.0, "gemv:8x512": 18.0, "wide:8x4x1x1:s2": 30.0})
    choices.show_gpu([work], SimpleNamespace(table=table, sms=132, gemm="auto"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["OPERATION", "WEIGHT", "FORMAT", "BATCH", "SMS", "RUNS"]
    assert "linear+norm" in lines[1]
    assert "gemv:8x512" in lines[1]
    assert "cublas takes 22.0 us" in lines[1]
    assert lines[2].rstrip().endswith("rule")
    assert any(line.startswith("linear+norm 6144 x 4096 bfloat16; M1 -, M2 1") for line in lines)


def test_the_table_of_attention(tmp_path, capsys):
    table, spec = Table("gpu", "1", tmp_path / "t.json"), AttentionSpec(32, 8, 128, 0.1)
    every = attending.readings([attending.Layer(spec)], 16, torch.bfloat16, 8192)
    at = attending.Reading(spec, 8, 4096, 16)
    table.record(attending.key(at, 132), {attending.rule(at, 132): 40.0, "decode:4x3:s3:global": 20.0})
    table.record(tuning.copy_key(132), {"copy": 1000.0})
    table.record(attending.softmax_key(at, 132), {"lazy": 21.0, "online": 19.0})
    choices.show_attention(every, attending.Attending("cpu", 132, table))
    head, row, *rest = capsys.readouterr().out.splitlines()[1:]
    assert head.split()[:4] == ["ATTENTION", "TOKENS", "CONTEXT", "PAGE"]
    assert row.split()[:9] == ["attention", "32/8", "heads", "of", "128", "8", "4096", "16", "132"]
    assert "decode:4x3:s3:global" in row
    assert f"{attending.rule(at, 132)} takes 40.0 us" in row
    assert "132%" in row  # 54 MiB in 20 us are more than a copy of 1 GiB in 1000 us can be
    chunks, (softmax, *others) = rest[:5], rest[5:]
    assert all(line.startswith("prefill attention") for line in chunks)
    assert softmax.startswith("softmax of attention 32/8 heads of 128")
    assert "online" in softmax
    assert "lazy takes 21.0 us" in softmax
    assert len(others) == 5


def measuring(count, *said, total=None):
    """A part that is expected to measure `count` things and measures those it says."""

    def run(progress):
        for done, what in enumerate(said):
            progress(done, total or len(said), what)

    return choices.Part(count, run)


def test_one_count_goes_over_everything_that_is_measured(capsys):
    choices.measure_parts([measuring(2, "a", "b"), measuring(0), measuring(9, "c", total=3), measuring(1, "d")])
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["1/12  a", "2/12  b", "3/6  c", "6/6  d"]  # what is not measured after all counts as done


def test_a_terminal_shows_one_bar_with_what_is_measured_and_what_is_left(capsys, monkeypatch):
    from tenfold.serve.cli import terminal

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(terminal, "PATIENCE", -1.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def broken(progress):
        progress(0, 2, "linear [128 x 64]")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choices.measure_parts([measuring(1, "attention"), choices.Part(2, broken)])
    text = capsys.readouterr().err
    assert "measuring" in text
    assert "1/3" in text
    assert "linear [128 x 64]" in text
    assert "-:--:--" in text  # time left, of which nothing is known yet
    assert text.endswith("\x1b[2K")  # an interruption leaves no bar


def test_tuning_a_gpu_measures_every_part_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    """Device and timer are made up."""
    monkeypatch.setattr(choices.tune_steps, "tune", lambda config, progress, parts: progress(0, 1, "steps"))
    kernels, opened = made_up(tmp_path, monkeypatch, max_model_len=256)
    choices.tune(opened.config)
    said = capsys.readouterr().err.splitlines()
    total = int(said[0].partition("  ")[0].partition("/")[2])
    assert len(said) == len(kernels.arms.table) + 1  # a row each but the copy, steps, and where it was saved
    assert total > len(said)  # steps of other sizes were expected
    assert any("softmax of attention 4/2 heads of 16" in line for line in said)
    choices.tune(opened.config)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_parts_of_a_gpu_that_lanes_may_have_are_tuned_too(tmp_path, capsys, monkeypatch):
    """Device, timer and parts are made up."""
    lanes = []
    monkeypatch.setattr(choices.tune_steps, "tune", lambda config, progress, parts: lanes.extend(parts))
    monkeypatch.setattr(green, "unavailable", lambda: "")
    monkeypatch.setattr(green, "split", lambda device, n: [green.Part(sms, None) for sms in (n, 132 - n)])
    kernels, opened = made_up(tmp_path, monkeypatch, max_model_len=256, schedule="phases", border="96")
    table, trace = kernels.arms.table, choices.gpu_trace(opened)
    readings = choices.gpu_readings(opened, trace)
    choices.tune(opened.config)
    assert [lane.sms for lane in lanes] == [36]  # steps of answers; prompts are no steps of these
    text = capsys.readouterr().out
    assert "On 36 of 132 multiprocessors, a lane of answers:" in text
    assert "On 96 of 132 multiprocessors, a lane of prompts:" in text
    measured = {sms: {r.tokens for r in readings if table.times(attending.key(r, sms))} for sms in (132, 96, 36)}
    assert measured == {132: {0, 64, 256}, 96: {64, 256}, 36: {0}}
    assert [bool(table.times(arms.key(trace.works[0], sms))) for sms in (132, 96, 36)] == [True, False, True]
    monkeypatch.setattr(choices, "show_phases", lambda opened, kernels: None)  # asks a real GPU for its memory
    choices.explain(opened.config)
    assert "On 36 of 132 multiprocessors, a lane of answers:" in capsys.readouterr().out


def test_a_gpu_that_cannot_be_divided_is_tuned_as_a_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choices.tune_steps, "tune", lambda config, progress, parts: None)
    monkeypatch.setattr(green, "unavailable", lambda: "the driver is too old")
    kernels, opened = made_up(tmp_path, monkeypatch, max_model_len=256, schedule="phases")
    choices.tune(opened.config)
    assert "schedule is phases, but the driver is too old" in capsys.readouterr().err
    assert kernels.arms.table.times(arms.key(choices.gpu_trace(opened).works[0], 132))


def test_kernels_without_choices_are_refused():
    with pytest.raises(ValueError, match="one way"):
        choices.refuse_others(SimpleNamespace(name="torch", reason="there is no GPU"), "gpu")


class FakeTimer:
    """Runs nothing; the first arm is the fastest."""

    def __init__(self, device, part=None):
        pass

    def copies(self, nbytes):
        return 1

    def memory_microseconds(self):
        return {"copy": 700.0}

    def measure(self, arms, copies, reference=None, farthest=0.0):
        return {name: 1.0 + i for i, name in enumerate(arms)}


def made_up(tmp_path, monkeypatch, model="shape:tiny", **settings):
    """Kernels and a model, which fits, as on a Hopper GPU without a table."""
    table, device = Table("gpu", "1", tmp_path / "t"), torch.device("cpu")

    def on(sms):
        linear, experts = arms.Arms(device, torch.bfloat16, sms, table), expert_arms.ExpertArms(table, sms)
        attention = attending.Attending(device, sms, table)
        own = {"arms": linear, "expert_arms": experts, "attending": attention}
        return SimpleNamespace(name="gpu", reason="", device=device, sms=sms, on=on, **own)

    kernels = on(132)
    opened = choices.Opened(choices.EngineConfig(model, device="cpu", **settings))
    monkeypatch.setattr(opened, "device", torch.device("cuda"))
    monkeypatch.setattr(choices, "require", lambda config: None)
    monkeypatch.setattr(choices, "Opened", lambda config: opened)
    monkeypatch.setattr(choices, "make_kernels", lambda *given: kernels)
    monkeypatch.setattr("tenfold.ops.gpu.timing.GpuTimer", FakeTimer)
    return kernels, opened


def test_a_model_is_explained_on_its_gpu(tmp_path, capsys, monkeypatch):
    """What runs is what a Hopper GPU without a table would run."""
    kernels, opened = made_up(tmp_path, monkeypatch)
    table = kernels.arms.table
    table.ignored = f"{table.path} is ignored, it was measured with other kernels; measure again"
    choices.explain(opened.config)
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"Nothing above comes from measurements: {table.ignored}."
    assert "linear+norm+silu     256 x 64" in text
    assert "stream:" in text
    assert "attention 4/2 heads of 16 " in text
    assert "triton" in text  # heads of 16 are too small for our own kernel
    assert "prefill attention 4/2 heads of 16 " in text


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("shape:deepseek-v2-lite", {}),
        ("shape:llama-3.2-1b", {"kv_cache": "int4"}),
        ("shape:llama-3.2-1b", {"kv_dtype": "float16"}),
    ],
)
def test_attention_that_runs_in_one_way_is_not_listed(tmp_path, capsys, monkeypatch, model, settings):
    _, opened = made_up(tmp_path, monkeypatch, model, **settings)
    choices.explain(opened.config)
    text = capsys.readouterr().out
    assert "runs in one way; it is not listed." in text
    assert "attention 16/1 heads of 576" not in text
    assert "attention 32/8 heads of 64" not in text


def test_a_model_that_does_not_fit_is_not_tuned(tmp_path, monkeypatch):
    _, opened = made_up(tmp_path, monkeypatch)

    def refuse(config):
        raise DoesNotFit("does not fit into memory")

    monkeypatch.setattr(choices, "require", refuse)
    monkeypatch.setattr(choices, "measure_parts", lambda parts: pytest.fail("something was measured"))
    with pytest.raises(DoesNotFit):
        choices.tune(opened.config)


def test_what_is_to_be_tuned_must_fit(monkeypatch):
    monkeypatch.setattr("tenfold.engine.opened.free_memory", lambda device: 1 << 20)
    with pytest.raises(DoesNotFit, match="does not fit into memory: weights"):
        choices.require(choices.EngineConfig("shape:tiny", device="cpu"))


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_made(monkeypatch):
    monkeypatch.setattr("tenfold.engine.opened.free_memory", lambda device: 1 << 20)
    monkeypatch.setattr(choices, "refuse_others", lambda kernels, name: None)
    monkeypatch.setattr(choices, "build_model", lambda *given: pytest.fail("weights were read"))
    with pytest.raises(DoesNotFit, match="does not fit into memory: weights"):
        choices.explain(choices.EngineConfig("shape:tiny", device="cpu"))
