"""Claims: targets decide `met`, files round-trip, and documents are filled from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from tenfold.bench import report
from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.claims import CLAIMS, Claim, called, claim, ending, load, record


@pytest.mark.parametrize(
    ("value", "bounds", "met"),
    [
        (1.6, {"at_least": 1.5}, True),
        (1.4, {"at_least": 1.5}, False),
        (2.9, {"at_most": 3.0}, True),
        (3.1, {"at_most": 3.0}, False),
        (None, {"at_least": 1.5}, False),
        (1.00096, {"at_least": 1.001}, True),  # as it is written: 1.001
        (3.0004, {"at_most": 3.0}, True),
    ],
)
def test_met_compares_value_with_target(value: float | None, bounds: dict[str, float], met: bool) -> None:
    made = claim("A1", "speed", value, "x", "tenfold bench cpu", **bounds)
    assert made.met is met
    assert "1" in made.target or "3" in made.target


def test_without_a_target_nothing_is_met(tmp_path: Path) -> None:
    made = claim("C3", "P99", 4.0, "ms", "c")
    assert (made.target, made.met) == ("", None)
    record([made], tmp_path / "claims.json")
    assert '"met": null' in (tmp_path / "claims.json").read_text()
    assert load(tmp_path / "claims.json") == [made]
    assert "| C3 | P99 | **4** ms |  |  |  |" in report.table([made])


def test_an_interruption_leaves_the_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "claims.json"
    record([claim("A1", "decode", 1.0, "x", "c")], path)
    before = path.read_bytes()

    def interrupted(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record([claim("A1", "decode", 2.0, "x", "c")], path)
    assert path.read_bytes() == before


def test_claims_call_a_model_by_its_name() -> None:
    assert [called(model) for model in ("default", "/models/a.gguf", "shape:llama-3-8b")] == [
        "SmolLM2-135M-Instruct Q4_1",
        "a.gguf",
        "shape:llama-3-8b",
    ]
    assert [ending(model) for model in ("default", "/models/a.gguf")] == ["", ", a.gguf"]


def test_record_replaces_the_same_claim_and_keeps_others(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    record([claim("A2", "prefill", 1.0, "x", "c"), claim("A1", "decode", 1.0, "x", "c", spread=(0.9, 1.1))], path)
    record([claim("A1", "decode", 2.0, "x", "c")], path)
    assert [(c.id, c.value) for c in load(path)] == [("A1", 2.0), ("A2", 1.0)]


@pytest.mark.parametrize("content", ["{", "[3]", '[{"id": "F1"}]', "3", '{"id": 1}', "[" * 100_000])
def test_a_broken_record_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "claims.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"claims\.json holds no list of claims"):
        load(path)


def test_pairs_divide_round_by_round() -> None:
    assert paired_ratio([10, 30], [5, 10]) == Figure((2.0, 3.0))
    with pytest.raises(ValueError, match="do not pair"):
        paired_ratio([1.0], [1.0, 2.0])


def test_fill_replaces_only_what_stands_between_the_markers() -> None:
    rows = [
        claim("A1", "decode", 2.0, "x", "cmd", at_least=1.5, note="n."),
        claim("B1", "other", None, "s", "cmd", at_most=1),
    ]
    text = "before\n<!-- claims:A -->\nold\n<!-- /claims -->\nafter\n<!-- claims:B:details --><!-- /claims -->\n"
    filled = report.fill(text, rows)
    assert filled.startswith("before\n")
    assert "old" not in filled
    assert "after" in filled
    assert "| A1 | decode | **2** x |" in filled
    assert "not measured" in filled
    assert report.fill(filled, rows) == filled


def test_every_row_says_what_it_was_measured_on() -> None:
    places = {"F1": ("NVIDIA H100 80GB HBM3", "aaa"), "F2": ("NVIDIA H200", "bbb"), "F3": ("NVIDIA H200", "ccc")}
    rows = [
        replace(claim(id, "decode", 1.0, "x", "c"), hardware=hardware, commit=commit, date="2026-11-30")
        for id, (hardware, commit) in places.items()
    ]
    *table, _, below = report.table(rows).split("\n")
    for line, where in zip(table[2:], ("H100, aaa", "H200, bbb", "H200, ccc")):
        assert f"| {where}, 2026-11-30 |" in line
    assert below.endswith("H100: NVIDIA H100 80GB HBM3; H200: NVIDIA H200.")
    both = ["AMD EPYC, 2 cores", "AMD EPYC, 8 cores"]
    assert report.short_names([*both, "arm64"]) == {full: full for full in [*both, "arm64"]}


def test_documents_agree_with_the_recorded_claims() -> None:
    """A number in a document that differs from the record is a lie; `tenfold bench report` renews them."""
    claims = load()
    for document in report.DOCUMENTS:
        text = document.read_text()
        assert report.fill_results(report.fill(text, claims)) == text, (
            f"run `tenfold bench report`: {document.name} is stale"
        )


def test_every_claim_in_the_record_is_complete() -> None:
    assert CLAIMS.exists()
    for row in load():
        assert isinstance(row, Claim)
        assert all((row.hardware, row.commit, row.date, row.command)), row
        assert row.value is not None or row.note, f"{row.id} was not measured and does not say why"
        assert (row.met is None) == (not row.target), row
