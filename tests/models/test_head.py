"""Weights that are quantised when loading: the head has its own 8 bits, whether it is the embedding table or not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.models.table import build_model
from tenfold.ops.kernels import Kernels
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store


@pytest.mark.parametrize("mode", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_states_are_those_of_a_whole_head_and_logits_are_near(
    tiny: Callable[[str], Path], kernels: Kernels, name: str, mode: str
) -> None:
    checkpoint = open_checkpoint(tiny(name))
    states, logits = [], []
    for one in (mode, f"{mode}-blocks"):
        model = build_model(checkpoint.config, Weights(checkpoint, kernels, mode=one), 64)
        step = Sequences(make_store(model.config)).step({0: [5, 7, 9]})
        states.append(model.hidden(step).clone())
        logits.append(model.forward(step).clone())
    assert torch.equal(*states)  # looked up in the same table
    distance = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 0 < distance < 0.02
