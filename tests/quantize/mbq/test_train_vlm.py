"""The training example on a tiny trunk: its model opens here and gives what transformers gives."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.quantize.mbq.data import read_pairs
from tenfold.quantize.mbq.subject import Subject
from tenfold.serve.pairs import Reader
from tenfold.weights.open import open_checkpoint
from tests.quantize.mbq.conftest import Seeing

SCRIPT = Path(__file__).parents[3] / "examples" / "train_vlm.py"
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def ran(*arguments: object) -> str:
    root = str(SCRIPT.parents[1])
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=root, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_trains_what_tenfold_opens(tiny: Seeing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    data, out = tmp_path / "data", tmp_path / "vlm"
    told = ran("prepare", "--trunk", tiny("llama"), "--out", data, "--most", 40)
    assert "held_out: 8 pairs" in told
    told = ran(
        *("train", "--data", data, "--out", out, "--minutes", 0.05, "--batch", 8, "--freeze", 1),
        *("--tower", json.dumps(TOWER)),
    )
    assert "right: all" in told
    samples = Reader(open_checkpoint(out)).samples(read_pairs(data / "held_out"))
    subject = Subject(open_checkpoint(out))
    ours = subject.score(subject.batches(samples))
    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    losses, hits = [], 0
    for sample in samples:
        (picture,) = sample.pictures
        pixels = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8).view(1, 1, 64, 64, 3)
        ids = torch.tensor([sample.tokens])
        with torch.inference_mode():
            logits = model(input_ids=ids, pixel_values=pixels.permute(0, 1, 4, 2, 3) / 127.5 - 1).logits[0]
        said, wanted = logits[sample.answer - 1 : -1], ids[0, sample.answer :]
        losses.append(float(torch.nn.functional.cross_entropy(said, wanted)))
        hits += bool((said.argmax(-1) == wanted).all())
    assert ours.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert ours.accuracy == hits / len(samples)
    card = json.loads((out / "training.json").read_text())
    assert card["steps"] > 0
    assert set(card["accuracy"]) == {"What is written here?", "What colour is the writing?", "all"}


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("train_vlm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    script = loaded()

    def begun() -> tuple[torch.nn.Linear, torch.optim.Optimizer, random.Random]:
        torch.manual_seed(1)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters()), random.Random(5)

    model, optimizer, draw = begun()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    draw.random()
    state, given = tmp_path / "state.pt", {"data": "ab", "seed": 5, "rate": 1e-3, "tower": TOWER}
    script.keep(state, given, model, optimizer, draw, 7, 12.5)
    other, again, redrawn = begun()
    assert not torch.equal(other.weight, model.weight)
    for wrong, named in (
        ({"seed": 6}, "--seed"),
        ({"rate": 2e-3, "data": "cd"}, "--data, --rate"),
        ({"tower": {**TOWER, "hidden_size": 64}}, "--tower"),
        ({"batch": 8}, "--batch"),
    ):
        with pytest.raises(SystemExit, match=f"begun with other {named}; give the same, or remove it to begin anew"):
            script.resumed(state, given | wrong, other, again, redrawn)
    assert not torch.equal(other.weight, model.weight)
    assert script.resumed(state, dict(given), other, again, redrawn) == (7, 12.5)
    assert torch.equal(other.weight, model.weight)
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    assert redrawn.random() == draw.random()
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_data_are_known_by_their_pairs(tmp_path: Path) -> None:
    script = loaded()
    for part in ("train", "held_out"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "pairs.jsonl").write_text(part)
    first = script.digest_of(tmp_path)
    assert script.digest_of(tmp_path) == first
    (tmp_path / "held_out" / "pairs.jsonl").write_text("others")
    assert script.digest_of(tmp_path) != first
