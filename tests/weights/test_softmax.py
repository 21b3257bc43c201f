"""`softmax.json`: where it lies, whom it belongs to, and what happens to one that is no good."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.attention.unified_max import window
from tenfold.weights.identity import identity
from tenfold.weights.open import open_checkpoint
from tenfold.weights.softmax import SoftmaxStatistics, load_phi, load_statistics, places, save

LAYERS, HEADS = 3, 4


@pytest.fixture
def folder(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def statistics(model: str, low: float = -5.0, high: float = 5.0) -> SoftmaxStatistics:
    def all_heads(value: float) -> list[list[float]]:
        return [[value] * HEADS for _ in range(LAYERS)]

    return SoftmaxStatistics(
        model, "text", 100, all_heads(low), all_heads(high), all_heads(low + 1), all_heads(high - 1), -30.0, high
    )


def test_statistics_come_back_as_they_were_saved(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    saved = statistics(identity(checkpoint))
    assert save(saved, checkpoint) == folder / "softmax.json"
    assert load_statistics(checkpoint, LAYERS, HEADS) == saved
    phi = load_phi(checkpoint, LAYERS, HEADS, torch.bfloat16)
    assert phi is not None
    assert [p.shape for p in phi if p is not None] == [(HEADS,)] * LAYERS


def test_where_the_folder_takes_nothing_they_lie_in_tenfolds_own(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "softmax.json").mkdir()
    saved = statistics(identity(checkpoint))
    path = save(saved, checkpoint)
    assert path.parent == tmp_path / "home" / "softmax"
    assert load_statistics(checkpoint, LAYERS, HEADS) == saved
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("foreign", [json.dumps({"schema": 1, "model": "other"}), "nonsense"])
def test_one_that_is_no_good_hides_none_that_is(folder: Path, foreign: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(folder)
    saved = statistics(identity(checkpoint))
    (folder / "softmax.json").mkdir()
    own = save(saved, checkpoint)
    (folder / "softmax.json").rmdir()
    (folder / "softmax.json").write_text(foreign)
    assert load_statistics(checkpoint, LAYERS, HEADS) == saved
    assert caplog.records == []
    own.write_text("nonsense")
    assert load_statistics(checkpoint, LAYERS, HEADS) is None
    (record,) = caplog.records
    assert all(str(path) in record.getMessage() for path in (own, folder / "softmax.json"))


def test_a_gguf_file_has_its_name_in_that_of_the_statistics(tmp_path: Path) -> None:
    class Checkpoint:
        path = tmp_path / "small.Q4_1.gguf"

    assert places(Checkpoint(), "x")[0] == tmp_path / "small.Q4_1.softmax.json"  # type: ignore[arg-type]


def test_random_weights_keep_theirs_in_tenfolds_own_folder(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Path("shape:llama-3-8b"))
    assert save(statistics(identity(checkpoint)), checkpoint).parent == tmp_path / "home" / "softmax"


def test_the_identity_follows_the_content_and_not_the_name(folder: Path, tmp_path: Path) -> None:
    before = identity(open_checkpoint(folder))
    other = shutil.move(folder, tmp_path / "renamed")
    assert identity(open_checkpoint(Path(other))) == before
    weights = Path(other) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4096:] = bytes(x ^ 1 for x in content[-4096:])
    weights.write_bytes(content)
    assert identity(open_checkpoint(Path(other))) != before


def test_nothing_measured_is_no_reason_to_speak(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_phi(open_checkpoint(folder), LAYERS, HEADS, torch.bfloat16) is None
    assert caplog.records == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "other"}, "another model"),
        ({"schema": 2}, "no file of this version"),
        ({"low": [[0.0] * HEADS]}, "not those of 3 layers of 4 heads"),
        ({"high": [[float("nan")] * HEADS] * LAYERS}, "not those of"),
        ({"tokens": "many"}, "not those of"),
        ({"extra": 1}, "other entries"),
        (None, "Expecting"),
    ],
    ids=str,
)
def test_what_is_no_good_is_told_once_and_left(
    folder: Path, change: dict[str, Any] | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(folder)
    path = save(statistics(identity(checkpoint)), checkpoint)
    path.write_text("nonsense" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with caplog.at_level(logging.WARNING, "tenfold"):
        assert load_phi(checkpoint, LAYERS, HEADS, torch.bfloat16) is None
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "tenfold calibrate softmax" in record.getMessage()


@pytest.mark.parametrize("digits", [30, 400])
def test_whole_numbers_that_no_type_has_room_for_are_no_good(
    folder: Path, digits: int, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(folder)
    path = save(statistics(identity(checkpoint)), checkpoint)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"low": [[-(10**digits)] * HEADS] * LAYERS}))
    assert load_phi(checkpoint, LAYERS, HEADS, torch.bfloat16) is None
    assert "not those of" in caplog.text


def test_float16_has_room_for_less_than_bfloat16() -> None:
    wide = statistics("m", -20.0, 20.0)
    assert all(p is None for p in wide.phi(torch.float16))
    assert wide.model_phi(torch.float16) is None
    layers = wide.phi(torch.bfloat16)
    safe = window(torch.bfloat16)
    for phi in layers:
        assert phi is not None
        assert (phi + safe.low < -20.0).all()
        assert (phi + safe.high > 20.0).all()
    one = wide.model_phi(torch.bfloat16)
    assert one is not None
    assert layers[0] is not None
    assert one == pytest.approx(float(layers[0][0]))


def test_a_head_with_rare_extremes_is_served_but_for_them() -> None:
    narrow = window(torch.float16)
    found = statistics("m", -narrow.width / 2 - 0.5, narrow.width / 2 + 0.5)
    assert all(p is not None for p in found.phi(torch.float16))
    assert found.model_phi(torch.float16) is None


def test_heads_far_apart_need_a_phi_each() -> None:
    """As OPT has them: one phi for the model serves none, one for each head serves all."""
    found = statistics("m")
    for values in (found.low, found.high, found.rare_low, found.rare_high):
        values[0] = [value + 300.0 for value in values[0]]
    assert found.model_phi(torch.bfloat16) is None
    assert all(p is not None for p in found.phi(torch.bfloat16))
