"""Calibration of the softmax on a tiny model, against scores worked out by hand."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine import calibrate as module
from tenfold.engine.calibrate import calibrate, read_state, write_state
from tenfold.ops.attention.unified_max import STEP
from tenfold.ops.oracle import Oracle
from tenfold.serve.cli.calibrate import LEAST_TOKENS, softmax
from tenfold.weights import beside
from tenfold.weights.softmax import SoftmaxStatistics

TEXT = "the land is wide and the river runs through it to the sea, and nobody knows why. " * 12


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def config(model: Path, **rest: Any) -> EngineConfig:
    return EngineConfig(model=str(model), device="cpu", kernels="torch", page_size=8, **rest)


def silent(done: int, total: int) -> None:
    pass


def measured(model: Path, text: Path, progress: Callable[[int, int], None] = silent, **rest: Any) -> SoftmaxStatistics:
    return calibrate(config(model, **rest), text, 20, 4, progress, silent)[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_row_maxima_are_those_of_the_scores(
    tiny: Any, family: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    original = Oracle.attend

    def attend(self: Oracle, q: Any, keys: Any, values: Any, *rest: Any) -> Any:
        seen.append((q, keys.clone(), rest[3]))
        return original(self, q, keys, values, *rest)

    monkeypatch.setattr(Oracle, "attend", attend)
    found = measured(tiny(family), text)
    layers = len(found.low)
    assert len(seen) == 4 * layers
    assert found.tokens == 80
    for layer in range(layers):
        tops = [top_scores(q, keys, spec) for q, keys, spec in seen[layer::layers]]
        rows = torch.cat(tops, 1)
        torch.testing.assert_close(torch.tensor(found.low[layer]), rows.amin(1).float())
        torch.testing.assert_close(torch.tensor(found.high[layer]), rows.amax(1).float())
        assert (torch.tensor(found.rare_low[layer]) <= rows.amin(1) + STEP).all()
    assert found.score_low < found.score_high <= max(map(max, found.high)) + STEP


def top_scores(q: Any, keys: Any, spec: Any) -> Any:
    """The largest score of each head and query, [heads, T], one query after the other in float64."""
    count = len(q)
    k = keys.transpose(0, 1).reshape(spec.kv_heads, -1, spec.head_dim).double()
    heads = q.view(count, spec.heads, spec.head_dim).double()
    group = spec.heads // spec.kv_heads
    rows = []
    for t in range(count):
        first = max(0, t - spec.window + 1) if spec.window else 0
        scores = torch.stack([k[h // group, first : t + 1] @ heads[t, h] for h in range(spec.heads)]) * spec.scale
        rows.append((spec.softcap * torch.tanh(scores / spec.softcap) if spec.softcap else scores).amax(1))
    return torch.stack(rows, 1)


def test_an_interrupted_run_goes_on_where_it_stopped(tiny: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    whole = measured(model, text)
    monkeypatch.setattr(module, "PATIENCE", -1.0)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, text, stop)
    told: list[tuple[int, int]] = []
    again = measured(model, text, lambda done, total: told.append((done, total)))
    assert told == [(3, 4), (4, 4)]
    assert again == whole
    assert list((text.parent / "home" / "softmax").iterdir()) == []


def interrupted(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state that a run leaves which is stopped after its second window; the first one was saved."""
    monkeypatch.setattr(module, "PATIENCE", -1.0)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, text, stop)
    (partial,) = (text.parent / "home" / "softmax").glob("*.partial")
    return partial


def computed(model: Path, text: Path, **rest: Any) -> list[int]:
    """The windows that a run does not find done."""
    told: list[int] = []
    measured(model, text, lambda done, total: told.append(done), **rest)
    return told


def test_what_another_run_left_is_not_taken_over(tiny: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    interrupted(model, text, monkeypatch)
    text.write_text(TEXT.upper())
    assert computed(model, text) == [1, 2, 3, 4]


@pytest.mark.parametrize("changed", [{}, {"weights": "dense"}, {"kv_dtype": "bfloat16"}], ids=str)
def test_windows_count_only_with_the_same_weights_and_cache(
    tiny: Any, text: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str]
) -> None:
    model = tiny("llama")
    interrupted(model, text, monkeypatch)
    assert computed(model, text, **changed) == ([1, 2, 3, 4] if changed else [2, 3, 4])


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: b"",
        lambda state: b"PK\x03\x04" + bytes(100),
        lambda state: state[: len(state) // 2],
        lambda state: state[:200] + bytes(40) + state[240:],
        lambda state: state + b"\0",
    ],
    ids=["empty", "another zip", "cut", "overwritten", "longer"],
)
def test_a_damaged_state_is_passed_over(
    tiny: Any, text: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    model = tiny("llama")
    partial = interrupted(model, text, monkeypatch)
    partial.write_bytes(damage(partial.read_bytes()))
    assert computed(model, text) == [1, 2, 3, 4]


def test_runs_at_one_time_leave_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes."""
    monkeypatch.setattr(beside.os, "getpid", threading.get_ident)
    path, failures = tmp_path / "new" / "model.partial", []

    def save(value: int) -> None:
        try:
            for _ in range(50):
                write_state(path, "key", {"values": torch.full((4096,), value).numpy()})
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(path.parent.iterdir()) == [path]
    assert len(set(read_state(path, "key")["values"].tolist())) == 1
    assert read_state(path, "another key") == {}


def test_latent_attention_is_refused(tiny: Any, text: Path) -> None:
    with pytest.raises(ValueError, match=r"latent attention.*takes no measured maximum; allowed: models without"):
        measured(tiny("deepseek-v2"), text)


def test_the_command_writes_and_reports(tiny: Any, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text.parent / "model").symlink_to(tiny("llama"))
    model = text.parent / "model"
    text.write_text(TEXT * 6)
    softmax(config(model), text, 20, 50, False)
    said = capsys.readouterr().out
    assert "bfloat16, a phi for each head" in said
    assert "serves 3 of 3 layers" in said
    assert said.splitlines()[-1] == f"saved in {model / 'softmax.json'}"
    softmax(config(model), text, 20, 50, True)
    assert json.loads(capsys.readouterr().out)["tokens"] == LEAST_TOKENS
    (model / "softmax.json").unlink()


@pytest.mark.parametrize(
    ("content", "windows", "said"),
    [
        (b"word", 50, "gave 4 tokens at most; allowed: from 1000"),
        (b"the land is wide " * 60, 500, "The text gave .* tokens at most"),
        (bytes(range(256)) * 20, 50, "is no text: .*UTF-8"),
        (b"\0" * 4000, 50, "is no text"),
        (6 * TEXT.encode(), 4, "raise --window or --windows"),
    ],
)
def test_too_little_text_leaves_what_was_saved(tiny: Any, text: Path, content: bytes, windows: int, said: str) -> None:
    (text.parent / "model").symlink_to(tiny("llama"))
    kept = text.parent / "model" / "softmax.json"
    kept.write_text("kept")
    text.write_bytes(content)
    try:
        with pytest.raises(ValueError, match=said):
            softmax(config(kept.parent), text, 20, windows, False)
        assert kept.read_text() == "kept"
    finally:
        kept.unlink()


def test_short_and_empty_texts(tiny: Any, text: Path) -> None:
    text.write_text("the land")
    assert measured(tiny("llama"), text).tokens < 20
    text.write_text("")
    with pytest.raises(ValueError, match="text is empty"):
        measured(tiny("llama"), text)
    with pytest.raises(ValueError, match="0 windows"):
        calibrate(config(tiny("llama")), text, 20, 0, silent, silent)
