"""Quality of experts of few bits: what is put back, budgets, rows; on a random model, whose numbers say nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")

from typer.testing import CliRunner

from tenfold.bench import claims_moe, mxmoe, report
from tenfold.bench.cli import app
from tenfold.quantize.mxmoe.sensitivity import PARTS
from tenfold.quantize.mxmoe.subject import End, Rounded, Subject, blocks_of, name_of
from tenfold.quantize.rotate import Rotated
from tenfold.quantize.schemes import parse
from tenfold.weights.open import open_checkpoint
from tests.tiny import VOCAB

SCHEMES = [parse(name) for name in ("w2g8z", "w4g8z", "w8g8z")]
BITS = {str(s): s.stored_bits(64) for s in SCHEMES}


def windows(seed: int, count: int = 5) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (64,), generator=draw).tolist() for _ in range(count)]


def measured(subject: Subject, seed: int, method: str = "rtn", count: int = 5, schemes: int = 3) -> Rounded:
    found = Rounded()
    assert (
        list(subject.measure(found, windows(seed, count), dict.fromkeys(PARTS, SCHEMES[:schemes]), method))
        == subject.layers
    )
    return found


@pytest.fixture
def subject(tiny: Callable[[str], Path]) -> Subject:
    return Subject(open_checkpoint(tiny("qwen2-moe")))


def test_rows_of_uniform_and_mixed_bits(subject: Subject) -> None:
    found = measured(subject, 1)
    assert set(found.sizes) == set(subject.blocks)
    assert all(sum(picks) == 5 * 64 * 2 for picks in found.picks.values())
    rows = mxmoe.rows(subject, found, BITS, [7.0, 9.0], windows(2), lambda _: None)
    kinds = [row["kind"] for row in rows]
    assert kinds[:4] == ["exact", *(f"uniform {name}" for name in BITS)]
    assert len(rows) == 4 + 2 * 4
    for row in rows[4:]:
        assert row["bits"] <= (7.0 if row in rows[4:8] else 9.0) + 1e-6
        assert sum(row["schemes"].values()) == len(found.sizes)
    assert rows[0]["divergence"] == pytest.approx(0, abs=1e-6)
    for measure in ("perplexity", "divergence"):
        closest = [abs(row[measure] - rows[0][measure]) for row in rows[1:4]]
        assert closest == sorted(closest, reverse=True)
    alone, tied = ([r["loss"] for r in rows if r["kind"] == f"mixed layer {tie}"] for tie in ("block", "expert"))
    assert all(a <= b + 1e-9 for a, b in zip(alone, tied))
    assert subject.perplexity(windows(2)) == pytest.approx(rows[0]["perplexity"])  # all exact again


def test_losses_of_layers_may_be_weighed_by_what_they_cost_in_the_end(subject: Subject) -> None:
    found = measured(subject, 6)
    end = End(subject, windows(6))
    assert end.divergence() == pytest.approx(0, abs=1e-6)
    coarse, fine = (
        {layer: end.slope(found, layer, dict.fromkeys(PARTS, name)) for layer in found.picks}
        for name in ("w2g8z", "w4g8z")
    )
    assert end.divergence() == pytest.approx(0, abs=1e-6)  # all exact again
    assert all(value > 0 for value in coarse.values())
    for layer in found.picks:  # a property of the layer more than of the scheme, whose losses differ by a power of ten
        assert fine[layer] == pytest.approx(coarse[layer], rel=0.5)
    slope = {layer: 1.0 + layer for layer in found.picks}
    rows = mxmoe.rows(subject, found, BITS, [8.0], windows(7, 2), lambda _: None, slope)
    assert [row["kind"] for row in rows[-2:]] == ["mixed model block end", "mixed model expert end"]
    plain = {b.name: b for b in blocks_of(found, BITS, "model", False)}
    for block in blocks_of(found, BITS, "model", False, slope):
        factor = slope[int(block.name.split(".")[0])]
        assert block.loss == pytest.approx({name: factor * loss for name, loss in plain[block.name].loss.items()})


def test_fewer_distributions_are_held_of_a_large_vocabulary(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    own = windows(8, 2)
    whole = End(subject, own)
    assert [len(exact) for exact in whole.exact] == [16, 16]
    monkeypatch.setattr("tenfold.quantize.mxmoe.subject.HELD", 8 * VOCAB)
    few = End(subject, own)
    assert [len(exact) for exact in few.exact] == [4, 4]
    subject.put({key: torch.zeros_like(subject.exact(key)) for key in subject.blocks})
    assert few.divergence() == pytest.approx(few.judge()[1]) != pytest.approx(0)
    assert few.judge()[0] == whole.judge()[0] == pytest.approx(subject.perplexity(own))


def test_windows_are_judged_alike_alone_and_together(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*windows(9, 3), windows(9, 1)[0][:40], *windows(10, 2)]
    together = list(subject.logs(own, 3))
    monkeypatch.setattr("tenfold.quantize.mxmoe.subject.LOGITS", 1)
    for one, other in zip(together, subject.logs(own, 3), strict=True):
        torch.testing.assert_close(one, other)


def test_claims_table_and_picture(tmp_path: Path) -> None:
    final, whole = claims_moe.FINAL, "mixed model expert end"
    kinds = [
        *(("exact", 16.0, 5.0), ("uniform w2", 2.25, 9.0), ("uniform w3", 3.25, 6.0)),
        *(("mixed layer block", 2.25, 8.0), ("mixed layer expert", 2.25, 8.5), (final, 2.25, 7.5), (whole, 2.25, 7.4)),
        *((final, 3.0, 6.5), (final, 3.25, 6.1)),
    ]
    rows = [
        {"kind": kind, "bits": bits, "perplexity": perplexity, "divergence": perplexity - 5}
        for kind, bits, perplexity in kinds
    ]
    machine = {"hardware": "here", "commit": "c", "date": "2026-11-28"}
    told = {"texts": ["a.txt", "b.txt"], "model": "m", "method": "gptq", "command": "python", "machine": machine}
    data = {"suite": "mxmoe", "rows": rows, "schemes": {"w3": 3.25, "w2": 2.25}, **told}
    found = claims_moe.of_suites({"mxmoe": [data]})
    assert [(c.id, c.value, c.met) for c in found[:5]] == [
        ("M4", pytest.approx(9 / 7.5, rel=1e-3), True),
        ("M4", pytest.approx(8.5 / 8, rel=1e-3), True),
        ("M4", pytest.approx(7.4 / 7.5, rel=1e-3), False),
        ("M4", pytest.approx(6 / 6.1, rel=1e-3), False),
        ("M4", 1, False),
    ]
    assert found[5].value == pytest.approx(4 / 2.5, rel=1e-3)
    assert len(found) == 10
    assert found[0].what.endswith("at 2.25 bits, schemes from w2")
    assert "| uniform w2 | 2.250 | 9.000 | +80.0% | 4.0000 |" in report.mxmoe_table(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert "### Bits of experts, m" in report.tables(tmp_path)
    assert [path.stat().st_size > 10_000 for path in report.charts(tmp_path)] == [True]


def test_the_command_prints_the_table_and_draws(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text, out, picture = tmp_path / "text.txt", tmp_path / "mxmoe.json", tmp_path / "bits.png"
    text.write_text("The quick brown fox jumps over the lazy dog, and nobody knows why. " * 40)
    words = ["mxmoe", "--model", str(tiny("qwen2-moe-even")), "--calibrate", str(text), "--text", str(text)]
    words += ["--schemes", "w2g32z,w4g32z", "--bits", "4.5", "--method", "rtn", "--length", "64", "--windows", "4"]
    done = CliRunner().invoke(app, [*words, "--judged", "2", "--out", str(out), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert report.mxmoe_table(json.loads(out.read_text())) in done.output
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["moe", "mxmoe", "phases"])
def test_each_is_a_command_of_the_bench(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert f"{name} [-h]" in done.output


def test_rounded_blocks_are_put_in_place_and_taken_back(subject: Subject) -> None:
    before = subject.perplexity(windows(3))
    key = next(iter(subject.blocks))
    subject.put({key: torch.zeros_like(subject.exact(key))})
    assert subject.perplexity(windows(3)) != before
    subject.put({})
    assert subject.perplexity(windows(3)) == before
    assert name_of(key).count(".") == 2


def test_better_rounding_loses_less(subject: Subject) -> None:
    plain, fitted = (measured(subject, 4, how, 12, 1) for how in ("rtn", "gptq"))
    assert sum(fitted.losses.values()) < sum(plain.losses.values())


def test_a_rotated_model_is_the_same_before_it_is_rounded(subject: Subject, tiny: Callable[[str], Path]) -> None:
    turned = Subject(Rotated(open_checkpoint(tiny("qwen2-moe"))))
    assert turned.perplexity(windows(5)) == pytest.approx(subject.perplexity(windows(5)), rel=1e-3)
    assert not torch.equal(*(s.exact(next(iter(s.blocks))) for s in (turned, subject)))


def test_a_model_without_experts_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has no experts"):
        Subject(open_checkpoint(tiny("llama")))
