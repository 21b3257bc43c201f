"""The benchmark of KV formats: every format at every point through the ordinary engine, and what is said of it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tenfold.bench import claims_kv, cli, kv, plots, report
from tenfold.bench.kv import Point, Result, Row

MODEL = "shape:llama-3.2-1b@layers=2"


def test_formats_decode_at_every_point_in_turn(tmp_path: Path) -> None:
    told: list[str] = []
    changes = {"kv_memory": 12 << 20, "max_step_tokens": 64}
    points = [Point(2, 40), Point(4, 2000)]
    result = kv.run(MODEL, "cpu", ["dense", "k2v2g32w8s2"], points, 2, 3, changes, told.append)
    dense, packed, large, small = result.rows
    assert (len(dense.steps), len(packed.steps)) == (2, 2)
    assert min(dense.steps + packed.steps) > 0
    assert (large.steps, bool(large.skipped)) == ([], True)  # 16 KiB a token and 8,000 of them
    assert len(small.steps) == 2
    own = result.formats["k2v2g32w8s2"]
    assert own["bytes_per_token"] * 6 < result.formats["dense"]["bytes_per_token"]
    assert packed.read == 2 * 40 * own["bytes_per_token"]
    assert packed.layer_us > 0
    assert "sequences; 2 run at a time" in packed.memory
    assert kv.loaded(result.plain()) == result
    assert "does not fit" in report.kv_table(result)
    assert plots.kv(result, tmp_path / "kv.png").stat().st_size > 10_000
    assert any("against" not in line and "left out" in line for line in told)


def test_points_are_read_or_refused() -> None:
    assert kv.points_of("8x1024,1x32768") == [Point(8, 1024), Point(1, 32768)]
    for wrong in ("8", "8x", "0x5", "8x1", "axb", "8x1024+", "8x1024+2"):
        with pytest.raises(ValueError, match="is no point"):
            kv.points_of(wrong)
    with pytest.raises(SystemExit):
        kv.main(["--model", "shape:tiny", "--points", "1x64+1x32"])


def made() -> Result:
    """Weights of a GB, 1 MB and 100 kB a token, copies at 1,000 GB/s."""
    result = Result(
        "shape:some@x=1", {"hardware": "GPU", "cuda": "13", "commit": "abc", "date": "2026-01-01"}, "command"
    )
    result.streamed, result.copy_gbs = 10**9, 1000.0
    about = {"bytes_per_room": 0, "bits": 16.0, "spec": "stored", "tokens": 1}
    result.formats = {"dense": about | {"bytes_per_token": 10**6}, "k2v2g64": about | {"bytes_per_token": 10**5}}
    result.rows = [
        Row("dense", 1, 100, 0, [1.2], layer_us=30.0),
        Row("k2v2g64", 1, 100, 0, [1.0], layer_us=2.0),
        Row("dense", 8, 8192, 0, [70.0, 72.0], layer_us=2000.0, layer_read=1),
        Row("k2v2g64", 8, 8192, 0, [10.0, 8.0], layer_us=400.0, layer_read=300_000_000),
        Row("k2v2g64", 1, 1 << 20, 0, [50.0], memory="weights 1\\nKV 2"),
    ]
    for row in result.rows:
        row.read = row.batch * row.context * int(result.formats[row.format]["bytes_per_token"])
    return result


def test_bars_are_as_long_as_what_they_show() -> None:
    result = made()
    lines = [line.replace(" x ", "x").split() for line in kv.bars(result).splitlines()[1:]]
    assert [line[:2] for line in lines[:2]] == [["1x100", "dense"], ["1x100", "k2v2g64"]]
    dense, packed, million = lines[2:]
    assert (dense[2], len(dense[5])) == ("61.035", kv.BAR)  # 71 ms are the slowest step
    assert (packed[2], len(packed[5])) == ("6.104", 4)  # 9 of 71 ms
    assert (million[0], len(million[3])) == ("1x1048576", kv.BAR)  # and these take most
    result.rows = []
    assert len(kv.bars(result).splitlines()) == 1


def test_two_results_of_a_model_are_two_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("kv-some", "kv-some-common"):
        (tmp_path / f"{name}.json").write_text(json.dumps(made().plain()))
    drawn = report.charts(tmp_path)
    assert {path.name for path in drawn} == {"kv-some.png", "kv-some-common.png"}
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_the_command_prints_the_table_and_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(kv, "run", lambda *rest: made())
    monkeypatch.setattr(cli, "header", lambda: None)
    words = ["--model", "shape:some", "--device", "cpu", "--set", "weights=int4"]
    done = CliRunner().invoke(cli.app, ["kv", *words, "--out", str(tmp_path)])
    assert report.kv_table(made()) in done.output
    assert kv.bars(made()) in done.output
    found = kv.loaded(json.loads((tmp_path / "kv-some-weights-int4.json").read_text()))
    assert found.name == "shape:some, weights int4"
    assert found.command == " ".join(["tenfold bench kv", *words])
    assert (tmp_path / "kv-some-weights-int4.png").exists()


def test_claims_of_speed_are_those_of_the_rows() -> None:
    found = {(c.id, c.unit): c for c in claims_kv.of_speed([made()])}
    assert found["K1", "tokens"].value == pytest.approx(1 << 20, rel=1e-3)
    assert found["K1", "tokens"].met
    gains = [c for c in claims_kv.of_speed([made()]) if c.id == "K2"]
    assert [(round(c.value or 0, 2), c.met) for c in gains] == [(5.0, True), (8.0, True)]  # not 15: there weights rule
    assert [c.spread for c in gains] == [None, (7.0, 9.0)]  # round by round
    assert (found["K3", "%"].value, found["K3", "%"].met) == (75.0, True)


def test_what_16_bits_cannot_hold_counts_against_the_largest_batch_they_can() -> None:
    result = made()
    result.rows += [
        Row("dense", 4, 8192, 0, [40.0]),
        Row("dense", 32, 8192, 0, skipped="too large"),
        Row("k2v2g64", 32, 8192, 0, [20.0]),
        Row("k2v2g64", 32, 16384, 0, [40.0]),  # no batch of 16 bits to hold against
    ]
    (last,) = [c for c in claims_kv.of_speed([result]) if "tokens a second" in c.what]
    assert last.value == pytest.approx(32 / 20 / (8 / 71), rel=1e-2)
    assert last.spread == pytest.approx((32 / 20 / (8 / 70), 32 / 20 / (8 / 72)), rel=1e-2)
    assert "32 x 8192, where 16-bit KV does not fit, against it at 8 x 8192" in last.what


def test_the_default_format_has_claims_of_its_own() -> None:
    result = made()
    result.rows += [
        Row("skvq", 8, 8192, 0, [35.0, 36.0], layer_us=1000.0, layer_read=1),
        Row("dense", 32, 8192, 0, skipped="too large"),
        *(Row("k2v2g64", 32, 8192, 0, [20.0]), Row("skvq", 32, 8192, 0, [80.0])),
    ]
    found = [c for c in claims_kv.of_speed([result]) if c.id == "K2"]
    own = [(c.value, c.met) for c in found if "skvq, " in c.what]
    assert own == [(2.0, False), (2.0, False), (pytest.approx(32 / 80 / (8 / 71), rel=1e-3), True)]
    assert len(found) == 6


def test_what_fits_leaves_room_for_weights_workspace_and_a_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "free_memory", lambda device: 4 << 30)
    bench = kv.Bench(MODEL, "cpu", 64, {"kv_memory": 12 << 20, "max_step_tokens": 64})
    own = bench.capacity("k2v2g32w8s2")
    _, plan = bench.planned("k2v2g32w8s2", 1, kv.LEAST_TOKENS)
    assert plan.weights + plan.workspace + own["bytes_per_room"] + own["tokens"] * own["bytes_per_token"] <= plan.free


def test_claims_of_quality_compare_at_equal_bits() -> None:
    def row(name: str, bits: float, perplexity: float, found: int = 1) -> dict[str, object]:
        return {
            "format": name,
            "bits": bits,
            "perplexity": perplexity,
            "found": found,
            "asked": 4,
            "kl": 0.1,
            "bits_here": 3,
        }

    rows = [
        *(row("exact", 16, 20.0), row("int4 g64", 4.5, 21.0), row("KIVI 2 bit g64", 2.5, 30.0, 3)),
        *(row("KIVI 2 bit g32", 3.0, 24.0), row("round to nearest 2 bit g64", 2.25, 90.0)),
        *(row("SKVQ k2v2g32", 2.5, 25.0), row("SKVQ k2v2g64", 2.25, 28.0, 3), row("SKVQ k2v2g64, no clip", 2.25, 50.0)),
        row("SKVQ k2v1.5g64", 2.06, 29.0),
    ]
    data = {"rows": rows, "model": "m.gguf", "length": 1024, "command": "c", "machine": {"hardware": "CPU"}}
    one, few, two, many, three, _ = claims_kv.of_quality(data)
    assert (few.value, few.unit, few.target, few.met) == (1, "codes", ">= 3 codes", False)
    assert "KIVI 2 bit g64 at 2.5 bits finds 3, 16 bits 1; held against: KIVI 2 bit g64" in few.note
    assert (many.value, many.met) == (3, True)
    assert three.met
    assert "none of KIVI's style has so few bits, they take 2.5 or more" in three.note
    assert "none of KIVI's style" not in one.note + two.note
    assert (round(one.value or 0, 3), one.met) == (1.2, True)  # three bits are more
    assert (round(two.value or 0, 3), two.met) == (1.071, True)
    assert "+25.0%" in one.note
    assert one.what.endswith("SKVQ k2v2g32, 2.5 bits, m")
    assert claims_kv.of_quality(data | {"length": 4096})[0].what.endswith("2.5 bits, m, 4096 tokens")
    text = report.kv_quality_table(data | {"windows": 1, "unjudged": 0})
    assert "| SKVQ k2v2g64 | 2.25 |" in text
