"""What schemes cost in time: by a table that a stand-in timer fills, and in words where nothing can be measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.models.table import model_config
from tenfold.ops.choose import Table
from tenfold.quantize.mxmoe import cost
from tenfold.quantize.mxmoe.allocate import Allocator, budgets
from tenfold.quantize.mxmoe.subject import Rounded, blocks_of
from tenfold.quantize.schemes import parse
from tenfold.weights.open import open_checkpoint

arms = pytest.importorskip("tenfold.ops.gpu.expert_arms")
tuning = pytest.importorskip("tenfold.ops.gpu.tune_experts")
TINY = model_config(open_checkpoint("shape:tiny-moe").config)
assert TINY.experts is not None
CONFIG = replace(TINY, hidden_size=256, experts=replace(TINY.experts, size=128))
SCHEMES = [parse(name) for name in ("w2g128z", "w4g128z", "w8g128z")]


class Timer:
    """Fewer bits are not faster here: 4 take twice as long as 2 or 8."""

    def __init__(self) -> None:
        self.measured = 0

    def copies(self, nbytes: int) -> int:
        return 2

    def measure(self, arms: Mapping[str, Any], copies: int, *rest: Any) -> dict[str, float]:
        self.measured += 1
        return {name: 10.0 + i for i, name in enumerate(arms)}


def times(path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(tuning, "whole_arm", lambda case, plan: lambda i: None)
    running = arms.ExpertArms(Table("gpu", "1", path), 132)
    return cost.timed(CONFIG, SCHEMES, 8, running, timer, torch.device("cpu"))


def test_times_come_from_the_table_of_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer, path = Timer(), tmp_path / "t.json"
    found = times(path, timer, monkeypatch)
    own = CONFIG.experts
    assert own is not None
    weights = 3 * own.routing.experts * CONFIG.hidden_size * own.size
    assert found == {str(scheme): pytest.approx(10.0 / weights) for scheme in SCHEMES}
    assert timer.measured == 3
    assert times(path, timer, monkeypatch) == found
    assert timer.measured == 3


def test_without_a_gpu_bytes_stand_for_time() -> None:
    found, words = cost.per_weight(CONFIG, SCHEMES, 8, "cpu")
    assert found is None
    assert "no GPU here" in words
    found, words = cost.per_weight(CONFIG, [*SCHEMES, parse("w4g32z")], 8, "cuda")
    assert found is None
    assert "w4g32z cannot be timed: its groups of 32 columns" in words
    found, words = cost.per_weight(CONFIG, [parse("w1g128z"), *SCHEMES], 8, "cuda")
    assert found is None
    assert "w1g128z cannot be timed: tiles have no codes of int1" in words
    assert "no multiple of 64" in cost.obstacle(TINY, SCHEMES[0])


def test_costs_decide_where_accuracy_does_not() -> None:
    """With bytes as time the smallest scheme is the fastest; with these costs it is not."""
    names = [str(scheme) for scheme in SCHEMES]
    bits = dict(zip(names, (2.25, 4.25, 8.25)))
    found = Rounded(sizes={(0, 0, "down"): 1000}, picks={0: [5]})
    found.losses = {((0, 0, "down"), name): 1.0 for name in names}
    for costs, wanted in ((None, names[0]), (dict(zip(names, (3.0, 2.0, 1.0))), names[2])):
        blocks = blocks_of(found, bits, "model", False, None, costs)
        plan = Allocator(blocks, bits).solve(budgets(blocks, 9.0), 0.0)
        assert list(plan.schemes.values()) == [wanted]
