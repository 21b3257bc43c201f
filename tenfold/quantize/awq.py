"""Scales in the manner of AWQ (arXiv 2306.00978): columns that meet large inputs are multiplied by more before they are
rounded, and what makes those inputs is divided by as much.

Scales are powers of two, so that nothing else is rounded by them. Where inputs are another matrix's outputs, as those
of an expert's down are the outputs of its up, the division goes into that one's rows, whose rounding it leaves alone:
rows have scales of their own. Where inputs come from a norm, as those of gate and up do, the norm's weight is divided,
and all that reads it is multiplied: every expert of the layer by the same, the router and the shared expert too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tenfold.quantize.gptq import loss_of
from tenfold.quantize.rotate import FEED, LAYER, NORMS
from tenfold.quantize.schemes import Scheme, round_to_nearest

STRENGTHS = tuple(i / 10 for i in range(11))  # powers of the inputs' size that are tried, none at all among them


def of_strength(moments: Tensor, strength: float) -> Tensor:
    """[cols]: a power of the inputs' size, 1 in the geometric mean; 1 where there was no input."""
    size = moments.float().diagonal().clamp(min=0).sqrt()
    alive = size > 0
    logs = torch.where(alive, size, 1.0).log2()
    logs = torch.where(alive, logs - logs[alive].mean() if bool(alive.any()) else 0.0, 0.0)
    return torch.exp2((strength * logs).round())


def scales(w: Tensor, moments: Tensor, scheme: Scheme) -> Tensor:
    """[cols]: what the columns of w [rows, cols] are multiplied by; of the strengths tried the one whose outputs differ
    least. moments [cols, cols]: of the inputs.
    """
    best, least = torch.ones(w.shape[1], device=w.device), float("inf")
    for strength in STRENGTHS:
        tried = of_strength(moments, strength)
        loss = loss_of(w, round_to_nearest(w * tried, scheme) / tried, moments)
        if loss < least:
            best, least = tried, loss
    return best


def scaled(gate_up: Tensor, down: Tensor, moments: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """An expert that gives the same, gate_up [2 * inner, cols] and down [rows, inner], for a scheme of down.
    moments: of the inputs of down.
    """
    by, inner = scales(down, moments, scheme), down.shape[1]
    up = gate_up[inner:] / by[:, None]
    return torch.cat([gate_up[:inner], up]), down * by


def behind_norm(name: str, tensor: Tensor, by: Mapping[int, Tensor]) -> Tensor:
    """A tensor of a checkpoint where what reads the norm before the experts of a layer is multiplied: by [cols] of each
    layer that has some.
    """
    found = LAYER.fullmatch(name)
    if found is None:
        return tensor
    place, rest = found.groups()
    own = by.get(int(place.split(".")[2]))
    if own is None:
        return tensor
    if rest == NORMS[1]:
        return tensor / own
    return tensor * own if FEED.fullmatch(rest) else tensor
