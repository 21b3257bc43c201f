"""The bench of the sentiment classifier: what is run, what is claimed of it; on tiny models, whose numbers say
nothing."""

import json

import pytest

from tenfold.bench import claims_sentiment, report, sentiment, sentiment_serving
from tenfold.bench.sentiment import FULL, PLAIN, VARIANTS
from tenfold.models.sentiment.folder import PACKAGED
from tests.models.sentiment import small

MACHINE = {"hardware": "a machine", "commit": "abc", "date": "2026-11-28"}


def row(data, variant, seed, accuracy, ece=0.02):
    scores = {
        "posts": 2409,
        "accuracy": accuracy,
        "f1_weighted": accuracy,
        "f1_macro": accuracy,
        "ece": ece,
        "brier": 0.2,
    }
    return {
        "data": data,
        "variant": variant,
        "seed": seed,
        "parameters": 5,
        "scores": scores,
        "uncalibrated": {"ece": 0.1, "brier": 0.3},
    }


def result(accuracies, data="incongruity"):
    """accuracies: variant to one a seed."""
    rows = [row(data, name, seed, each) for name, found in accuracies.items() for seed, each in enumerate(found)]
    counts = {"train": {"a": 3}, "dev": {"a": 1}, "test": {"a": 2}}
    packaged = {"ece": 0.03, "brier": 0.4, "accuracy": 0.7, "posts": 3000}
    return {
        "suite": "sentiment",
        "machine": MACHINE,
        "command": "python -m x",
        "sets": {data: {"sha256": "", "counts": counts}},
        "packaged": packaged,
        "rows": rows,
    }


def claims(data):
    return {each.what: each for each in claims_sentiment.of_suites({data["suite"]: [data]})}


def test_variants_cover_the_table():
    assert len(VARIANTS) == len(set(VARIANTS.values())) == 19
    for parts in VARIANTS.values():
        parts.check()
    assert (VARIANTS[PLAIN].bilstm, VARIANTS[PLAIN].cnn, VARIANTS[PLAIN].cbam) == (0, False, "none")


def test_gains_are_seed_by_seed():
    data = result({PLAIN: [0.80, 0.70], FULL: [0.83, 0.75], "text only": [0.5, 0.52]})
    assert sentiment.gains(data["rows"], "incongruity", "accuracy") == pytest.approx([0.03, 0.05])
    found = claims(data)
    gain = found["accuracy with BiLSTM, CNN and CBAM over without, incongruity"]
    assert (gain.id, gain.value, gain.spread, gain.met) == ("C1", 4.0, (3.0, 5.0), True)
    assert gain.target == ">= 1.78 points"
    assert found["the same, less a standard deviation over seeds, accuracy, incongruity"].value == pytest.approx(2.586)
    assert found["variants measured with 5 seeds, incongruity"].met is False
    assert found["distance of text only from chance, incongruity"].value == pytest.approx(1.0)
    assert found["calibration error after scaling, incongruity"].met
    assert found["calibration error of the packaged classifier, posts it has not seen"].met
    assert all(each.hardware == "a machine" for each in found.values())


def test_what_is_missed_is_told():
    found = claims(result({PLAIN: [0.80] * 5, FULL: [0.79] * 5, "image only": [0.6] * 5}))
    assert not found["accuracy with BiLSTM, CNN and CBAM over without, incongruity"].met
    assert not found["distance of image only from chance, incongruity"].met
    real = claims(result({PLAIN: [0.80] * 5, FULL: [0.79] * 5}, "emoji"))
    assert real["accuracy with BiLSTM, CNN and CBAM over without, emoji"].target == ""
    assert not any("chance" in what for what in real)


def test_a_complete_table():
    whole = result({name: [0.5 + i / 100] * 5 for i, name in enumerate(VARIANTS)})
    assert claims(whole)["variants measured with 5 seeds, incongruity"].met
    told = report.sentiment_table(whole)
    assert told.count("±") == 5 * len(VARIANTS)
    assert "incongruity (3 train, 1 dev, 2 test)" in told


def test_jobs_have_seeds_outermost():
    jobs = sentiment.jobs_of(["a", "b"], [PLAIN, FULL], 2)
    assert jobs[:4] == [("a", PLAIN, 0), ("a", FULL, 0), ("b", PLAIN, 0), ("b", FULL, 0)]
    assert len(jobs) == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_it_runs(tmp_path, workers, capsys):
    out = tmp_path / "a.json"
    line = ["ablation", "--data", "incongruity-tiny", "--text", "new", "--image-weights", "", "--epochs", "1"]
    more = ["--seeds", "1", "--variants", f"{PLAIN},{FULL}", "--device", "cpu", "--jobs", str(workers)]
    sentiment.main([*line, *more, "--out", str(out), "--commit", "abc"])
    data = json.loads(out.read_text())
    assert [each["variant"] for each in data["rows"]] == [PLAIN, FULL]
    assert data["machine"]["commit"] == "abc"
    assert data["command"].startswith("python -m tenfold.bench.sentiment ablation --data incongruity-tiny")
    assert "--out" not in data["command"]
    assert "abc" not in data["command"]
    assert data["packaged"] == json.loads((PACKAGED / "card.json").read_text())["test"]
    assert "[2/2]" in capsys.readouterr().out
    assert claims(data)
    assert FULL in report.tables(tmp_path)
    short = data | {"rows": data["rows"][:1]}
    out.write_text(json.dumps(short))
    sentiment.main([*line, *more, "--out", str(out), "--commit", "abc"])
    assert "[1/1]" in capsys.readouterr().out
    assert [each["variant"] for each in json.loads(out.read_text())["rows"]] == [PLAIN, FULL]
    with pytest.raises(SystemExit, match="another recipe"):
        sentiment.main([*line, *more, "--out", str(out), "--patience", "3"])


def test_unknown_variants_are_told():
    with pytest.raises(SystemExit, match="'all of it'; allowed"):
        sentiment.main(["ablation", "--variants", "all of it"])


def test_serving_is_measured(tmp_path):
    out = tmp_path / "s.json"
    sentiment.main(
        ["serving", "--size", "tiny", "--device", "cpu", "--batches", "1,3", "--rounds", "2", "--out", str(out)]
    )
    data = json.loads(out.read_text())
    assert [(each["engine"], each["batch"], len(each["seconds"])) for each in data["rows"]] == [
        ("tenfold", 1, 2),
        ("tenfold", 3, 2),
    ]
    assert all(0 < each["p50"] <= each["p99"] for each in data["rows"])
    assert "tenfold | 3 |" in report.tables(tmp_path)
    with pytest.raises(ValueError, match="size is 'huge'"):
        sentiment.main(["serving", "--size", "huge", "--device", "cpu"])


def served(**machine):
    rows = [
        {"engine": "tenfold", "batch": 1, "beside": False, "seconds": [0.01], "p50": 9.0, "p99": 11.0},
        {"engine": "tenfold", "batch": 64, "beside": False, "seconds": [0.02, 0.02], "p50": 19.0, "p99": 21.0},
        {"engine": "tenfold", "batch": 64, "beside": True, "seconds": [0.04], "p50": 39.0, "p99": 41.0},
        {"engine": "loop", "batch": 64, "beside": False, "seconds": [0.2], "p50": 1.0, "p99": 1.0},
    ]
    generation = {
        "rate": 10.0,
        "model": "m",
        "with": [97.0, 90.0],
        "without": [100.0, 100.0],
        "latencies": [1.0, 2.0, 3.0],
    }
    base = {"suite": "sentiment-serving", "size": "base", "command": "python -m y", "rows": rows}
    return base | {"generation": generation, "machine": MACHINE | machine}


def test_claims_of_serving():
    found = claims(served(cuda="13.0"))
    against = found["posts a second, base, batch 64, against transformers and torchvision, loop"]
    assert (against.value, against.met, against.target) == (10.0, True, ">= 5 x")
    lost = found["generation lost to 10 classifications a second, m, base"]
    assert lost.value == pytest.approx(6.5)
    assert not lost.met
    assert found["P99 of posts, base, batch 64 beside generation"].value == 41.0
    on_cpu = claims(served())["posts a second, base, batch 64, against transformers and torchvision, loop"]
    assert on_cpu.target == ""


def test_posts_of_a_load_are_as_asked():
    config = small.config()
    items = sentiment_serving.posts(config, 20)
    low, high = sentiment_serving.LENGTHS
    assert all(low <= len(item.ids) <= high for item in items)
    assert items[0].picture.shape == (3, 24, 24)
    assert sentiment_serving.posts(config, 20)[3].ids == items[3].ids


def test_the_peer_answers():
    pytest.importorskip("torchvision")
    config = sentiment_serving.SIZES["minilm"]
    assert config
    made = sentiment_serving.made("minilm", "cpu", sentiment_serving.torch.float32)
    rows = list(sentiment_serving.peer_rows(made.config, made.reader, "cpu", 2, 1, sentiment_serving.torch.float32))
    assert [each.engine for each in rows] == ["loop", "batch", "batch fp32"]
