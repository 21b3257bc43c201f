"""Scales of columns that meet large inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.models.table import build_model
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import RawTensor
from tenfold.quantize.awq import behind_norm, of_strength, scaled, scales
from tenfold.quantize.gptq import loss_of
from tenfold.quantize.schemes import parse, round_to_nearest
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store
from tests.tiny import EXPERTS

SCHEME = parse("w3g32z")


def uneven(cols: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and second moments of inputs of which some are much larger than others."""
    draw = torch.Generator().manual_seed(0)
    size = torch.exp2(4 * torch.rand(cols, generator=draw) - 2)
    x = torch.randn(500, cols, generator=draw) * size
    return torch.randn(40, cols, generator=draw), x.T @ x / 500


def test_less_is_lost() -> None:
    w, moments = uneven()
    by = scales(w, moments, SCHEME)
    assert (by != 1).any()
    assert torch.equal(by.log2(), by.log2().round())
    plain = loss_of(w, round_to_nearest(w, SCHEME), moments)
    assert loss_of(w, round_to_nearest(w * by, SCHEME) / by, moments) < 0.9 * plain


def test_where_inputs_are_alike_or_absent_nothing_is_scaled() -> None:
    w, _ = uneven()
    for moments in (torch.eye(64), torch.zeros(64, 64)):
        assert torch.equal(scales(w, moments, SCHEME), torch.ones(64))
    some = torch.diag(torch.tensor([0.0, 1.0] * 32))
    assert scales(w, some, SCHEME).isfinite().all()


def test_the_expert_gives_the_same() -> None:
    down, moments = uneven()
    gate_up = torch.randn(128, 48, generator=torch.Generator().manual_seed(1))
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(2))

    def expert(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ down.T

    torch.testing.assert_close(expert(*scaled(gate_up, down, moments, SCHEME)), expert(gate_up, down))


def test_strengths() -> None:
    moments = torch.diag(torch.tensor([16.0, 1.0, 0.0, 1 / 16]))
    assert of_strength(moments, 0.0).tolist() == [1, 1, 1, 1]
    assert of_strength(moments, 1.0).tolist() == [4, 1, 1, 0.25]
    assert of_strength(moments, 0.5).tolist() == [2, 1, 1, 0.5]


@pytest.mark.parametrize("name", [*EXPERTS, "deepseek-v2-groups"])
def test_all_that_reads_a_norm_is_multiplied(name: str, tiny: Callable[[str], Path], kernels: Kernels) -> None:
    """Every family's router, experts and shared experts: the model gives the same, bit for bit."""

    class Scaled:
        def __init__(self, path: Path) -> None:
            self.source = open_checkpoint(path)
            self.path, self.config, self.names = self.source.path, self.source.config, self.source.names
            draw, count = torch.Generator().manual_seed(4), self.config["num_hidden_layers"]
            sizes = torch.randint(-3, 4, (count, self.config["hidden_size"]), generator=draw)
            self.by = {layer: own.float().exp2() for layer, own in enumerate(sizes)}

        def tensor(self, name: str) -> RawTensor:
            raw = self.source.tensor(name)
            data = behind_norm(name, raw.data, self.by)
            changed.add(name) if not torch.equal(data, raw.data) else None
            return RawTensor(name, raw.storage, raw.shape, data)

    changed: set[str] = set()
    found = []
    for checkpoint in (open_checkpoint(tiny(name)), Scaled(tiny(name))):
        model = build_model(checkpoint.config, Weights(checkpoint, kernels), 64)  # type: ignore[arg-type]
        with torch.inference_mode():
            found.append(model.forward(Sequences(make_store(model.config)).step({0: [3, 9, 200], 1: [7]}, "all")))
    assert torch.equal(*found)
    assert any("post_attention_layernorm" in other for other in changed)
    assert not any("down_proj" in other or "w2" in other or "self_attn" in other for other in changed)
