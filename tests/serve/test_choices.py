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


def test_kernels_without_choices_are_refused():
    with pytest.raises(ValueError, match="one way"):
        choices.refuse_others(SimpleNamespace(name="torch", reason="there is no GPU"), "gpu")


def test_a_model_is_explained_on_its_gpu(tmp_path, capsys, monkeypatch):
    """The device is made up; what runs is what a Hopper GPU without a table would run."""
    table = Table("gpu", "1", tmp_path / "t")
    linear = SimpleNamespace(table=table, sms=132, gemm="auto")
    kernels = SimpleNamespace(name="gpu", reason="", arms=linear, attending=attending.Attending("cpu", 132, table))
    opened = choices.Opened(choices.EngineConfig("shape:tiny", device="cpu"))
    monkeypatch.setattr(opened, "device", torch.device("cuda"))
    monkeypatch.setattr(choices, "Opened", lambda config: opened)
    monkeypatch.setattr(choices, "make_kernels", lambda *given: kernels)
    table.ignored = f"{table.path} is ignored, it was measured with other kernels; measure again"
    choices.explain(opened.config)
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"Nothing above comes from measurements: {table.ignored}."
    assert "linear+norm+silu     256 x 64" in text
    assert "stream:" in text
    assert "attention 4/2 heads of 16 " in text
    assert "triton" in text  # heads of 16 are too small for our own kernel
    assert "prefill attention 4/2 heads of 16 " in text


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_made(monkeypatch):
    monkeypatch.setattr("tenfold.engine.opened.free_memory", lambda device: 1 << 20)
    monkeypatch.setattr(choices, "refuse_others", lambda kernels, name: None)
    monkeypatch.setattr(choices, "build_model", lambda *given: pytest.fail("weights were read"))
    with pytest.raises(DoesNotFit, match="does not fit into memory: weights"):
        choices.explain(choices.EngineConfig("shape:tiny", device="cpu"))
