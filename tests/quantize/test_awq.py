"""Scales of columns that meet large inputs."""

import torch

from tenfold.quantize.awq import scaled, scales
from tenfold.quantize.gptq import loss_of
from tenfold.quantize.schemes import parse, round_to_nearest

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
