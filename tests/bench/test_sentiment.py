"""The bench of the sentiment classifier: what is run, what is claimed of it; on tiny models, whose numbers say
nothing."""

import json
import threading

import pytest
import torch

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
    full = [0.83, 0.75, 0.64, 0.54, 0.44]
    data = result({PLAIN: [0.80, 0.70, 0.60, 0.50, 0.40], FULL: full, "text only": [0.5, 0.52]})
    assert sentiment.gains(data["rows"], "incongruity", "accuracy") == pytest.approx([0.03, 0.05, 0.04, 0.04, 0.04])
    found = claims(data)
    gain = found["accuracy with BiLSTM, CNN and CBAM over without, incongruity"]
    assert (gain.id, gain.value, gain.spread, gain.met) == ("C1", 4.0, (3.0, 5.0), True)
    assert gain.target == ">= 1.91 points"
    assert found["the same, less a standard deviation over seeds, accuracy, incongruity"].value == pytest.approx(3.293)
    assert found["F1 with BiLSTM, CNN and CBAM over without, incongruity"].target == ">= 3.09 points"
    assert found["variants measured with 5 seeds, incongruity"].met is False
    assert found["distance of text only from chance, incongruity"].value == pytest.approx(1.0)
    assert found["calibration error after scaling, incongruity"].met
    assert found["calibration error of the packaged classifier, posts it has not seen"].met
    assert all(each.hardware == "a machine" for each in found.values())


def test_calibration_is_told_beside_that_of_chance():
    data = result({FULL: [0.8] * 5})
    assert "calibrated one" not in claims(data)["calibration error after scaling, incongruity"].note
    for each in data["rows"]:
        each["expected_ece"] = 0.07
    note = claims(data)["calibration error after scaling, incongruity"].note
    assert note.endswith("; a perfectly calibrated one: 0.0700")


def test_what_is_missed_is_told():
    found = claims(result({PLAIN: [0.80] * 5, FULL: [0.79] * 5, "image only": [0.6] * 5}))
    assert not found["accuracy with BiLSTM, CNN and CBAM over without, incongruity"].met
    assert not found["distance of image only from chance, incongruity"].met
    real = claims(result({PLAIN: [0.80] * 5, FULL: [0.79] * 5}, "emoji"))
    assert real["accuracy with BiLSTM, CNN and CBAM over without, emoji"].target == ""
    assert not any("chance" in what for what in real)


def test_gains_of_few_seeds_are_no_figure():
    found = claims(result({PLAIN: [0.80] * 4, FULL: [0.90] * 5}))
    gain = found["accuracy with BiLSTM, CNN and CBAM over without, incongruity"]
    assert (gain.value, gain.met) == (None, False)
    assert "90.00 % against 80.00 %, 4 seeds" in gain.note
    assert not found["the same, less a standard deviation over seeds, accuracy, incongruity"].met


def test_an_interrupted_run_tells_what_it_has():
    data = result({PLAIN: [0.80]})
    data["sets"]["emoji"] = data["sets"]["incongruity"]
    assert list(claims(data)) == [
        "variants measured with 5 seeds, incongruity",
        "calibration error of the packaged classifier, posts it has not seen",
    ]


def test_chance_is_judged_where_modalities_alone_know_nothing():
    alone = {"text only": [0.7] * 5, PLAIN: [0.8] * 5, FULL: [0.9] * 5}
    found = claims(result(alone, "incongruity-joint"))
    assert found["accuracy with BiLSTM, CNN and CBAM over without, incongruity-joint"].target == ""
    assert not any("chance" in what for what in found)
    assert not claims(result(alone, "incongruity-emoji"))["distance of text only from chance, incongruity-emoji"].met


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
    assert all(0 < each["expected_ece"] < 1 for each in data["rows"])
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
    sentiment.main([*line, *more, "--out", str(out), "--commit", "another"])
    said = capsys.readouterr().out
    assert "is measured anew: it was with commit abc, now another" in said
    assert "[2/2]" in said
    assert json.loads(out.read_text())["machine"]["commit"] == "another"
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
        {"engine": "loop", "batch": 64, "beside": False, "seconds": [0.2, 0.22], "p50": 1.0, "p99": 1.0},
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
    assert (against.value, against.met, against.target) == (10.5, True, ">= 5 x")
    assert against.spread == (10.0, 11.0)
    lost = found["generation lost to 10 classifications a second, m, base"]
    assert lost.value == pytest.approx(6.5)
    assert not lost.met
    assert found["P99 of posts, base, batch 64 beside generation"].value == 41.0
    on_cpu = claims(served())["posts a second, base, batch 64, against transformers and torchvision, loop"]
    assert on_cpu.target == ""
    few = served(cuda="13.0")
    for each in few["rows"]:
        each["batch"] = min(each["batch"], 8)
    assert claims(few)["posts a second, base, batch 8, against transformers and torchvision, loop"].target == ""


def test_posts_of_a_load_are_as_asked():
    config = small.config()
    items = sentiment_serving.posts(config, 20)
    low, high = sentiment_serving.LENGTHS
    assert all(low <= len(item.ids) <= high for item in items)
    assert items[0].picture.shape == (3, 24, 24)
    assert sentiment_serving.posts(config, 20)[3].ids == items[3].ids


def test_rounds_of_all_take_turns():
    begun = []

    def runs(name, *ends):
        return lambda: begun.append(name) or list(ends)

    ours, theirs = sentiment_serving.in_turn({"a": runs("a", 0.5, 0.25), "b": runs("b", 2.0)}, 2, 3)
    assert begun == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert (ours.seconds, ours.p50, ours.p99, ours.rate) == ([0.5] * 3, 250, 500, 4)
    assert (theirs.engine, theirs.seconds) == ("b", [2.0] * 3)


class Shallow(sentiment_serving.Peer):
    """Reads batches and knows nothing."""

    def __init__(self, config, device, dtype):
        self.batches = []

    def classify(self, ids, real, pictures):
        self.batches.append((tuple(ids.shape), int(real.sum()), len(pictures)))
        return [[1.0]] * len(ids)


def test_a_peer_ends_post_by_post_in_a_loop_and_at_once_in_a_batch(monkeypatch):
    monkeypatch.setattr(sentiment_serving, "Peer", Shallow)
    made = sentiment_serving.made("tiny", "cpu", torch.float32)
    items = sentiment_serving.posts(made.config, 3)
    rounds = sentiment_serving.peer_rounds(made.config, made.reader, "cpu", items, torch.float32)
    loop, batch, _ = (run() for run in rounds.values())
    assert list(rounds) == ["loop", "batch", "batch fp32"]
    assert loop == sorted(loop)
    assert len(set(loop)) == 3
    assert len(batch) == 3
    assert len(set(batch)) == 1
    seen = rounds["loop"].func.__self__.batches
    assert seen == [((1, len(item.ids)), len(item.ids), 1) for item in items]


def test_peers_are_measured_beside_the_largest_batch(tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("transformers")
    out = tmp_path / "s.json"
    line = ["serving", "--size", "minilm", "--device", "cpu", "--batches", "2,1", "--rounds", "2", "--against"]
    sentiment.main([*line, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    peers = ["loop", "batch", "batch fp32"]
    assert [(row["engine"], row["batch"]) for row in rows] == [
        *(("tenfold", 2), *((name, 2) for name in peers)),
        ("tenfold", 1),
    ]
    assert all(len(row["seconds"]) == 2 and row["p50"] > 0 for row in rows)


def test_generation_that_ends_is_no_silence():
    class Broken:
        asked = threading.Event()

        def generate(self, prompts, tokens):
            self.asked.set()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), sentiment_serving.generating(Broken(), [[1]]):
        assert Broken.asked.wait(30)
