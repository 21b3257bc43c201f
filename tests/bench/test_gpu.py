"""The benchmark on a real GPU: weights drawn there once, engines beside each other, memory given back."""

import pytest
import torch

from tenfold.bench import arms, single
from tenfold.bench.engines import Setup, make_engine
from tenfold.bench.fit import Point
from tenfold.bench.floor import model_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = "shape:llama-3.2-1b@layers=4"


def test_loading_random_weights_holds_no_second_copy() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make_engine("tenfold", Setup(MODEL, 0, 1, 256, "cuda", 1024))
    weights, largest = model_sizes(MODEL, "cuda").weights, 2 * 128256 * 2048
    assert torch.cuda.max_memory_allocated() - before < weights + 2 * largest + (1 << 30)


def test_peers_and_we_take_turns_and_give_memory_back() -> None:
    before = torch.cuda.memory_allocated()
    plan = single.Plan(MODEL, ("tenfold", "hf-generate"), (Point(2, 128, 9), Point(1, 600)), 2, "cuda")
    result = single.run(plan, lambda _: None)
    assert [(r.engine, r.batch, r.context) for r in result.rows] == [
        *(("tenfold", 2, 128), ("hf-generate", 2, 128)),
        *(("tenfold", 1, 600), ("hf-generate", 1, 600)),
    ]
    assert not result.skipped
    assert result.rows[0].beside == ["hf-generate"]
    assert result.machine["hardware"] == torch.cuda.get_device_name()
    assert result.copy_gbs > 100
    assert torch.cuda.memory_allocated() - before < 1 << 30


def test_both_continue_alike_in_bfloat16_at_first() -> None:
    """Rounding parts them sooner or later; the first token of a random model agrees nearly always."""
    prompts = single.prompts_of(Point(4, 64), 1, 1000)
    found = [
        make_engine(name, Setup(MODEL, 0, 4, 256, "cuda", 2048)).generate(prompts, 4) for name in ("tenfold", "hf")
    ]
    same = sum(a[0] == b[0] for a, b in zip(found[0].tokens, found[1].tokens))
    assert same >= 3


def test_an_ablation_on_a_gpu() -> None:
    cases = [case for case in arms.CASES if case.name == "a step launched ahead"]
    found = arms.run(MODEL, "cuda", 1, 9, cases=cases, say=lambda _: None)
    assert len(found.rows) == len(cases[0].points)
