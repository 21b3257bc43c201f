"""The command that measures GPUs, on a CPU: where results lie, and what they say would measure them again."""

import json
from pathlib import Path

import pytest

from tenfold.bench import gpu
from tenfold.bench.single import loaded

QUICK = ["--batch", "1", "--context", "8", "--prefill", "8", "--tokens", "3", "--rounds", "1", "--device", "cpu"]


def test_runs_with_settings_lie_beside_those_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A model that sees is measured with text alone, in every mode of weights that is asked of one."""
    given = ["--models", "shape:tiny-vlm@layers=1", *QUICK]
    modes = {"": [], "int3": ["--set", "weights=int3"], "w4a8": ["--set", "weights=w4a8", "--set", "threads=1"]}
    for own in modes.values():
        assert gpu.main([*given, *own, "--out", str(tmp_path), "--commit", "c"]) == 0
    stems = [f"single-tiny-vlm-layers-1{end}" for end in ("", "-weights-int3", "-weights-w4a8-threads-1")]
    assert {path.stem for path in tmp_path.iterdir()} == set(stems)
    for stem, (mode, own) in zip(stems, modes.items()):
        result = loaded(json.loads((tmp_path / f"{stem}.json").read_text()))
        assert result.weights == mode
        assert [(row.batch, row.context, len(row.long)) for row in result.rows] == [(1, 8, 1)]
        assert result.command == " ".join(["python -m tenfold.bench.gpu", *given, *own])
        assert result.machine["commit"] == "c"
    assert f"== {stems[-1]}: copy" in capfd.readouterr().out


def test_groups_of_arms_lie_beside_all_of_them() -> None:
    for groups, stem in (([], "arms-tiny"), (["gemm", "merge"], "arms-tiny-gemm-merge")):
        job = gpu.Job("arms", "shape:tiny", "folder", 1.0, {"set": {}, "groups": groups})
        assert job.path.stem == stem
