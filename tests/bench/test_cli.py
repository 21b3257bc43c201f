"""`tenfold bench`: what is recorded of a run, where it lies, and the command that is written into it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tenfold.bench import arms, claims_gpu, cli, quality_run, report, single
from tenfold.bench.claims import Claim
from tenfold.bench.quality import Quality
from tenfold.bench.single import Result, Row

MACHINE = {"hardware": "NVIDIA H100 80GB HBM3", "commit": "c", "date": "d"}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """Claims that a command records; runs on a GPU that is not there take 4 ms a token."""
    found: list[Claim] = []

    def run(plan: single.Plan, say: Any, command: str) -> Result:
        row = Row("tenfold", 1, 1024, 129, [1.512], [1.0])
        return Result(plan.model, dict(MACHINE), command, 3000.0, settings=dict(plan.tuning), rows=[row])

    monkeypatch.setattr(single, "run", run)
    monkeypatch.setattr(single, "device_of", lambda name: "cuda")
    monkeypatch.setattr(cli, "header", lambda: None)
    monkeypatch.setattr(cli, "ROOT", Path("/nowhere"))
    monkeypatch.setattr(cli, "record", found.extend)
    return found


@pytest.mark.parametrize(
    ("words", "ids", "name"),
    [
        ([], ["F3"], "single-llama-3-8b"),
        (["--set", "weights=int4"], [], "single-llama-3-8b-weights-int4"),
        (["--tokens", "65", "--device", "cuda", "--set", "lookahead=0"], ["F3"], "single-llama-3-8b-lookahead-0"),
    ],
)
def test_weights_of_fewer_bits_claim_nothing_of_the_model_as_it_is(
    words: list[str],
    ids: list[str],
    name: str,
    recorded: list[Claim],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = {}
    monkeypatch.setattr(cli, "written", lambda out, keep, stem, data: kept.update({stem: data}))
    given = ["single", "--model", "shape:llama-3-8b", *words]
    done = CliRunner().invoke(cli.app, [*given, "--record", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert [c.id for c in recorded] == ids
    assert ("no claim rests" in done.output) == (not ids)
    assert list(kept) == [name]
    assert kept[name]["command"] == " ".join(["tenfold bench", *given])
    assert all(c.command == kept[name]["command"] for c in recorded)


def test_models_of_which_other_things_are_claimed(recorded: list[Claim]) -> None:
    for model in ("shape:qwen3-30b-a3b", "shape:llava-onevision-7b"):
        result = single.run(single.Plan(model, (), ()), print, command="c")
        assert not any(c.id[0] == "F" for c in claims_gpu.of_suites({"single": [result.plain()]}))


def test_ablations_with_settings_lie_beside_those_without(
    recorded: list[Claim], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "run", lambda *rest, **more: arms.Result("m", {}))
    for words in ([], ["--set", "weights=int4"], ["--only", "gemm,softmax", "--tokens", "9"]):
        done = CliRunner().invoke(cli.app, ["arms", "--model", "shape:m", *words, "--out", str(tmp_path)])
        assert done.exit_code == 0, done.output
    found = {path.stem: json.loads(path.read_text())["command"] for path in tmp_path.glob("*.json")}
    assert found == {
        "arms-m": "tenfold bench arms --model shape:m",
        "arms-m-weights-int4": "tenfold bench arms --model shape:m --set weights=int4",
        "arms-m-gemm-softmax": "tenfold bench arms --model shape:m --only gemm,softmax --tokens 9",
    }


def test_quality_of_another_model_replaces_no_claim(recorded: list[Claim], tmp_path: Path, monkeypatch: Any) -> None:
    kept = []
    judged = Quality(100, 10.0, 10.0, 0.001, 1.0)
    monkeypatch.setattr(
        quality_run,
        "run",
        lambda model, text, window, count, command, say: (quality_run.judged("default", judged, model, command), {}),
    )
    monkeypatch.setattr(cli.cpu, "save", lambda name, rows: kept.append(name))
    text, model = tmp_path / "text.txt", tmp_path / "other.gguf"
    text.touch()
    model.touch()
    for own in ([], ["--model", str(model)]):
        done = CliRunner().invoke(cli.app, ["quality", "--text", str(text), *own, "--record"])
        assert done.exit_code == 0, done.output
    bundled, other = recorded[:2], recorded[2:]
    assert [c.what.partition(", ")[2].partition(",")[0] for c in (*bundled, *other)] == [
        *["SmolLM2-135M-Instruct Q4_1"] * 2,
        *["other.gguf"] * 2,
    ]
    assert bundled[0].command == "tenfold bench quality --text text.txt"
    assert other[0].command == "tenfold bench quality --text text.txt --model other.gguf"
    assert kept == ["quality", "quality-other.gguf"]


def test_charts_name_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"suite": "sin')
    for read in (report.charts, report.tables):
        with pytest.raises(ValueError, match=r"half\.json is no JSON .*; measure it again, or remove it"):
            read(tmp_path)
