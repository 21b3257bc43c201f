"""A forward in slices of layers, on kernels of other lanes, gives what the whole forward gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.models.table import build_model
from tenfold.ops.kernels import Kernels
from tenfold.ops.oracle import Oracle
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store
from tests.tiny import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_on_any_kernels_give_the_whole(tiny: Callable[[str], Path], kernels: Kernels, name: str) -> None:
    checkpoint = open_checkpoint(tiny(name))
    model = build_model(checkpoint.config, Weights(checkpoint, kernels), 64)
    step = Sequences(make_store(model.config)).step({0: [5, 7, 9], 1: list(range(20))})
    expected = model.forward(step).clone()
    for size in (1, 2, 99):
        x, depth = None, model.config.layers
        for begin in range(0, depth, size):
            lane = model.on(kernels) if begin % 2 else model
            x = lane.part(step, x, range(begin, min(depth, begin + size)))
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_a_model_on_other_kernels_shares_its_weights_and_nothing_that_was_recorded(tiny: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(tiny("gemma3"))
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle()), 64)

    class Counting(Oracle):
        linears = 0

        def linear(self, *given: object, **more: object) -> torch.Tensor:  # type: ignore[override]
            self.linears += 1
            return super().linear(*given, **more)  # type: ignore[arg-type]

    own = Counting()
    other = model.on(own)
    step = Sequences(make_store(model.config)).step({0: [5, 7, 9]})
    assert torch.equal(other.forward(step), model.forward(step))
    assert own.linears == 4 * model.config.layers + 1
    assert other.blocks[0] is not model.blocks[0]  # type: ignore[attr-defined]
    assert other.head.weight is model.head.weight  # type: ignore[attr-defined]
