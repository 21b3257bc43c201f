"""`tenfold quantize`: it writes the model that it decided on, goes on where it stopped, and says what cannot be."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")

from safetensors.torch import load_file, save_file

from tenfold import LLM, SamplingParams
from tenfold.engine.memory import weight_bytes
from tenfold.models.table import build_model
from tenfold.ops.blocks import dequantize
from tenfold.ops.kernels import Kernels
from tenfold.quantize import rotate
from tenfold.quantize.capture import TextTooShort
from tenfold.quantize.mxmoe import run
from tenfold.quantize.mxmoe.allocate import BudgetError
from tenfold.quantize.mxmoe.cost import Shape
from tenfold.quantize.mxmoe.front import Corner, draw, relative
from tenfold.quantize.mxmoe.recipe import FILE, Recipe, load
from tenfold.quantize.mxmoe.run import Wish, quantize
from tenfold.quantize.mxmoe.sensitivity import PARTS
from tenfold.quantize.mxmoe.subject import End, Rounded, Subject, chosen, name_of
from tenfold.quantize.schemes import format_of_scheme, parse
from tenfold.quantize.write import Folder
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.load import TABLE, Weights
from tenfold.weights.open import open_checkpoint
from tests.models.test_moe import stacked
from tests.steps import Sequences, make_store
from tests.tiny import VOCAB, Tiny, make_checkpoint

Made = Callable[[str], Path]
PROMPTS = {0: [5, 9, 31, 7], 1: [8], 2: list(range(20, 45))}
WISH = Wish(5.5, "w2g32z,w4g32z,w8g32z", length=64, windows=8)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and nobody knows why it would do that. " * 60)
    return path


def model(tiny: Made, name: str = "qwen2-moe-even") -> Path:
    return tiny(name)


@pytest.mark.parametrize(
    ("name", "wish"),
    [
        ("qwen2-moe-even", WISH),
        ("qwen2-moe-even", Wish(6.0, "w2g32z,w4g32z,w8g32z", "rtn", "layer", 0.5, 64, 8)),
        ("mixtral", WISH),
    ],
)
def test_the_model_is_what_was_decided(name: str, wish: Wish, tiny: Made, text: Path, tmp_path: Path) -> None:
    source, out = model(tiny, name), tmp_path / "out"
    made = quantize(open_checkpoint(source), text, out, wish)
    assert made.bits <= wish.bits
    assert len(set(made.schemes.values())) > 1
    before, after = open_checkpoint(source), open_checkpoint(out)
    subject = Subject(before)
    assert set(made.schemes) == {name_of(key) for key in subject.blocks}
    bits = numbers = 0.0
    experts = set()
    for key in subject.blocks:
        scheme = parse(made.schemes[name_of(key)])
        exact, parts = subject.exact(key), []
        for part in subject.names(key):
            raw = after.tensor(part)
            assert raw.storage == format_of_scheme(scheme).name
            parts.append(dequantize(raw))
            bits += 8 * sum(t.numel() * t.element_size() for t in (raw.data, *raw.extras))
            experts.add(part)
        got = torch.cat(parts)
        numbers += got.numel()
        assert got.shape == exact.shape
        step = exact.view(len(exact), -1, 32).abs().amax(-1).max() * 2 / ((1 << scheme.bits) - 1)
        assert (got - exact).abs().mean() < step
    assert bits / numbers == pytest.approx(made.bits)
    for other in set(after.names()) - experts:
        assert torch.equal(after.tensor(other).data, before.tensor(other).data), other
    assert set(after.names()) - experts == {n for n in before.names() if "experts." not in n or "shared" in n}
    assert json.loads((out / FILE).read_text())["schemes"] == made.schemes
    assert after.tokenizer().encode("fox").ids == before.tokenizer().encode("fox").ids
    assert not list(tmp_path.glob(".*"))


def test_the_engine_gives_the_perplexity_that_was_measured(tiny: Made, text: Path, tmp_path: Path) -> None:
    """Of the written folder, through packed products, as of the same rounding put in place of the exact weights."""
    source, out = open_checkpoint(model(tiny)), tmp_path / "out"
    made = quantize(source, text, out, WISH)
    subject = Subject(source)
    windows = subject.tokens(text.read_text(), WISH.length, WISH.windows)
    found, exact = Rounded(), subject.perplexity(windows)
    schemes = dict.fromkeys(PARTS, WISH.parsed())
    assert list(subject.measure(found, windows, schemes, WISH.rounding)) == subject.layers
    subject.put(chosen(found, made.schemes))
    want = subject.perplexity(windows)
    assert want != exact
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    with LLM(str(out), device="cpu", dtype="float32") as llm:
        done = llm.generate(windows, settings)
    logs = [each.logprob for request in done for each in request.prompt_logprobs or () if each is not None]
    assert len(logs) == len(windows) * (WISH.length - 1)
    assert math.exp(-sum(logs) / len(logs)) == pytest.approx(want, rel=1e-3)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Experts whose columns every format holds."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
    counts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    return make_checkpoint(Tiny("Qwen2Moe", {**sizes, **counts}), tmp_path / "wide")


@pytest.mark.parametrize("group", [32, 128])
def test_blocks_of_one_to_four_bits_side_by_side(
    group: int, wide: Path, text: Path, tmp_path: Path, kernels: Kernels
) -> None:
    """The model of the folder is that of the values which codes, scales and zeros stand for."""
    names = [f"w{bits}g{group}z" for bits in (1, 2, 3, 4)]
    wish = Wish(3.5, ",".join(names), length=64, windows=8)
    made = quantize(open_checkpoint(wide), text, tmp_path / "first", wish)
    assert len(set(made.schemes.values())) > 1
    content = json.loads((tmp_path / "first" / FILE).read_text())
    content["schemes"] = {block: names[i % 4] for i, block in enumerate(made.schemes)}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    out, dense = tmp_path / "out", tmp_path / "dense"
    followed = quantize(open_checkpoint(wide), text, out, wish, recipe=tmp_path / "recipe.json")
    packed = open_checkpoint(out)
    stored = {name: packed.tensor(name).storage for name in packed.names() if ".experts." in name}
    assert set(stored.values()) == {f"int{bits}g{group}z" for bits in (1, 2, 3, 4)}
    subject = Subject(open_checkpoint(wide))
    for key in subject.blocks:
        scheme = format_of_scheme(parse(followed.schemes[name_of(key)])).name
        assert {stored[name] for name in subject.names(key)} == {scheme}
    shutil.copytree(wide, dense)
    save_file({name: dequantize(packed.tensor(name)) for name in packed.names()}, dense / "model.safetensors")
    found = [built_logits(folder, kernels) for folder in (out, dense, wide)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0] - found[2]).abs().mean() > 0.1


def built_logits(folder: Path, kernels: Kernels) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    built = build_model(checkpoint.config, Weights(checkpoint, kernels), 128)
    with torch.inference_mode():
        return built.forward(Sequences(make_store(built.config)).step(PROMPTS, "all"))


@pytest.mark.parametrize(("layout", "rounding"), [("tenfold", "gptq"), ("compressed-tensors", "awq")])
def test_blocks_for_activations_of_8_bits(
    layout: str, rounding: str, wide: Path, text: Path, tmp_path: Path, kernels: Kernels
) -> None:
    """Beside others: the model of the folder is that of its values. The compiled kernels round activations beside
    packed weights in their own way, which leaves less than a tenth of the logits' spread.
    """
    names = "w2g128", "w4g128a8", "fp8a8"
    wish = Wish(5.0, ",".join(names), rounding, length=64, windows=8, layout=layout)
    made = quantize(open_checkpoint(wide), text, tmp_path / "first", wish)
    assert made.bits <= 5
    assert all(set(own) == set(names) for own in made.losses.values())
    content = json.loads((tmp_path / "first" / FILE).read_text())
    content["schemes"] = {block: names[i % 3] for i, block in enumerate(made.schemes)}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    out, dense = tmp_path / "out", tmp_path / "dense"
    quantize(open_checkpoint(wide), text, out, wish, recipe=tmp_path / "recipe.json")
    packed = open_checkpoint(out)
    stored = {packed.tensor(name).storage for name in packed.names() if ".experts." in name}
    assert stored == {format_of_scheme(parse(name)).name for name in names}
    shutil.copytree(wide, dense)
    save_file({name: dequantize(packed.tensor(name)) for name in packed.names()}, dense / "model.safetensors")
    found = [built_logits(folder, kernels) for folder in (out, dense, wide)]
    apart = [(found[0] - other).square().mean().sqrt() / other.std() for other in found[1:]]
    assert apart[0] <= (1e-5 if kernels.name == "torch" else 0.1)
    assert apart[1] > 0.15


def test_speed_decides_by_tiles(wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tiles of float8 take least, blocks get it as far as speed counts; what times are from is in the recipe."""
    quick = Shape(16, 64, 8, {"w2g128z": 4.0, "w4g128a8": 2.0, "fp8a8": 1.0})
    monkeypatch.setattr(run, "shapes", lambda *given: ([quick], "measured on a stand-in"))
    wish = Wish(9.0, "w2g128z,w4g128a8,fp8a8", "rtn", length=64, windows=8, r=0.0)
    made = quantize(open_checkpoint(wide), text, tmp_path / "out", wish)
    assert set(made.schemes.values()) == {"fp8a8"}
    assert made.cost == "measured on a stand-in, in tiles of 16 picks by 64 rows"
    assert load(tmp_path / "out" / FILE, made.model) == made


def test_a_model_in_bfloat16_is_measured_as_on_a_gpu(wide: Path) -> None:
    texts = [list(range(5, 69))] * 8
    tried = tuple(map(parse, ("w4g128a8", "fp8a8", "w8g128z")))
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        subject, found = Subject(open_checkpoint(wide), dtype=dtype), Rounded()
        assert list(subject.measure(found, texts, dict.fromkeys(PARTS, tried), "awq")) == subject.layers
        losses.append([sum(x for (_, name), x in found.losses.items() if name == s) for s in map(str, tried)])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[0][0] > losses[0][1] > losses[0][2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_a_gpu_times_tiles_and_serves_what_was_decided(
    rounding: str, wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    names = "w2g128z", "w3g128z", "w4g128a8", "fp8a8"
    wish, out = Wish(5.0, ",".join(names), rounding, length=64, windows=8, r=0.5), tmp_path / "out"
    made = quantize(open_checkpoint(wide), text, out, wish, device="cuda")
    assert made.bits <= 5
    assert set(made.schemes.values()) <= set(names)
    assert "in tiles of" in made.cost
    settings = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(str(out), device="cuda", dtype="bfloat16", kv_memory=4 << 20) as llm:
        (done,) = llm.generate(["the fox"], settings)
    assert len(done.choices[0].tokens) == 4


@pytest.mark.parametrize("scheme", ["w1g128z", "w4g128z", "w4g128", "w4g128a8", "fp8a8"])
def test_a_cpu_plans_for_what_it_holds_of_zeros_that_are_fractions(
    scheme: str, wide: Path, text: Path, tmp_path: Path, kernels: Kernels
) -> None:
    quantize(open_checkpoint(wide), text, tmp_path / "out", Wish(9.0, scheme, length=64, windows=8))
    checkpoint = open_checkpoint(tmp_path / "out")
    planned, _ = weight_bytes(checkpoint, "auto", torch.float32, kernels.name)
    weights = Weights(checkpoint, kernels)
    build_model(checkpoint.config, weights, 128)
    assert planned == pytest.approx(sum(m.nbytes for m in weights.matrices), rel=0.12)


def test_a_model_of_one_bit_is_written_and_answers(wide: Path, text: Path, tmp_path: Path) -> None:
    wish = Wish(1.25, "w1g128z", length=64, windows=8)
    made = quantize(open_checkpoint(wide), text, tmp_path / "out", wish)
    assert made.bits == 1.25
    assert set(made.schemes.values()) == {"w1g128z"}
    settings = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(str(tmp_path / "out"), device="cpu", dtype="float32") as llm:
        (done,) = llm.generate(["the fox"], settings)
    assert len(done.choices[0].tokens) == 4


def test_the_same_twice_and_by_its_recipe(tiny: Made, text: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model(tiny))
    first = quantize(source, text, tmp_path / "a", WISH)
    assert quantize(source, text, tmp_path / "b", WISH) == first
    assert quantize(source, text, tmp_path / "c", WISH, recipe=tmp_path / "a" / FILE) == first
    for other, message in (
        ({"rounding": "rtn"}, "is for the rounding gptq"),
        ({"windows": 7}, "another text or other windows"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(source, text, tmp_path / "d", replace(WISH, **other), recipe=tmp_path / "a" / FILE)
    for file in sorted((tmp_path / "a").iterdir()):
        for other in "bc":
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), file.name


@pytest.mark.parametrize("tie", ["block", "layer"])
def test_compressed_tensors_hold_the_same(tie: str, tiny: Made, text: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model(tiny))
    wish = Wish(5.5, "w2g32,w4g32,w8g32", "rtn", length=64, windows=8, tie=tie)
    made = quantize(source, text, tmp_path / "own", wish)
    again = quantize(source, text, tmp_path / "foreign", replace(wish, layout="compressed-tensors"))
    assert again == made
    own, foreign = open_checkpoint(tmp_path / "own"), open_checkpoint(tmp_path / "foreign")
    assert set(own.names()) == set(foreign.names())
    for name in own.names():
        a, b = own.tensor(name), foreign.tensor(name)
        assert a.storage == b.storage
        assert torch.equal(dequantize(a), dequantize(b))
    settings = json.loads((tmp_path / "foreign" / "config.json").read_text())["quantization_config"]
    bits = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    assert bits == {parse(scheme).bits for scheme in made.schemes.values()}
    assert "lm_head" in settings["ignore"] or source.config.get("tie_word_embeddings")
    assert not any("experts.0" in name for name in settings["ignore"])
    of_layers = {layer: {s for b, s in made.schemes.items() if b.split(".")[0] == layer} for layer in "01"}
    assert all(len(own) == 1 for own in of_layers.values()) == (tie == "layer")


@pytest.mark.parametrize("whole", [False, True])
def test_a_rotated_model_answers_as_before(whole: bool, tiny: Made, text: Path, tmp_path: Path) -> None:
    """With 8 bits everywhere, what is left is little; the embedding is turned, and tied no more. whole: the experts of
    a layer lie in one tensor.
    """
    source = open_checkpoint(stacked(model(tiny), tmp_path / "stacked") if whole else model(tiny))
    wish = Wish(9.0, "w8g32z", length=64, windows=8, rotate=True)
    made = quantize(source, text, tmp_path / "out", wish)
    after = open_checkpoint(tmp_path / "out")
    assert made.rotated
    assert not torch.equal(after.tensor(TABLE).data, source.tensor(TABLE).data)
    assert after.config["tie_word_embeddings"] is False
    before, turned = (Subject(checkpoint) for checkpoint in (source, after))
    windows = before.tokens(text.read_text(), 64, 4)
    assert turned.perplexity(windows) == pytest.approx(before.perplexity(windows), rel=0.01)
    with pytest.raises(ValueError, match="is for a model rotated; ask for the same"):
        quantize(source, text, tmp_path / "b", replace(wish, rotate=False), recipe=tmp_path / "out" / FILE)


def test_scales_of_awq_go_into_up(tiny: Made, text: Path, tmp_path: Path) -> None:
    """The expert as it is stored gives what was measured: up's rows have been divided by what down's columns have."""
    source = open_checkpoint(model(tiny))
    subject = Subject(source)
    windows = subject.tokens(text.read_text(), 64, 8)
    found = Rounded()
    schemes = {part: [parse("w4g32z")] for part in ("gate_up", "down")}
    assert list(subject.measure(found, windows, schemes, "awq")) == subject.layers
    quantize(source, text, tmp_path / "out", Wish(6.0, "w4g32z", "awq", length=64, windows=8))
    after = Subject(open_checkpoint(tmp_path / "out"))
    scaled = 0
    assert not any(found.strengths.values())  # of features that are of one size
    for layer, expert, part in subject.blocks:
        if part != "down":
            continue
        gate_up, down = (found.weights[(layer, expert, p), "w4g32z"] for p in ("gate_up", "down"))
        got_up, got_down = (after.exact((layer, expert, p)) for p in ("gate_up", "down"))
        by = (got_down.abs().amax(0) / down.abs().amax(0)).log2().round().exp2()
        scaled += int((by != 1).any())
        inner = down.shape[1]
        torch.testing.assert_close(got_down / by, down, rtol=0, atol=1e-6)
        torch.testing.assert_close(got_up[inner:] * by[:, None], gate_up[inner:], rtol=2e-3, atol=1e-5)
        assert torch.equal(got_up[:inner], gate_up[:inner])
    assert scaled


@pytest.fixture
def loud(tiny: Made, tmp_path: Path) -> Path:
    """Experts whose inputs have features of very different sizes, as those of trained models do."""
    folder = tmp_path / "loud"
    shutil.copytree(model(tiny), folder)
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            tensors[name] = tensor * torch.exp2(torch.randint(-3, 4, tensor.shape, generator=draw).float())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_scales_of_gates_and_ups_lose_less(loud: Path) -> None:
    """One for all experts of a layer: its output changes by a fifth less at least, and so does, on tokens that were not
    seen, what the model says in the end.
    """
    found = {}
    draw = torch.Generator().manual_seed(1)
    seen, unseen = torch.randint(3, VOCAB, (2, 12, 64), generator=draw).tolist()
    for method in ("rtn", "awq"):
        subject, own = Subject(open_checkpoint(loud)), Rounded()
        schemes = {part: [parse("w4g32z")] for part in PARTS}
        assert list(subject.measure(own, seen, schemes, method)) == subject.layers
        end = End(subject, unseen)
        subject.put({key: w for (key, _), w in own.weights.items() if key[2] == "gate_up"})
        lost = sum(loss for (key, _), loss in own.losses.items() if key[2] == "gate_up")
        found[method] = lost, end.divergence(), own.strengths
    assert not found["rtn"][2]
    assert all(strength > 0 for strength in found["awq"][2].values())
    assert found["awq"][0] < 0.8 * found["rtn"][0]
    assert found["awq"][1] < found["rtn"][1]


@pytest.mark.parametrize("rotate", [False, True])
def test_scales_of_gates_and_ups_go_into_the_norm(rotate: bool, loud: Path, text: Path, tmp_path: Path) -> None:
    """The folder gives what was measured; following its recipe gives the same folder."""
    source, out = open_checkpoint(loud), tmp_path / "out"
    wish = Wish(5.0, "w4g32z,w8g32z", "awq", length=64, windows=8, rotate=rotate)
    made = quantize(source, text, out, wish)
    assert set(made.strengths) == {"0", "1", "2"}
    assert rotate or all(made.strengths.values())
    if not rotate:
        subject, found = Subject(source), Rounded()
        windows = subject.tokens(text.read_text(), 64, 8)
        list(subject.measure(found, windows, dict.fromkeys(PARTS, wish.parsed()), "awq", budget=5.0))
        assert {str(layer): strength for layer, strength in found.strengths.items()} == made.strengths
        subject.put(chosen(found, made.schemes))
        after = Subject(open_checkpoint(out))
        assert after.perplexity(windows) == pytest.approx(subject.perplexity(windows), rel=1e-3)
        norm = "model.layers.1.post_attention_layernorm.weight"
        before, now = (checkpoint.tensor(norm).data for checkpoint in (source, open_checkpoint(out)))
        by = (before / now).log2()
        assert torch.equal(by, by.round())
        assert by.any()
        router = "model.layers.1.mlp.gate.weight"
        assert torch.equal(open_checkpoint(out).tensor(router).data, source.tensor(router).data * by.exp2())
    again = quantize(source, text, tmp_path / "again", wish, recipe=out / FILE)
    assert again == made
    for file in sorted(out.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_strengths_are_kept_when_a_run_is_interrupted(
    loud: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = replace(WISH, rounding="awq")
    whole = quantize(open_checkpoint(loud), text, tmp_path / "whole", wish)
    strength, asked = Subject.strength, []

    def stopping(self: Subject, layer: int, *rest: object) -> float:
        asked.append(layer)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return strength(self, layer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Subject, "strength", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(open_checkpoint(loud), text, tmp_path / "out", wish)
    assert quantize(open_checkpoint(loud), text, tmp_path / "out", wish) == whole
    assert asked == [0, 1, 1, 2]


def test_scales_of_a_family_that_is_not_known_are_refused(
    tiny: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate, "FAMILIES", ("Llama",))
    with pytest.raises(CheckpointError, match="Qwen2Moe cannot be scaled as awq does it; families that can: Llama"):
        quantize(open_checkpoint(model(tiny)), text, tmp_path / "out", replace(WISH, rounding="awq"))


def test_an_interrupted_run_goes_on(tiny: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = open_checkpoint(model(tiny)), tmp_path / "out"
    whole = quantize(source, text, tmp_path / "whole", WISH)
    first, second, *_ = Subject(source).layers
    measured: list[tuple[int, int]] = []
    stopping = [(second, 1)]
    measure = Subject._measure_expert

    def counting(self: Subject, found: object, at: tuple[int, int], *rest: object) -> None:
        if at in stopping:
            stopping.clear()
            raise KeyboardInterrupt
        measured.append(at)
        measure(self, found, at, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Subject, "_measure_expert", counting)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, text, out, WISH)
    assert not out.exists()
    assert quantize(source, text, out, WISH) == whole
    twice = {at for at in measured if measured.count(at) > 1}
    assert twice == {(second, 0)}  # of the layer it broke off in, and nothing of the one before
    assert (first, 0) in measured
    # Of another wish nothing is taken over, nor of a damaged file.
    left = run.partial(tmp_path / "other")
    for content in ("{}", "", json.dumps({"key": "another", "picks": {}, "losses": []})):
        left.write_text(content)
        measured.clear()
        quantize(source, text, tmp_path / "other", WISH)
        assert len(measured) == len(set(measured)) > 0
        shutil.rmtree(tmp_path / "other")


def test_losses_count_as_what_they_cost_at_the_end(
    tiny: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose losses cost nothing there gets the fewest bits, and the recipe says what each costs."""
    source = open_checkpoint(model(tiny))
    made = quantize(source, text, tmp_path / "plain", WISH)
    layers = Subject(source).layers
    assert set(made.slope) == set(map(str, layers))
    assert all(value > 0 for value in made.slope.values())
    assert "nats a token at the end" in made.why(next(iter(made.schemes)))
    assert quantize(source, text, tmp_path / "again", replace(WISH, sensitivity="end")) == made
    assert load(tmp_path / "plain" / FILE, made.model) == made
    for other in ({"sensitivity": "layer"}, {"scope": "layer"}):
        assert quantize(source, text, tmp_path / next(iter(other)), replace(WISH, **other)).slope == {}
    asked: list[int] = []

    def slope(self: End, found: Rounded, layer: int, schemes: dict[str, str]) -> float:
        asked.append(layer)
        assert set(found.weights) == {(key, schemes[key[2]]) for key in found.sizes if key[0] == layer}
        return float(layer == layers[-1])

    monkeypatch.setattr(End, "slope", slope)
    made = quantize(source, text, tmp_path / "last", WISH)
    assert asked == layers
    bits = [[parse(s).bits for b, s in made.schemes.items() if b.startswith(f"{n}.")] for n in layers]
    assert max(bits[0] + bits[1]) < min(bits[2])


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_progress_counts_windows_and_roundings(
    scope: str, tiny: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passes go on step by step to their end, whether a run is whole or goes on where another stopped."""
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str) -> Callable[[int, int], None]:
        told[what] = []
        return lambda done, total: told[what].append((done, total))

    source, out, wish = open_checkpoint(model(tiny)), tmp_path / "out", replace(WISH, rounding="rtn", scope=scope)
    subject = Subject(source)
    write, begun = run.beside.write, []

    def stopping(*given: object) -> None:
        write(*given)  # type: ignore[arg-type]
        begun.append(given)
        if len(begun) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.beside, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, text, out, wish, progress=progress)
    before = len(told["measuring"])
    quantize(source, text, out, wish, progress=progress)
    layers, blocks = subject.model.config.layers, len(subject.blocks)
    seen = layers * len(subject.tokens(text.read_text(), wish.length, wish.windows))
    ends = (1 + layers) * seen if scope == "model" else 0
    rounded = blocks // 2 * sum(map(len, run.allowed_schemes(subject, wish.parsed(), wish.tie).values()))
    wanted = {"measuring": seen + rounded + ends, "writing": seen + blocks}
    assert set(told) == set(wanted)
    for what, steps in told.items():
        done = [each for each, _ in steps]
        assert {total for _, total in steps} == {wanted[what]}
        assert done == sorted(done)
        assert done[-1] == wanted[what]
    assert len(told["measuring"]) > before > 0
    assert len(told["writing"]) == wanted["writing"]


def test_a_state_of_another_compute_type_is_passed_over(
    tiny: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers in bfloat16, as on a GPU, are not those in float32."""
    source, out, wish = open_checkpoint(model(tiny)), tmp_path / "out", replace(WISH, rounding="rtn", scope="layer")
    write, resumed = run.beside.write, run.resumed
    kept: list[list[int]] = []

    def stopping(*given: object) -> None:
        write(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    def told(place: Path, key: str, subject: Subject) -> tuple[Rounded, dict[int, float]]:
        found = resumed(place, key, subject)
        kept.append(list(found[0].picks))
        return found

    monkeypatch.setattr(run, "resumed", told)
    monkeypatch.setattr(run.beside, "write", stopping)
    coarse = lambda source, device, _: Subject(source, device, torch.bfloat16)  # noqa: E731
    for kind in (Subject, Subject, coarse):
        monkeypatch.setattr(run, "Subject", kind)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, text, out, wish)
    assert kept == [[], [0], []]


def test_slopes_of_layers_are_kept_when_a_run_is_interrupted(
    tiny: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(model(tiny))
    whole = quantize(source, text, tmp_path / "whole", WISH)
    slope, asked = End.slope, []

    def stopping(self: End, found: Rounded, layer: int, schemes: dict[str, str]) -> float:
        asked.append(layer)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return slope(self, found, layer, schemes)

    monkeypatch.setattr(End, "slope", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, text, tmp_path / "out", WISH)
    assert quantize(source, text, tmp_path / "out", WISH) == whole
    assert asked == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"sensitivity": "middle"}, "sensitivity is 'middle'; allowed: layer, end"),
        ({"scope": "layer", "sensitivity": "end"}, "take the scope model, or the sensitivity layer"),
        ({"scope": "expert"}, "scope is 'expert'; allowed: layer, model"),
    ],
)
def test_wishes_that_make_no_sense(wish: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(WISH, **wish)


def test_what_cannot_be_is_said(tiny: Made, text: Path, tmp_path: Path) -> None:
    source, out = open_checkpoint(model(tiny)), tmp_path / "out"
    for wish, error, message in (
        (Wish(2.0, WISH.schemes, length=64), BudgetError, "2 bits a weight were asked for and the smallest .* 3.667"),
        (Wish(4.0, "w3g128z", length=64), ValueError, "None of w3g128z fits the 64 columns of gate_up"),
        (Wish(4.0, "w5g32z", length=64), ValueError, "w5g32z cannot be stored"),
        (Wish(4.0, "w4g32z", layout="compressed-tensors"), ValueError, "w4g32z has zeros.*lacks; take w4g32"),
        (Wish(4.0, "w1g32z", layout="compressed-tensors"), ValueError, "w1g32z has zeros.*lacks; take w2g32"),
        (Wish(9.0, "w8a8"), ValueError, "w8a8 asks for .*; take fp8a8, w4g128a8, or w8 for activations of 16 bits"),
        (Wish(9.0, "w4g32za8"), ValueError, "w4g32za8 asks for .*, or w4g32z for activations of 16 bits"),
        (Wish(4.0, "w1g32"), ValueError, "int1g32 lacks zeros, and two levels need"),
        (Wish(4.0, "w1g32z", length=64), ValueError, "None of w1g32z fits the 64 columns of gate_up"),
    ):
        with pytest.raises(error, match=message):
            quantize(source, text, out, wish)
    for budget, message in (
        (math.nan, r"is nan bits a weight; allowed: a number above 0"),
        (math.inf, r"is inf bits a weight; allowed: a number above 0"),
        (-1.0, r"is -1.0 bits a weight; allowed"),
        (0.0, r"is 0 bits a weight and 0 bytes; give one of both"),
    ):
        with pytest.raises(ValueError, match=message):
            Wish(budget)
    with pytest.raises(ValueError, match="is 4 bits a weight and 9 bytes; give one of both"):
        Wish(4.0, bytes=9)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(TextTooShort, match=r"short\.txt has fewer than 64 tokens, one window"):
        quantize(source, short, out, WISH)
    for wrong, message in (
        ({"rounding": "spqr"}, "rounding is 'spqr'; allowed: gptq, awq, rtn"),
        ({"scope": "world"}, "scope is 'world'"),
        ({"tie": "model"}, "tie is 'model'; allowed: block, expert, layer"),
        ({"layout": "gguf"}, "layout is 'gguf'; allowed: tenfold, compressed-tensors"),
        ({"r": 2.0}, "r is 2.0; allowed: 0"),
        ({"length": 1}, "64 windows of 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Wish(4.0, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no experts"):
        quantize(open_checkpoint(tiny("llama")), text, out, WISH)
    dense = Tiny("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1, 2]})
    with pytest.raises(ValueError, match="has no experts"):
        quantize(open_checkpoint(make_checkpoint(dense, tmp_path / "dense")), text, out, WISH)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ValueError, match="is there already"):
        quantize(source, text, out, WISH)
    assert (out / "mine").exists()


def test_a_budget_of_bytes_is_one_of_bits(tiny: Made, text: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model(tiny))
    weights = sum(m.rows * m.cols for m in Subject(source).blocks.values())
    asked = int(weights * WISH.bits / 8)
    made = quantize(source, text, tmp_path / "out", replace(WISH, bits=0.0, bytes=asked))
    own = open_checkpoint(tmp_path / "out")
    experts = (own.tensor(n) for n in own.names() if ".experts." in n)
    assert sum(t.numel() * t.element_size() for raw in experts for t in (raw.data, *raw.extras)) <= asked
    assert made.schemes == quantize(source, text, tmp_path / "again", WISH).schemes
    small = int(weights * 3 / 8)
    with pytest.raises(
        BudgetError, match=rf"^{small} bytes were asked for and the smallest schemes take (\d+),"
    ) as told:
        quantize(source, text, tmp_path / "b", replace(WISH, bits=0.0, bytes=small))
    least = int(str(told.value).split(" take ")[1].split(",")[0])
    quantize(source, text, tmp_path / "b", replace(WISH, bits=0.0, bytes=least))


@pytest.mark.parametrize("tie", ["block", "layer"])
@pytest.mark.parametrize("sensitivity", ["end", "layer"])
def test_bits_are_of_the_columns_that_blocks_have(sensitivity: str, tie: str, text: Path, tmp_path: Path) -> None:
    """The least that is named is enough, and the recipe says what the files take, where rows of parts differ in length
    and share a scale each.
    """
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
    counts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    source = open_checkpoint(make_checkpoint(Tiny("Qwen2Moe", {**sizes, **counts}), tmp_path / "long"))
    wish = Wish(4.0, "w4a8,fp8a8", "rtn", length=64, windows=8, tie=tie, sensitivity=sensitivity)
    with pytest.raises(BudgetError, match=r"4 bits a weight were asked for and the smallest schemes take 4\.084,"):
        quantize(source, text, tmp_path / "out", wish)
    made = quantize(source, text, tmp_path / "out", replace(wish, bits=4.084))
    assert made.bits == pytest.approx(4 + (2 * 16 / 256 + 16 / 128) / 3)
    weights = Subject(source).sizes.values()
    bits = {part: 4 + 16 / cols for part, cols in Subject(source).cols.items()}
    assert bits == {"gate_up": 4.0625, "down": 4.125}
    own = open_checkpoint(tmp_path / "out")
    experts = [own.tensor(n) for n in own.names() if ".experts." in n]
    taken = sum(t.numel() * t.element_size() for raw in experts for t in (raw.data, *raw.extras))
    assert 8 * taken / sum(weights) == pytest.approx(made.bits)
    assert [corner.bytes for corner in made.front] == [taken]
    fine = quantize(source, text, tmp_path / "fine", replace(wish, bits=0.0, bytes=int(sum(weights) * 8.3 / 8)))
    assert set(fine.schemes.values()) == {"fp8a8"}
    assert fine.bits == pytest.approx(8 + (2 * 32 / 256 + 32 / 128) / 3) == Subject(source).bits(parse("fp8a8"))


def test_parts_of_one_scheme_get_what_fits_both(text: Path, tmp_path: Path) -> None:
    """And a budget below that is refused before anything is measured."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    source = open_checkpoint(make_checkpoint(Tiny("Qwen2Moe", {**sizes, "num_hidden_layers": 2}), tmp_path / "long"))
    wish = Wish(3.5, "w2g128z,w4g32z", "rtn", length=64, windows=8)
    made = quantize(source, text, tmp_path / "block", wish)
    assert set(made.schemes.values()) == {"w2g128z", "w4g32z"}
    for tie in ("expert", "layer"):
        with pytest.raises(BudgetError, match=r"3\.5 bits a weight were asked .* smallest schemes take 5\.000"):
            quantize(source, text, tmp_path / tie, replace(wish, tie=tie), progress=lambda what: pytest.fail(what))
        with pytest.raises(ValueError, match="None of w2g128z fits the 256 and 64 columns of gate_up and down; add"):
            quantize(source, text, tmp_path / tie, replace(wish, tie=tie, schemes="w2g128z"))


@pytest.mark.parametrize("r", [1.0, 0.5, 0.0])
def test_the_recipe_has_the_front(r: float, tiny: Made, text: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model(tiny))
    made = quantize(source, text, tmp_path / "out", replace(WISH, r=r))
    assert [corner.chosen for corner in made.front].count(True) == 1
    assert made.front[0].chosen or r < 1
    assert made.front[-1].chosen == (r == 0)
    own = next(corner for corner in made.front if corner.chosen)
    assert own.bits == pytest.approx(made.bits)
    for before, after in pairwise(made.front):
        assert (before.loss < after.loss, before.time > after.time) == (True, True)
    assert all(corner.bits <= WISH.bits and corner.bytes > 0 for corner in made.front)
    content = json.loads((tmp_path / "out" / FILE).read_text())
    assert content["front"][0] == asdict(made.front[0])
    assert load(tmp_path / "out" / FILE, made.model) == made
    content.pop("front")  # as recipes were before
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert load(tmp_path / "old.json", made.model) == replace(made, front=())
    for front in ([{"bits": 1}], [{**asdict(own), "loss": "x"}], 3):
        (tmp_path / "bad.json").write_text(json.dumps(content | {"front": front}))
        with pytest.raises(ValueError, match="is no recipe"):
            load(tmp_path / "bad.json", made.model)


def test_a_front_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [Corner(4.25, 900, 1.0, 3.0, True), Corner(3.25, 700, 2.0, 1.5)]
    assert relative(found) == [1.0, 0.5]
    for front in (found, [replace(found[0], loss=0.0), found[1]]):
        assert draw(front, "measured", "a model", tmp_path / "front.png").stat().st_size > 10_000


@pytest.mark.parametrize("cost", ["", "measured on a stand-in", "bytes read, since there is no GPU here to measure on"])
def test_a_front_is_labelled_by_what_it_has(cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    said: list[str] = []
    save = figures.Figure.savefig

    def saving(figure: Any, *given: Any, **more: Any) -> None:
        said.extend(axis.get_xlabel() for axis in figure.axes)
        save(figure, *given, **more)

    monkeypatch.setattr(figures.Figure, "savefig", saving)
    draw([Corner(4.25, 900, 1.0, 3.0, True), Corner(3.25, 700, 2.0, 1.5)], cost, "a model", tmp_path / "front.png")
    measured = cost.startswith("measured")
    assert said[1].startswith("time of experts" if measured else "bits of the experts that picks read")


def test_foreign_recipes_and_quantised_models_are_refused(tiny: Made, text: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(tiny("mixtral")), text, tmp_path / "a", WISH)
    source = open_checkpoint(model(tiny))
    recipe = tmp_path / "a" / FILE
    with pytest.raises(ValueError, match="was made from another model"):
        quantize(source, text, tmp_path / "b", WISH, recipe=recipe)
    with pytest.raises(ValueError, match="has zeros"):
        quantize(
            open_checkpoint(tiny("mixtral")),
            text,
            tmp_path / "b",
            replace(WISH, layout="compressed-tensors", schemes="w4g32"),
            recipe=recipe,
        )
    written = json.loads(recipe.read_text())
    other = {**written["schemes"], "0.0.down": "w3g32z"}  # that was not measured
    wrong = {"schema": 99}, {"schemes": other}, {"picks": {}}, {"strengths": {"0": "x"}}, {"cost": 5}, {"bits": None}
    for content in ("[]", "{", *(json.dumps(written | change) for change in wrong)):
        recipe.write_text(content)
        with pytest.raises(ValueError, match="is no recipe"):
            load(recipe, written["model"])
    with pytest.raises(ValueError, match="is quantised already"):
        quantize(open_checkpoint(tmp_path / "a"), text, tmp_path / "b", WISH)
    assert not (tmp_path / "b").exists()


def test_why_a_block_got_its_scheme() -> None:
    made = Recipe(
        "m",
        "t",
        9,
        "gptq",
        False,
        "model",
        1.0,
        4.0,
        {"0.1.down": "w4"},
        {"0.1.down": {"w2": 9.0, "w4": 1.0}},
        {"0": [1, 3]},
    )
    assert made.why("0.1.down") == (
        "layer 0, expert 1, down: w4. 75.0% of the layer's picks went to it; squared error of the layer's output by "
        "scheme: w2 9, w4 1."
    )


def test_a_folder_that_is_left_unfinished_is_gone(tmp_path: Path) -> None:
    with Folder(tmp_path / "out") as folder:
        folder.add({"a": torch.ones(2)})
        assert list(tmp_path.iterdir()) == [folder.partial]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is '2'"),
        ({"formats": None}, "formats is"),
        ({"formats": {}}, "has codes, and quantization_config names no format"),
    ],
)
def test_damaged_models_get_a_sentence(
    change: dict[str, object], message: str, tiny: Made, text: Path, tmp_path: Path
) -> None:
    quantize(open_checkpoint(model(tiny)), text, tmp_path / "a", WISH)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a")


def test_a_format_that_the_tensors_do_not_fit(tiny: Made, text: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(model(tiny)), text, tmp_path / "a", WISH)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    formats = config["quantization_config"]["formats"]
    module = next(iter(formats))
    for name, message in (
        ("int9", "is no packed format"),
        ("fp8", "stored as I"),
        ("int1g32", "has the format 'int1g32', int1g32 lacks zeros"),
        ("int8g64z", "scales has shape|stored as I32"),
    ):
        formats[module] = name
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "a")
