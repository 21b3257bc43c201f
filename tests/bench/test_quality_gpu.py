"""The GPU's quality measurement, on a CPU: what it finds where all is well, and that it finds what is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.bench import claims_gpu, quality_gpu
from tenfold.bench.quality import Quality
from tenfold.bench.quality_gpu import Difference, chance, claims_of, first_differences, loaded, together
from tenfold.bench.quality_run import decoded, forward
from tenfold.engine.core import Engine

SAYS = {0: [1.0, 3.0, 2.5], 1: [0.0, 0.0, 9.0], 2: [5.0, 1.0, 4.0]}  # logits after each token


def reference(ids: object) -> torch.Tensor:
    return torch.tensor([SAYS[i] for i in ids])  # type: ignore[attr-defined]


def test_the_gap_is_told_where_an_answer_leaves_the_reference() -> None:
    assert first_differences(reference, [[0], [1, 0]], [[1, 2, 0], [1, 2, 0]]) == []
    assert first_differences(reference, [[0], [0]], [[1, 2, 0], [1, 2, 2]]) == [Difference(1, 2, 1.0)]
    assert first_differences(reference, [[0]], [[2, 2, 2]]) == [Difference(0, 0, 0.5)]
    assert first_differences(reference, [[0]], [[]]) == []


def test_token_by_token_is_the_same_forward(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama")
    engine = Engine.load(EngineConfig(str(path), "cpu", "float32", "torch", max_model_len=64, max_batch=2))
    pieces = [[5, 9, 11, 40, 7] * 4, [6, 6, 20, 31, 8] * 4]
    with torch.inference_mode():
        one_by_one = together(engine, pieces, 1)
        for piece, found in zip(pieces, decoded(engine, pieces)):
            torch.testing.assert_close(one_by_one(piece), found, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found, forward(engine, piece), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def result(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> quality_gpu.Result:
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text("some words about nothing at all, again and again. " * 20)
    prompts = ("one two", "three")
    return quality_gpu.run(str(tiny("llama")), text, "cpu", 24, 2, prompts, lambda _: None)


def test_every_path_is_judged(result: quality_gpu.Result) -> None:
    paths = {f"{dtype} {way}" for dtype in ("float32", "bfloat16", "float16") for way in ("prefill", "decode")}
    assert set(result.quality) == paths | {"transformers bfloat16", "transformers float16"}
    assert set(result.kernels) == set(result.greedy) == {"float32", "bfloat16", "float16"}
    assert result.greedy["float32"] == []
    for way in ("prefill", "decode"):
        assert abs(result.quality[f"float32 {way}"].perplexity_change) < 1e-6
        assert 1e-9 < result.quality[f"bfloat16 {way}"].kl < 1e-2
    assert loaded(json.loads(json.dumps(result.plain()))) == result


def test_claims_are_met_by_what_is_near_and_only_by_that(result: quality_gpu.Result, tmp_path: Path) -> None:
    near, far = Quality(10, 20.0, 20.01, 1e-4, 1.0), Quality(10, 20.0, 20.1, 1e-4, 1.0)
    names = ("bfloat16 prefill", "float16 decode", "transformers bfloat16", "transformers float16")
    result.greedy = {"float32": [], "bfloat16": [Difference(0, 3, 0.5)]}
    result.quality = dict.fromkeys(names, near)
    (tmp_path / "quality.json").write_text(json.dumps(result.plain()))
    made = claims_gpu.of_folder(tmp_path)
    assert [(c.id, c.met) for c in made] == [("F8", True)] * 3
    result.greedy["float32"] = [Difference(1, 4, 2e-5)]
    result.quality = dict.fromkeys(names, far)
    assert chance(far) == pytest.approx((2e-4 / 10) ** 0.5)
    greedy, *rest = claims_of(result)
    assert (greedy.value, greedy.met) == (1, False)
    assert "prompt 1 differs from token 4 on by a logit gap of 2e-05" in greedy.note
    assert [(c.value, c.met) for c in rest] == [(0.5, False)] * 2
