"""Calibration of a KV cache on a tiny model: what it sees, that it is resumable, and what the command says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.bench.kv_formats import Exact, Format, Skvq
from tenfold.bench.kv_model import Bench
from tenfold.cache.skvq.calibrate import Sample
from tenfold.engine import calibrate_kv as module
from tenfold.engine.calibrate_kv import Showing, calibrate_kv
from tenfold.engine.core import Engine
from tenfold.engine.llm import LLM
from tenfold.engine.request import Request, SamplingParams
from tenfold.ops.kv.quantize import Grouping
from tenfold.ops.kv.spec import PackedSpec
from tenfold.ops.oracle import Oracle
from tenfold.serve.cli.calibrate_kv import kv
from tenfold.weights.kv_calibration import SIDES, KvCalibration, key_bias, load
from tenfold.weights.open import open_checkpoint
from tests.engine.fake import drain
from tests.steps import Sequences, make_store

TEXT = "the land is wide and the river runs through it to the sea, and nobody knows why. " * 16
WINDOW, WINDOWS = 255, 4  # of which SPEC and SPAN pack as many tokens as there must be
SPEC = PackedSpec.parse("k2v1.5g32w4s1")
SPAN = PackedSpec(2, 1.5, 32, span=2, window=4, sinks=1)  # for models with 2 kv heads of 16 channels


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small spend their time waiting for other threads wherever cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(model: Path, **rest: Any) -> EngineConfig:
    return EngineConfig(model=str(model), device="cpu", kernels="torch", page_size=8, threads=1, **rest)


def silent(done: int, total: int) -> None:
    pass


def measured(
    model: Path, text: Path, spec: PackedSpec, progress: Callable[[int, int], None] = silent, **rest: Any
) -> KvCalibration:
    return calibrate_kv(config(model, **rest), spec, text, WINDOW, WINDOWS, progress, silent)[0]


def same(a: KvCalibration, b: KvCalibration) -> bool:
    return a.header == b.header and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


@pytest.mark.parametrize(("family", "spec"), [("qwen3", SPEC), ("qwen2", SPAN)])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny: Any, text: Path, monkeypatch: pytest.MonkeyPatch, family: str, spec: PackedSpec
) -> None:
    model = tiny(family)
    whole = measured(model, text, spec)
    assert whole.header.tokens == WINDOW * WINDOWS
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    for stop in (3, 6):  # in the first pass, and in the second one

        def interrupt(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measured(model, text, spec, interrupt)
        # What was done when the interruption came is not saved yet, so it is done again.
        told: list[int] = []

        def tell(done: int, total: int, told: list[int] = told) -> None:
            told.append(done)

        again = measured(model, text, spec, tell)
        assert told == list(range(stop, 9))
        assert same(again, whole)
    assert list((text.parent / "home" / "kv").iterdir()) == []


def test_what_another_run_left_is_not_taken_over(tiny: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    begun: list[int] = []

    def stop(done: int, total: int) -> None:
        begun.append(done)
        if len(begun) == 2:
            raise KeyboardInterrupt

    def first(**rest: Any) -> int:
        """The first window that is not found done; its successor is not computed."""
        begun.clear()
        with pytest.raises(KeyboardInterrupt):
            measured(model, text, SPEC, stop, **rest)
        return begun[0]

    assert [first(), first()] == [1, 2]
    assert [first(weights="dense"), first(weights="dense", kv_dtype="bfloat16")] == [1, 1]
    (partial,) = (text.parent / "home" / "kv").glob("*.partial")
    state = partial.read_bytes()
    for damaged in (b"PK\x03\x04" + bytes(100), state[:-40], state[:200] + bytes(40) + state[240:]):
        partial.write_bytes(damaged)
        assert first(weights="dense", kv_dtype="bfloat16") == 1


def test_keys_are_grouped_as_their_bias_leaves_them(tiny: Any, text: Path) -> None:
    model = tiny("qwen2")
    found = measured(model, text, SPAN)
    checkpoint = open_checkpoint(model)
    for layer in range(3):
        assert torch.equal(found.tensors["keys.shift"][layer], key_bias(checkpoint, layer, 32))
    assert not found.tensors["values.shift"].any()
    after = PackedSpec(2, 1.5, 32, span=2, window=4, sinks=1, rotary="post")
    assert not measured(model, text, after).tensors["keys.shift"].any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3-partial"])
def test_what_is_shown_is_what_attention_reads(tiny: Any, family: str) -> None:
    from tenfold.models.table import build_model
    from tenfold.weights.load import Weights

    checkpoint = open_checkpoint(tiny(family))
    showing = Showing(Oracle())
    model = build_model(checkpoint.config, Weights(checkpoint, showing), 64)  # type: ignore[arg-type]
    store = make_store(model.config, pages=2, page_size=16)
    showing.layers = {keys.data_ptr(): layer for layer, keys in enumerate(store.keys)}
    sequences = Sequences(store)
    shown: list[Any] = []
    showing.watch = lambda layer, sample: shown.append((layer, sample))
    step = sequences.step({0: list(range(3, 15))})
    model.forward(step)
    assert [layer for layer, _ in shown] == list(range(model.config.layers))
    page, rows = step.slots // 16, step.slots % 16
    for layer, sample in shown:
        turned = sample.turn(sample.keys.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(turned, store.keys[layer][page, :, rows])
        torch.testing.assert_close(sample.values, store.values[layer][page, :, rows])


def test_the_command_writes_what_can_be_loaded(tiny: Any, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text.parent / "model").symlink_to(tiny("qwen3"))
    model = text.parent / "model"
    kv(config(model), text, str(SPEC), WINDOW, WINDOWS, False)
    said = capsys.readouterr().out
    path = model / f"kv.{SPEC}.json"
    assert said.splitlines()[-1] == f"saved in {path}"
    assert "nothing to reorder" in said
    found = load(open_checkpoint(model), str(SPEC), 3, 64, 2)
    assert all((found.tensors[f"{side}.clip"] <= 1).all() for side in SIDES)
    for file in (path, path.with_suffix(".safetensors")):
        file.unlink()


def test_texts_and_models_that_do_not_do(tiny: Any, text: Path) -> None:
    with pytest.raises(ValueError, match="cannot be cut into them"):
        measured(tiny("llama"), text, SPEC)
    with pytest.raises(ValueError, match=r"packs 488 of 4 windows of 255; allowed: from 1000.*raise --window or --win"):
        measured(tiny("qwen3"), text, PackedSpec(2, 2, 32))
    with pytest.raises(ValueError, match=r"packs 0 of 4 windows of 255; .*raise --window\.$"):
        measured(tiny("qwen3"), text, PackedSpec(2, 2, 32, window=256))
    with pytest.raises(ValueError, match=r"packs 236 of 4 windows of 64; .*raise --max-model-len or --windows"):
        measured(tiny("qwen3"), text, SPEC, max_model_len=64)
    text.write_text("the land is wide")
    with pytest.raises(ValueError, match=r"of 1 windows of \d+; .*give a text of some thousand words"):
        measured(tiny("qwen3"), text, SPEC)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "text is empty"),
        (b"word", "allowed: from 1000"),
        (bytes(range(256)) * 20, "is no text: .*UTF-8"),
        (b"\0" * 4000, "is no text"),
    ],
)
def test_what_is_no_text_leaves_what_was_saved(tiny: Any, text: Path, content: bytes, said: str) -> None:
    (text.parent / "model").symlink_to(tiny("qwen3"))
    kept = text.parent / "model" / f"kv.{SPEC}.json"
    kept.write_text("kept")
    text.write_bytes(content)
    try:
        with pytest.raises(ValueError, match=said):
            kv(config(kept.parent), text, str(SPEC), WINDOW, WINDOWS, False)
        assert kept.read_text() == "kept"
    finally:
        kept.unlink()


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("deepseek-v2", "skvq", "one latent vector .* stored as computed; allowed: auto"),
        ("qwen3", "fp8", "needs no calibration; allowed: skvq"),
        ("qwen3", "k9v9g32", "allowed: auto, dense, fp8, int4, skvq"),
    ],
)
def test_formats_that_a_model_cannot_have_or_that_need_nothing(
    tiny: Any, text: Path, family: str, name: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        kv(config(tiny(family)), text, name, WINDOW, WINDOWS, False)


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", str(SPAN)), ("llama", "k3v2g16w4s1-post"), ("gemma3", "k3v2g16w4s1")]
)
def test_the_engine_sees_what_was_judged(tiny: Any, text: Path, family: str, name: str) -> None:
    """Log-probabilities of a prompt through pages, rooms and chunks, against the judge's whole sequences."""
    model = tiny(family)
    spec = PackedSpec.parse(name)
    with pytest.raises(ValueError, match=rf"no calibration for the KV format .*calibrate kv MODEL .*{name}"):
        LLM(model=str(model), kv_cache=name, device="cpu")
    kv(config(model), text, name, WINDOW, WINDOWS, as_json=False)
    settings = replace(config(model), kv_cache=name, max_step_tokens=7, max_model_len=64, max_batch=2)
    engine = Engine.load(settings, tokens_only=True)
    prompt = tuple(range(20, 50))
    engine.add(Request("r", prompt, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)))
    (found,) = [o.prompt_logprobs for o in drain(engine) if o.prompt_logprobs]
    judge = Bench(model, 64)
    tensors = measured(model, text, spec).tensors

    def groupings(side: str) -> list[Grouping]:
        parts = [tensors[f"{side}.{part}"].unbind() for part in Grouping.__slots__]
        return [Grouping(group.long(), *rest) for group, *rest in zip(*parts)]

    format: Format = Skvq(
        name, spec, groupings(SIDES[0]), groupings(SIDES[1]), judge.config.kv_heads, judge.config.head_dim
    )
    if family == "gemma3":
        format = Local(format, judge.config.windows)
    logs = judge.logits(prompt, format, range(len(prompt) - 1)).log_softmax(-1)
    expected = [float(logs[i, token]) for i, token in enumerate(prompt[1:])]
    assert [p.logprob for p in found if p is not None] == pytest.approx(expected, abs=2e-3)
    exact = judge.logits(prompt, Exact(), range(len(prompt) - 1)).log_softmax(-1)
    assert float((exact - logs).abs().max()) > 0.01


@dataclass(frozen=True)
class Local:
    """A format, but layers with a window are stored as computed."""

    format: Format
    windows: tuple[int, ...]
    name: str = "local"
    bits: float = 16
    kept: int = 0

    def store(self, layer: int, sample: Sample) -> tuple[Tensor, Tensor]:
        return self._of(layer).store(layer, sample)

    def old(self, layer: int, queries: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return self._of(layer).old(layer, queries, length)

    def _of(self, layer: int) -> Format:
        return Exact() if self.windows[layer] else self.format
