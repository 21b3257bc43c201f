"""Every example runs and prints what its docstring promises."""

import json
import os
import runpy
from pathlib import Path

import pytest

from tenfold import LLM, SamplingParams

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "offline.py": ["The capital of France is Paris", "[12 tokens, the first after"],
    "stream.py": ["urr"],
    "async_chat.py": ["Name three colours.\n  ", "steps for"],
    "embed.py": ["1.000  A cat", "My kitten"],
}


@pytest.mark.real_model
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name, smollm2_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, str(smollm2_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    for part in EXPECTED[name]:
        assert part in printed


def test_a_model_with_experts_is_trained_and_runs(tmp_path, capsys, monkeypatch):
    """On the sources of Python's library, for seconds: what it learns is not the point here."""
    texts = [path.read_text(errors="ignore") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("".join(texts[i::60]))
    names = sorted(path.name for path in tmp_path.glob("*.txt"))  # the first and the fifty-first are held out
    (tmp_path / "copy.txt").write_text((tmp_path / names[0]).read_text())
    run = runpy.run_path(str(EXAMPLES / "train_moe.py"))["main"]
    monkeypatch.setattr("sys.argv", ["train_moe.py", "prepare", "--out", str(tmp_path / "data"), str(tmp_path)])
    run()
    assert "train: 59 documents" in capsys.readouterr().out
    monkeypatch.setattr(
        "sys.argv", ["train_moe.py", "texts", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "to")]
    )
    run()
    judged = (tmp_path / "to" / "judge.txt").read_text()
    assert judged == (tmp_path / names[50]).read_text()  # the other one was trained on, too
    assert (tmp_path / "to" / "calibrate.txt").read_text() not in ("", judged)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    shape |= {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    shape |= {"shared_expert_intermediate_size": 32, "intermediate_size": 32}
    words = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "moe"), "--minutes", "0.05"]
    words += ["--batch", "2", "--length", "64", "--shape", json.dumps(shape)]
    monkeypatch.setattr("sys.argv", ["train_moe.py", *words])
    run()
    assert "perplexity of held-out text" in capsys.readouterr().out
    with LLM(str(tmp_path / "moe"), device="cpu") as llm:
        (done,) = llm.generate(["def "], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        assert done.usage.completion_tokens == 4


def test_too_little_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("little " * 100)
    run = runpy.run_path(str(EXAMPLES / "train_moe.py"))["main"]
    monkeypatch.setattr("sys.argv", ["train_moe.py", "prepare", "--out", str(tmp_path / "data"), str(tmp_path)])
    with pytest.raises(SystemExit, match="at least a million"):
        run()


def test_every_example_is_tested():
    own = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("server_")}  # those: tests/e2e
    assert own == {*EXPECTED, "train_moe.py", "train_vlm.py"}  # the last: tests/quantize/mbq
