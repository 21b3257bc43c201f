"""`tenfold quantize --method mbq`: the folder holds what was found, runs, goes on where it stopped, and refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.blocks import dequantize
from tenfold.quantize.mbq import run
from tenfold.quantize.mbq.compare import ABLATION, compare
from tenfold.quantize.mbq.data import PairError
from tenfold.quantize.mbq.fold import swaps_of
from tenfold.quantize.mbq.recipe import FILE, Recipe, load
from tenfold.quantize.mbq.run import Wish, quantize
from tenfold.quantize.mbq.search import METHODS
from tenfold.quantize.mbq.subject import Subject
from tenfold.quantize.schemes import parse
from tenfold.serve.pairs import Reader, of_text
from tenfold.weights.open import open_checkpoint
from tests.quantize.mbq.conftest import Seeing, samples_of
from tests.vision import TINY, make_checkpoint, varied

WISH = Wish("w4g32z")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["w4g32z", "w8"])
def test_the_folder_is_what_was_measured(method: str, scheme: str, seeing: Seeing, pairs: Path, tmp_path: Path) -> None:
    """The stored model loses what the model with its matrices swapped loses, and transformers' names are kept."""
    folder, wish = seeing("llava"), Wish(scheme, method)
    samples = samples_of(folder, pairs)
    made = quantize(open_checkpoint(folder), samples, tmp_path / "out", wish)
    before, after = Subject(open_checkpoint(folder)), Subject(open_checkpoint(tmp_path / "out"))
    batches = before.batches(samples)
    wanted = before.score(batches, swaps_of(before, made.scales, parse(scheme)))
    got = after.score(after.batches(samples))
    assert got.loss == pytest.approx(wanted.loss, rel=2e-4)
    assert got.loss != before.score(batches).loss
    names = {
        n.rsplit(".", 1)[0]
        for n in json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    }
    source = open_checkpoint(folder)
    assert names == {source.stored_name(n).rsplit(".", 1)[0] for n in source.names()}  # type: ignore[attr-defined]
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (told["model"], told["recipe"]) == (made.model, made.digest())
    assert load(tmp_path / "out" / FILE).content() == made.content()
    assert bool(made.magnitudes) == (method == "mbq")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "internvl-norms", "idefics3"])
def test_every_family(name: str, seeing: Seeing, pairs: Path, tmp_path: Path) -> None:
    folder = seeing(name)
    samples = samples_of(folder, pairs)
    quantize(open_checkpoint(folder), samples, tmp_path / "out", Wish("w8g32z", tower="w8a8"))
    before, after = Subject(open_checkpoint(folder)), Subject(open_checkpoint(tmp_path / "out"))
    towers = [n for n in after.checkpoint.names() if after.checkpoint.tensor(n).storage == "int8a8"]
    assert towers
    assert all(name.startswith("vision.") for name in towers)
    exact, got = before.score(before.batches(samples)), after.score(after.batches(samples))
    assert got.loss == pytest.approx(exact.loss, rel=0.05)


@pytest.mark.parametrize("scheme", ["w8g32z", "fp8a8", "w8a8", "w4a8", "w3g128z", "w1g128z"])
def test_it_runs_and_answers(scheme: str, pairs: Path, tmp_path: Path) -> None:
    """The first token's chance is that of the rounded weights in plain PyTorch, and with 8 bits of the exact ones."""
    from tenfold import LLM, SamplingParams

    text = {**TINY["llava"].text, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    folder, out = make_checkpoint(varied(TINY["llava"], text=text), tmp_path / "wide"), tmp_path / "out"
    quantize(open_checkpoint(folder), samples_of(folder, pairs), out, Wish(scheme))
    content = [{"type": "image", "image": pairs.parent / "1.png"}, {"type": "text", "text": "?"}]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
    chances = []
    for model, kernels in ((out, "torch"), (out, "auto"), (folder, "torch")):
        with LLM(str(model), max_model_len=512, kernels=kernels, device="cpu") as llm:
            done = llm.chat([{"role": "user", "content": content}], params)[0]
        (first,) = done.choices[0].logprobs or ()
        chances.append(first.logprob)
    assert chances[0] == pytest.approx(chances[1], abs=0.1)
    if scheme.startswith("w8"):
        assert chances[0] == pytest.approx(chances[2], abs=0.1)


@pytest.mark.parametrize("wish", [WISH, replace(WISH, norm="fisher", propagate=True), replace(WISH, weigh="squares")])
def test_the_same_twice_in_any_order_and_by_its_recipe(wish: Wish, seeing: Seeing, pairs: Path, tmp_path: Path) -> None:
    folder = seeing("idefics3")
    source, samples = open_checkpoint(folder), samples_of(folder, pairs)
    first = quantize(source, samples, tmp_path / "a", wish)
    quantize(source, samples[::-1], tmp_path / "b", wish)
    quantize(source, samples, tmp_path / "c", wish, recipe=tmp_path / "a" / FILE)
    for file in sorted((tmp_path / "a").iterdir()):
        for other in "bc":
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), file.name
    recipe = tmp_path / "a" / FILE
    for other_wish, given, message in (
        (replace(wish, method="awq"), samples, "has method 'mbq', and 'awq' was asked for"),
        (replace(wish, scheme="w8g32z"), samples, "has scheme 'w4g32z'"),
        (wish, samples[1:], "was made with other samples"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(source, given, tmp_path / "d", other_wish, recipe=recipe)
    other = seeing("llava")
    with pytest.raises(ValueError, match="is of another model"):
        quantize(open_checkpoint(other), samples_of(other, pairs), tmp_path / "d", wish, recipe=recipe)
    recipe.write_text("{}")
    with pytest.raises(ValueError, match="is no recipe of mbq"):
        quantize(source, samples, tmp_path / "d", wish, recipe=recipe)
    assert first.mix.startswith("5 samples with 4 pictures")


@pytest.mark.parametrize("wish", [WISH, replace(WISH, norm="fisher", propagate=True, rounding="gptq")])
def test_it_goes_on_where_it_stopped(
    wish: Wish, seeing: Seeing, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seeing("llava")
    source, samples = open_checkpoint(folder), samples_of(folder, pairs)
    whole = quantize(source, samples, tmp_path / "whole", wish)
    search, layers = run.equalize, []

    def counted(layer: Any, *rest: Any) -> Any:
        if layer.number == 2 and not layers.count(2):
            layers.append(2)
            raise KeyboardInterrupt
        layers.append(layer.number)
        return search(layer, *rest)

    monkeypatch.setattr(run, "equalize", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, samples, tmp_path / "out", wish)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "magnitudes", None)  # which are kept, too
    assert quantize(source, samples, tmp_path / "out", wish).content() == whole.content()
    assert layers == [0, 1, 2, 2]
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_a_state_of_another_compute_type_is_passed_over(
    seeing: Seeing, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales found in bfloat16, as on a GPU, are not those found in float32; a whole recipe is followed in either."""
    folder = seeing("llava")
    source, samples, wish = open_checkpoint(folder), samples_of(folder, pairs), Wish("w4g32z", "awq")
    search, resumed, out = run.equalize, run.resumed, tmp_path / "out"
    kept: list[list[int]] = []

    def stopping(layer: Any, *rest: Any) -> Any:
        if layer.number == 1:
            raise KeyboardInterrupt
        return search(layer, *rest)

    def told(place: Path, new: Recipe) -> Recipe:
        found = resumed(place, new)
        kept.append(list(found.scales))
        return found

    def coarse(source: Any, device: str, _: torch.dtype, longest: int) -> Subject:
        return Subject(source, device, torch.bfloat16, longest)

    monkeypatch.setattr(run, "resumed", told)
    monkeypatch.setattr(run, "equalize", stopping)
    for kind in (Subject, Subject, coarse):
        monkeypatch.setattr(run, "Subject", kind)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, samples, out, wish)
    assert kept == [[], [0], []]
    monkeypatch.setattr(run, "equalize", search)
    made = quantize(source, samples, out, wish)
    assert (made.settings["device"], made.settings["dtype"]) == ("cpu", "bfloat16")
    monkeypatch.setattr(run, "Subject", Subject)
    again = quantize(source, samples, tmp_path / "again", wish, recipe=out / FILE)
    assert again.content() == made.content()


def test_gptq_with_weights_of_tokens(seeing: Seeing, pairs: Path, tmp_path: Path) -> None:
    folder = seeing("llava")
    source, samples = open_checkpoint(folder), samples_of(folder, pairs)
    scores = []
    for rounding in ("rtn", "gptq"):
        out = tmp_path / rounding
        quantize(source, samples, out, Wish("w4g32z", rounding=rounding))
        subject = Subject(open_checkpoint(out))
        scores.append(subject.score(subject.batches(samples)).loss)
    exact = Subject(source)
    best = exact.score(exact.batches(samples)).loss
    assert abs(scores[1] - best) < abs(scores[0] - best)


def test_compressed_tensors_hold_the_same(seeing: Seeing, pairs: Path, tmp_path: Path) -> None:
    folder = seeing("llava")
    source, samples = open_checkpoint(folder), samples_of(folder, pairs)
    made = []
    for layout in ("tenfold", "compressed-tensors"):
        quantize(source, samples, tmp_path / layout, Wish("w4g32", layout=layout))
        made.append(open_checkpoint(tmp_path / layout))
    assert set(made[0].names()) == set(made[1].names())
    for name in made[0].names():
        assert torch.equal(dequantize(made[0].tensor(name)), dequantize(made[1].tensor(name))), name
    settings = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert "model.language_model.layers.0.mlp.down_proj" in group["targets"] or any(
        t.endswith("layers.0.mlp.down_proj") for t in group["targets"]
    )


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_compressed_tensors_hold_a_tower_of_another_scheme(
    name: str, seeing: Seeing, pairs: Path, tmp_path: Path
) -> None:
    """Two groups, whose targets are named as the files name them."""
    folder = seeing(name)
    source, samples = open_checkpoint(folder), samples_of(folder, pairs)
    made = []
    for layout in ("tenfold", "compressed-tensors"):
        quantize(source, samples, tmp_path / layout, Wish("w4g32", "rtn", tower="w8g32", layout=layout))
        made.append(open_checkpoint(tmp_path / layout))
    assert set(made[0].names()) == set(made[1].names())
    for tensor in made[0].names():
        own, foreign = made[0].tensor(tensor), made[1].tensor(tensor)
        assert own.storage == foreign.storage
        assert torch.equal(dequantize(own), dequantize(foreign)), tensor
    assert {made[1].tensor(n).storage for n in made[1].names() if n.startswith("vision.")} > {"int8g32"}
    index = json.loads((tmp_path / "compressed-tensors" / "model.safetensors.index.json").read_text())["weight_map"]
    settings = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    groups = settings["config_groups"].values()
    assert len(groups) == 2
    assert all(f"{target}.weight_packed" in index for group in groups for target in group["targets"])


def test_texts_alone(tiny: Seeing, tmp_path: Path) -> None:
    source = open_checkpoint(tiny("qwen3"))
    samples = of_text("The quick brown fox and the lazy dog in the end. " * 40, Reader(source), 64, 8)
    assert len(samples) == 8
    for method in ("awq", "mbq"):
        made = quantize(source, samples, tmp_path / method, Wish("w8g32z", method))
        subject, exact = Subject(open_checkpoint(tmp_path / method)), Subject(source)
        assert subject.score(subject.batches(samples)).loss == pytest.approx(
            exact.score(exact.batches(samples)).loss, rel=0.01
        )
        assert not made.magnitudes  # there is nothing to weigh
        assert made.mix == "8 samples with 0 pictures: 0 tokens of pictures, 504 of answers, 8 of prompts"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"scheme": "w3g32z"}, "qkv cannot be stored as int3g32z: 64 columns are no multiple of 128"),
        ({"scheme": "w4g128z"}, "64 columns are no multiple of the group, 128"),
        ({"scheme": "w5"}, "w5 cannot be stored"),
        ({"layout": "compressed-tensors"}, "which compressed-tensors lacks; take w4g32"),
        ({"scheme": "w1g128z", "layout": "compressed-tensors"}, "which compressed-tensors lacks; take w2g128"),
        ({"scheme": "w1g32"}, "int1g32 lacks zeros, and two levels need"),
        ({"scheme": "w4g32", "tower": "w8g32z", "layout": "compressed-tensors"}, "w8g32z has zeros.*; take w8g32"),
        ({"tower": "w3"}, "no tower whose matrices can be stored as w3"),
    ],
)
def test_what_cannot_be_is_said_first(
    wish: dict[str, str], message: str, seeing: Seeing, pairs: Path, tmp_path: Path
) -> None:
    folder = seeing("llava")
    with pytest.raises(ValueError, match=message):
        quantize(open_checkpoint(folder), samples_of(folder, pairs), tmp_path / "out", replace(WISH, **wish))
    assert not list(tmp_path.iterdir())


def test_wrong_wishes_and_models(tiny: Seeing, pairs: Path, tmp_path: Path) -> None:
    for wrong in ({"method": "gptq"}, {"floor": "mean"}, {"rounding": "up"}, {"layout": "gguf"}):
        with pytest.raises(ValueError, match="allowed"):
            Wish("w4g32z", **wrong)
    sparse = open_checkpoint(tiny("mixtral"))
    samples = of_text("The quick brown fox. " * 40, Reader(sparse), 64, 2)
    with pytest.raises(ValueError, match="has experts or layers of a kind of its own"):
        quantize(sparse, samples, tmp_path / "out", WISH)
    dense = open_checkpoint(tiny("llama"))
    with pytest.raises(ValueError, match="has no tower"):
        quantize(dense, samples, tmp_path / "out", replace(WISH, tower="w8a8"))
    with pytest.raises(PairError, match="this model reads text only"):
        samples_of(tiny("llama"), pairs)


def test_methods_side_by_side(seeing: Seeing, pairs: Path) -> None:
    subject = Subject(open_checkpoint(seeing("llava")))
    samples = samples_of(seeing("llava"), pairs)
    lines: list[str] = []
    rows, found = compare(
        subject, samples, samples[:2], [parse("w2g32z"), parse("w4a8")], METHODS | ABLATION, lines.append
    )
    assert len(rows) == len(lines) == 1 + 2 * (len(METHODS) + len(ABLATION))
    by = {(row.scheme, row.method): row for row in rows}
    assert by["w2g32z", "mbq"].score == by["w2g32z", "search mae answers"].score
    assert by["w2g32z", "awq"].score == by["w2g32z", "search mse alike"].score
    assert by["w2g32z", "rtn"].bits == 3.0
    assert by["w4a8", "rtn"].score.loss != by["w4a8", "smoothquant"].score.loss
    assert len(found["attention"]) == subject.layers
