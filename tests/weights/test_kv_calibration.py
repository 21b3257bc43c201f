"""The calibration of a KV format: where it lies, whom it belongs to, and what is told of one that is no good."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes

from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.identity import identity
from tenfold.weights.kv_calibration import SIDES, KvCalibration, KvHeader, key_bias, load, places, save
from tenfold.weights.open import open_checkpoint
from tenfold.weights.safetensors import serialize

FORMAT = "k2v2g32"
LAYERS, CHANNELS, GROUPS = 3, 64, 2


@pytest.fixture
def folder(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def calibration(checkpoint: Checkpoint, **changes: Any) -> KvCalibration:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for side in SIDES:
        tensors[f"{side}.group"] = torch.stack([torch.randperm(64, generator=generator) // 32 for _ in range(3)]).int()
        tensors[f"{side}.clip"] = torch.rand(3, 2, generator=generator) / 2 + 0.5
        tensors[f"{side}.unit"] = torch.full((3, 2), 0.25)
        tensors[f"{side}.shift"] = torch.randn(3, 64, generator=generator)
    return KvCalibration(KvHeader(identity(checkpoint), "text", 100, FORMAT), {**tensors, **changes})


def loaded(checkpoint: Checkpoint) -> KvCalibration:
    return load(checkpoint, FORMAT, LAYERS, CHANNELS, GROUPS)


def test_it_comes_back_as_it_was_saved(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    saved = calibration(checkpoint)
    assert save(saved, checkpoint) == folder / "kv.k2v2g32.json"
    back = loaded(checkpoint)
    assert back.header.text == "text"
    assert back.header.tensors
    assert back.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in saved.tensors.items())
    assert identity(open_checkpoint(folder)) == saved.header.model  # the new .safetensors is none of the weights


def test_the_file_is_safetensors(folder: Path) -> None:
    tensors = calibration(open_checkpoint(folder)).tensors
    theirs = load_bytes(serialize(tensors))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    assert serialize(tensors) == serialize(dict(reversed(tensors.items())))


def test_where_the_folder_takes_nothing_it_lies_in_tenfolds_own(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "kv.k2v2g32.json").mkdir()
    assert save(calibration(checkpoint), checkpoint).parent == tmp_path / "home" / "kv"
    assert loaded(checkpoint).header.tokens == 100


@pytest.mark.parametrize("foreign", ["another model's", "nonsense"])
def test_one_that_is_no_good_hides_none_that_is(folder: Path, foreign: str) -> None:
    checkpoint = open_checkpoint(folder)
    near = folder / "kv.k2v2g32.json"
    near.mkdir()
    own = save(calibration(checkpoint), checkpoint)
    near.rmdir()
    shutil.copy(own.with_suffix(".safetensors"), near.with_suffix(".safetensors"))
    near.write_text(foreign if foreign == "nonsense" else json.dumps(json.loads(own.read_text()) | {"model": "other"}))
    assert loaded(checkpoint).header.model == identity(checkpoint)
    own.write_text("{}")
    with pytest.raises(ValueError, match=rf"{near} is not used, .*; {own} is not used, .*; run `tenfold calibrate kv"):
        loaded(checkpoint)


def test_a_gguf_file_has_its_name_in_that_of_the_calibration(tmp_path: Path) -> None:
    class File:
        path = tmp_path / "small.Q4_1.gguf"

    assert places(File(), "x", "k2v1.5g64")[0] == tmp_path / "small.Q4_1.kv.k2v1.5g64.json"  # type: ignore[arg-type]


def test_none_is_an_error_that_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no calibration.*calibrate kv MODEL .*k2v2g32`, or take fp8 or int4"):
        loaded(open_checkpoint(folder))


def test_another_model_s_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    save(calibration(checkpoint), checkpoint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.125}))
    with pytest.raises(ValueError, match="another model"):
        loaded(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys.clip": torch.full((3, 2), 1.5)}, "clip factors or units of its keys"),
        ({"keys.clip": torch.full((3, 2), float("nan"))}, "not finite"),
        ({"values.unit": torch.zeros(3, 2)}, "units of its values"),
        ({"values.group": torch.zeros(3, 64, dtype=torch.int32)}, "groups of its values are not of equal size"),
        ({"keys.shift": torch.zeros(3, 32)}, "not those of 3 layers of 64 channels in 2 groups"),
        ({"keys.shift": torch.zeros(3, 64, dtype=torch.int32)}, "another type"),
    ],
)
def test_numbers_that_are_none_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = open_checkpoint(folder)
    save(calibration(checkpoint, **changes), checkpoint)
    with pytest.raises(ValueError, match=message):
        loaded(checkpoint)


def test_halves_of_two_runs_and_damaged_files_are_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = save(calibration(checkpoint), checkpoint)
    numbers = path.with_suffix(".safetensors")
    whole, header = numbers.read_bytes(), json.loads(path.read_text())
    numbers.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(ValueError, match="not the file it was written with"):
        loaded(checkpoint)
    numbers.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        loaded(checkpoint)
    numbers.write_bytes(whole)
    for content, message in (
        ({**header, "schema": 9}, "no file of this version"),
        ({**header, "more": 1}, "other entries"),
        ({**header, "format": "k4v4g32"}, "of the KV format k4v4g32"),
        ([], "no file of this version"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            loaded(checkpoint)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not used"):
        loaded(checkpoint)


def test_the_bias_of_keys(tiny: Any) -> None:
    checkpoint = open_checkpoint(tiny("qwen2"))
    raw = checkpoint.tensor("model.layers.1.self_attn.k_proj.bias").data
    assert torch.equal(key_bias(checkpoint, 1, 32), raw.float())
    assert raw.any()
    assert not key_bias(open_checkpoint(tiny("llama")), 1, 32).any()
