"""The linear operations that a model is said to have are those that its forward runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.models.table import build_model
from tenfold.ops.oracle import Oracle
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store
from tests.tiny import TINY

linears = pytest.importorskip("tenfold.engine.linears")


class Recording(Oracle):
    """The oracle, writing down what linear operations it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[tuple[Any, ...]] = set()

    def linear(
        self, x: Any, w: Any, bias: Any = None, *, norm: Any = None, act: Any = None, residual: Any = None
    ) -> Any:
        self.ran.add((w.rows, w.cols, norm is not None, act, residual is not None))
        return super().linear(x, w, bias, norm=norm, act=act, residual=residual)

    def experts(self, *args: Any) -> Any:
        """Products of experts are no linear operations of their own."""
        ran, self.ran = self.ran, set()
        found = super().experts(*args)
        self.ran = ran
        return found


@pytest.mark.parametrize("name", TINY)
def test_every_family(tiny: Callable[[str], Path], name: str) -> None:
    checkpoint, kernels = open_checkpoint(tiny(name)), Recording()
    model = build_model(checkpoint.config, Weights(checkpoint, kernels), 64)
    model.forward(Sequences(make_store(model.config)).step({0: [5]}))
    works = linears.traced(checkpoint, torch.bfloat16).works
    assert len(works) == len(set(works))
    assert {(w.rows, w.cols, w.use.norm, w.use.act, w.use.residual) for w in works} == kernels.ran
    assert {(w.format, w.tokens) for w in works} == {("dense", 1)}


def test_weights_that_are_quantised_when_loaded() -> None:
    works = linears.traced(open_checkpoint("shape:qwen3-8b"), torch.bfloat16, "int4").works
    assert [w.format for w in works] == ["int4g128"] * 4 + ["int8g128"]
    works = linears.traced(open_checkpoint("shape:qwen3-8b"), torch.bfloat16, "int4-blocks").works
    assert [w.format for w in works] == ["int4g128"] * 4 + ["dense"]
