"""Claims F7, V2 and V3 from runs of a whole model in bfloat16 and with weights of fewer bits."""

import json
from pathlib import Path

import pytest

from tenfold.bench import claims_bits, claims_gpu, report
from tenfold.bench.claims import Claim
from tenfold.bench.single import Result, Row

MACHINE = {"hardware": "NVIDIA H100 80GB HBM3", "commit": "abc1234", "date": "2026-11-29"}
MODEL = "shape:llava-onevision-7b"


def run(
    weights: str = "", ms: tuple[float, ...] = (5.0,), prefill: float = 40.0, model: str = MODEL, hardware: str = ""
) -> Result:
    """A decode behind 1024 tokens and a prefill of 8192, which takes eight times as long as one of 1024."""
    short = [prefill / 1e3] * len(ms)
    decode = Row("tenfold", 1, 1024, 129, [s + 128 * t / 1e3 for s, t in zip(short, ms)], short)
    rows = [decode, Row("tenfold", 1, 8192, 1, [], [8 * s for s in short])]
    own = {"weights": weights} if weights else {}
    machine = MACHINE | ({"hardware": hardware} if hardware else {})
    return Result(model, machine, f"run {weights or 'plain'}", 3000.0, settings={"tenfold": own}, rows=rows)


def of(*results: Result) -> dict[str, Claim]:
    return {f"{c.id} {c.what.partition(',')[0]}": c for c in claims_bits.of_models(results)}


def test_three_bits_count_in_decodes_and_four_in_prefills() -> None:
    found = of(run("w4a8", (2.4,), 32.0), run("int3", (1.9, 2.4, 2.6), 90.0), run(ms=(5.0, 5.2, 4.8)))
    assert list(found) == ["V2 decode", "V3 prefill of 1024 tokens", "V3 prefill of 8192 tokens"]
    decode, *prefills = found.values()
    assert (decode.value, decode.met, decode.target) == (2.083, True, ">= 2 x")
    assert decode.spread == (pytest.approx(4.8 / 2.6, rel=1e-3), pytest.approx(5.2 / 1.9, rel=1e-3))
    assert decode.what == "decode, batch 1, context 1024, llava-onevision-7b, W3A16 over bfloat16"
    assert "5.00 ms and 2.40 ms, medians of 3 and 3 rounds" in decode.note
    assert (decode.command, decode.hardware, decode.commit) == ("run plain; run int3", MACHINE["hardware"], "abc1234")
    assert [(c.value, c.met, c.target) for c in prefills] == [(1.25, False, ">= 1.3 x")] * 2


@pytest.mark.parametrize(
    "results",
    [
        [],
        [run()],
        [run("int3"), run("w4a8")],  # nothing to hold them against
        [run(), run("int4"), run("int3-blocks")],  # other bits
        [run(hardware="another GPU"), run("int3")],
        [run(model="shape:llama-3-8b"), run("int3", model="shape:llama-3-8b")],
        [run(model="shape:llama-3-8b"), run("int3")],
    ],
    ids=range(7),
)
def test_what_does_not_pair_is_no_claim(results: list[Result]) -> None:
    assert claims_bits.of_models(results) == []


def test_the_fastest_run_in_bfloat16_counts_at_each_point() -> None:
    tuned, plain = run(ms=(6.0,), prefill=30.0), run(ms=(5.0,), prefill=40.0)
    for runs in ((tuned, plain), (plain, tuned)):
        found = of(*runs, run("int3", (2.0,)), run("w4a8", prefill=20.0))
        assert [each.value for each in found.values()] == [2.5, 1.5, 1.5]


def test_a_shape_that_was_given_longer_contexts_is_the_same_model() -> None:
    assert of(run(model=f"{MODEL}@positions=40960"), run("int3"))["V2 decode"].value == 1.0


def test_results_of_one_folder_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    for name, result in (("a", run("w4a8", (3.0,), 20.0)), ("b", run()), ("c", run("int3", (2.0,)))):
        (tmp_path / f"{name}.json").write_text(json.dumps(result.plain()))
    found = claims_gpu.of_folder(tmp_path)
    assert [(c.id, c.value) for c in found if c.id[0] == "V"] == [("V2", 2.5), ("V3", 2.0), ("V3", 2.0)]
    text = report.tables(tmp_path)
    assert [text.count(f"### {MODEL}{mode}\n") for mode in ("", " int3", " w4a8")] == [1, 1, 1]
    assert "5.00" in text.partition(f"### {MODEL} int3")[0]
    assert "5.00" not in text.partition(f"### {MODEL} int3")[2]


def test_dense_models_count_where_their_bits_are_for() -> None:
    model = "shape:llama-3-8b"

    def at(batch: int, weights: str, ms: float) -> Result:
        made = run(weights, (ms,), model=model)
        for each in made.rows:
            each.batch = batch
        return made

    plain = [at(1, "", 5.0), at(64, "", 9.0)]
    found = claims_bits.of_models(
        [*plain, at(1, "int4", 2.0), at(64, "int4", 8.0), at(1, "fp8", 3.0), at(64, "fp8", 7.5)]
    )
    assert [(c.id, c.what, c.value, c.met) for c in found] == [
        ("F7", "decode, batch 1, context 1024, llama-3-8b, W4A16 over bfloat16", 2.5, True),
        ("F7", "decode, batch 64, context 1024, llama-3-8b, FP8 over bfloat16", 1.2, False),
    ]
