"""The comparison on a tiny model: rows, seeds, gradients, table and claims."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tenfold.bench import claims_vlm, report, vlm
from tests.vision import photograph


def lines(folder: Path, count: int) -> Path:
    folder.mkdir()
    said = []
    for i in range(count):
        photograph().crop((20 * i, 40, 20 * i + 60, 100)).save(folder / f"{i}.png")
        said.append(json.dumps({"image": f"{i}.png", "question": "What?", "answer": f"It is the {i}th part."}))
    (folder / "pairs.jsonl").write_text("\n".join(said))
    return folder


def test_a_whole_run(seeing: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held = lines(tmp_path / "train", 6), lines(tmp_path / "held", 2)
    out = tmp_path / "vlm.json"
    given = ("--model", str(seeing("llava")), "--data", str(train), "--held-out", str(held), "--device", "cpu")
    vlm.main([*given, "--schemes", "w3g32z,w4a8", "--seeds", "2", "--samples", "3", "--out", str(out), "--commit", "c"])
    data = json.loads(out.read_text())
    methods = ["mbq", "awq", "smoothquant", "rtn", *vlm.APART]
    assert len(methods) == 4 + 18 - 2
    assert [(r["scheme"], r["method"]) for r in data["rows"]] == [
        ("w16", "exact"),
        *((scheme, method) for scheme in ("w3g32z", "w4a8") for method in methods),
    ]
    by = {(r["scheme"], r["method"]): r for r in data["rows"]}
    assert len(by["w3g32z", "mbq"]["losses"]) == 2
    assert by["w4a8", "rtn"]["losses"][0] == by["w4a8", "rtn"]["losses"][1]  # which is not calibrated
    assert by["w3g32z", "mbq"]["losses"][0] != by["w3g32z", "mbq"]["losses"][1]
    assert data["judged"] == 2
    assert {(g["layer"], g["part"]) for g in data["gradients"]} == {
        (i, p) for i in range(3) for p in ("attention", "mlp")
    }
    assert all(g["used"] >= g["ratio"] for g in data["gradients"])
    assert all(g["said"] ** 2 <= g["square"]["said"] for g in data["gradients"])
    older = data | {"gradients": [{k: g[k] for k in g if k not in ("said", "rest")} for g in data["gradients"]]}
    assert "gradient, answers | pictures / answers" in vlm.table(older)
    assert "| w4a8 | smoothquant |" in capsys.readouterr().out
    assert "| 2 | mlp |" in report.tables(tmp_path)
    found = claims_vlm.of_suites({"vlm": [data]})
    assert [c.id for c in found] == ["V4"] * 4
    best = min(by["w3g32z", name]["loss"] for name in claims_vlm.BASELINES)
    assert found[0].value == pytest.approx(best - by["w3g32z", "mbq"]["loss"], rel=1e-3)
    assert found[0].met == (found[0].value is not None and found[0].value > 0)


def test_forms_of_the_search_have_names() -> None:
    assert list(vlm.apart("search mae kinds; search mse squares, propagated")) == [
        "search mae kinds",
        "search mse squares, propagated",
    ]
    assert vlm.apart("") == {}
    with pytest.raises(ValueError, match="'mbq' is no form of the search; allowed: search mae alike; "):
        vlm.apart("mbq")


def test_seeds_draw_their_own() -> None:
    pairs = list(range(100))
    assert vlm.drawn(pairs, 5, 1) == vlm.drawn(pairs, 5, 1) != vlm.drawn(pairs, 5, 2)  # type: ignore[arg-type]
    assert sorted(vlm.drawn(pairs, 500, 0)) == pairs  # type: ignore[arg-type, type-var]
