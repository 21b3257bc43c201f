"""What formats of keys and values make of a sequence, and that the judge of their quality judges."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tenfold.bench import kv_model, kv_quality
from tenfold.bench.kv_formats import STRIDE, Exact, Float8, Format, Integer, Kivi, bits_at, hadamard
from tenfold.bench.kv_model import Bench
from tenfold.bench.kv_quality import Recall, Variant
from tenfold.cache.skvq.calibrate import ClipSearch, Sample
from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.kv.quantize import plain
from tenfold.ops.kv.spec import PackedSpec

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125)
SPAN = PackedSpec(2, 2, 32, span=2, window=4, sinks=1)  # for the tiny model's 2 heads of 16 channels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small spend their time waiting for other threads wherever cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(length: int = 40) -> Sample:
    g = torch.Generator().manual_seed(length)
    q, keys, values = (torch.randn(length, heads, 64, generator=g) for heads in (4, 2, 2))
    return Sample(q, keys, values, SPEC, lambda x: x)


def error(format: Format) -> float:
    """Of keys and values, relative to their size."""
    made = sample()
    pairs = zip(format.store(0, made), (made.keys, made.values))
    return sum(float((a - b.transpose(0, 1)).norm() / b.norm()) for a, b in pairs) / 2


def test_more_bits_are_nearer() -> None:
    four, eight = Integer(4, 64), Float8(64)
    assert error(Exact()) == 0
    assert 0 < error(eight) < 0.05 < error(four) < 0.12
    assert error(four) < error(Kivi(8)) < error(Kivi(32)) < 0.6
    assert (Exact().bits, eight.bits, four.bits, Kivi(32).bits) == (16, 8.5, 4.5, 3.0)


def test_a_hadamard_matrix_spreads_what_stands_out_and_turns_back() -> None:
    matrix = hadamard(64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(64))
    assert torch.equal(matrix.abs(), torch.full((64, 64), 0.125))
    with pytest.raises(ValueError, match="powers of two"):
        hadamard(48)


def test_what_is_kept_counts_in_16_bits() -> None:
    kivi = Kivi(32)
    assert kivi.kept == 96
    assert bits_at(kivi, 96) == bits_at(kivi, 40) == 16
    assert bits_at(kivi, 960) == pytest.approx(0.1 * 16 + 0.9 * 3)


def test_queries_see_as_computed_what_has_not_left_their_window() -> None:
    queries = torch.tensor([5, 39])
    assert not Exact().old(0, queries, 40)[0].any()
    assert Float8(64).old(0, queries, 40)[1][:, :6].all()
    keys, values = Kivi(8, residual=16).old(0, queries, 40)
    assert (keys.sum(1).tolist(), values.sum(1).tolist()) == ([0, 32], [0, 24])


def test_groups_of_values_end_with_a_head() -> None:
    names = [format.name for format in kv_quality.plain(64) if isinstance(format, Kivi)]
    assert names == ["KIVI 2 bit g32", "KIVI 2 bit g64", "KIVI 2 bit g128, values g64"]
    assert [format.name for format in kv_quality.plain(128)][-1] == "KIVI 2 bit g128"
    wide = Kivi(128, channels=64)
    assert wide.bits == 2.375
    keys, values = wide.store(0, sample(200))
    assert torch.equal(keys[:, 128:], sample(200).keys.transpose(0, 1)[:, 128:])
    assert len(values[0, 0].unique()) == 4


@pytest.fixture
def bench(tiny: Callable[[str], Path]) -> Bench:
    return Bench(tiny("llama"), 300)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(7 * i + 3 * seed + i * i // 5) % 90 + 2 for i in range(count)]


def formats(bench: Bench) -> list[Format]:
    """One of each kind, for heads of 16 channels."""
    (skvq,) = kv_quality.calibrated(bench, [Variant("skvq", SPAN)], [tokens(160)], 1)
    return [Exact(), Float8(16), Integer(4, 16), Integer(4, 8, turned=True), Kivi(32, channels=16), skvq]


def test_attention_of_some_queries_at_a_time_is_that_of_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tokens(150)
    parts = bench.logits(given, Exact(), range(150))
    monkeypatch.setattr(kv_model, "QUERIES", 1000)
    torch.testing.assert_close(parts, bench.logits(given, Exact(), range(150)), rtol=0, atol=1e-5)


def test_what_follows_a_prefix_is_as_if_it_were_one_sequence(bench: Bench) -> None:
    begin, ends = tokens(STRIDE), [tokens(150, 1), tokens(7, 2)]
    for format in formats(bench):
        prefix = bench.begin(begin, format)
        both = bench.follow(prefix, ends, format, range(157)).split([150, 7])
        for end, own in zip(ends, both):
            rows = range(STRIDE, STRIDE + len(end))
            expected = bench.logits(begin + end, format, rows)
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
        apart = bench.logits(ends[1], format, range(7))
        assert not torch.allclose(both[1], apart, atol=1e-2)
    with pytest.raises(ValueError, match="130 tokens was asked for; allowed: multiples of 128"):
        bench.begin(tokens(130), Exact())


def test_nothing_is_made_elsewhere_than_where_the_model_runs(bench: Bench) -> None:
    """With another default device, a tensor that was made without one does not meet those of the model."""
    own = formats(bench)
    prompt = Recall(tokens(40), [range(20, 22)])
    expected = kv_quality.judge(bench, own, [tokens(160)], [prompt])
    search = ClipSearch(plain(32, 16), 2, "e4m3", of_keys=True)
    values = ClipSearch(plain(32, 16), 2, "e4m3", of_keys=False)
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        assert kv_quality.judge(bench, own, [tokens(160)], [prompt]) == expected
        bench.run(tokens(30), lambda layer, seen: search.add(seen, window=4, sinks=1))
        bench.run(tokens(30), lambda layer, seen: values.add(seen, window=4, sinks=1))
    assert search.losses.all()
    assert values.losses.all()


def test_formats_are_judged_against_the_exact_cache(bench: Bench) -> None:
    pieces = [[(7 * i + 3 * j) % 90 + 2 for i in range(160)] for j in range(2)]
    (skvq,) = kv_quality.calibrated(bench, [Variant("skvq", SPAN)], pieces, 1)
    best = bench.logits(pieces[0], Exact(), range(159)).argmax(-1).tolist()
    right = Recall([*pieces[0][:20], best[19]], [range(20, 21)])
    wrong = Recall([*pieces[0][:20], best[19] + 1], [range(20, 21)])
    exact, eight, two = kv_quality.judge(bench, [Exact(), Float8(16), skvq], pieces, [right, wrong])
    assert (exact["kl"], exact["found"], exact["asked"]) == (0, 1, 2)
    logs = bench.logits(pieces[0][:20], Exact(), [19]).log_softmax(-1)[0]
    assert exact["codes"] == pytest.approx(-float(logs[best[19]] + logs[best[19] + 1]) / 2, abs=1e-4)
    assert "codes" not in kv_quality.judge(bench, [Exact()], pieces, [])[0]
    assert 0 < eight["kl"] < two["kl"]
    assert abs(eight["perplexity"] / exact["perplexity"] - 1) < 0.05
    assert two["bits"] == round(SPAN.bits(2, 16), 3)
    assert two["bits"] < two["bits_here"] < 16
    text = kv_quality.table([exact, eight, two])
    assert "+0.0%" in text
    assert "1/2" in text
    assert f"{exact['codes']:.3f}" in text


def test_codes_stand_where_the_answers_say(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "encode", lambda text: list(text.encode()))
    prompt = kv_quality.recall(bench, list(b"." * 400), 3, 500, 4)
    text = bytes(prompt.ids).decode()
    codes = [text[a.start : a.stop].strip() for a in prompt.answers]
    assert len(set(codes)) == 4
    assert all(text.count(f" {code}.") == 2 for code in codes)
    assert len(prompt.ids) <= 500
    with pytest.raises(ValueError, match=r"4 codes take \d+ tokens, prompts have 100; ask for fewer"):
        kv_quality.recall(bench, [], 3, 100, 4)


def test_the_command_writes_what_it_measured(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model = tmp_path / "text.txt", tiny("llama")
    text.write_text("the land is wide and the river runs through it to the sea. " * 400)
    files = ["--model", str(model), "--text", str(text), "--calibrate", str(text), "--out", str(tmp_path)]
    sizes = ["--windows", "1", "--prompts", "0", "--learned", "200", "--only", "fp8"]
    kv_quality.main([*files, *sizes, "--length", "192"])
    found = json.loads((tmp_path / f"kv-quality-{model.name}-192.json").read_text())
    assert [row["format"] for row in found["rows"]] == ["exact", Float8(16).name]
    assert found["machine"]["hardware"]
    assert found["command"].startswith("python -m tenfold.bench.kv_quality --model ")
    assert "--text text.txt --calibrate text.txt --length 192 --windows 1 --prompts 0 --learned 200" in found["command"]
    assert kv_quality.subject(found) == f"{model.name}, 192 tokens"
    with pytest.raises(SystemExit):
        kv_quality.main([*files, *sizes, "--length", "5000"])
    assert "length is 5000; allowed for" in capsys.readouterr().err


def test_groups_of_every_size_a_head_has_are_judged() -> None:
    names = [v.name for v in kv_quality.variants(2, 128)]
    assert {"SKVQ k2v2g128", "SKVQ k2v1.5g128", "SKVQ k2v2g64", "round to nearest 2 bit g128"} <= set(names)
    assert len(set(names)) == len(names)
    assert not any("g128" in v.name for v in kv_quality.variants(3, 64))
    for variant in kv_quality.variants(2, 128):
        variant.spec.check(2, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds(tiny: Callable[[str], Path]) -> None:
    """Formats that round only nearly: one code that rounds the other way changes all that follows."""
    prompt = Recall(tokens(40), [range(20, 22)])
    here, there = (
        kv_quality.judge(bench, formats(bench), [tokens(160)], [prompt])
        for bench in (Bench(tiny("llama"), 300, device) for device in ("cpu", "cuda"))
    )
    for one, other in zip(here, there):
        close = 1e-4 if one["format"] == "exact" else 0.1
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=close)
        assert (other["kl"] > 0) == (one["kl"] > 0)
