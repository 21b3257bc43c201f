"""Scales in the manner of AWQ (arXiv 2306.00978): columns that meet large inputs are multiplied by more before they are
rounded, and what makes those inputs is divided by as much.

Scales are powers of two, so that nothing else is rounded by them. Where inputs are another matrix's outputs, as those
of an expert's down are the outputs of its up, the division goes into that one's rows, whose rounding it leaves alone:
rows have scales of their own.
"""

import torch
from torch import Tensor

from tenfold.quantize.gptq import loss_of
from tenfold.quantize.schemes import Scheme, round_to_nearest

STRENGTHS = tuple(i / 10 for i in range(11))  # powers of the inputs' size that are tried, none at all among them


def scales(w: Tensor, moments: Tensor, scheme: Scheme) -> Tensor:
    """[cols]: what the columns of w [rows, cols] are multiplied by; of the strengths tried the one whose outputs differ
    least. moments [cols, cols]: of the inputs.
    """
    size = moments.float().diagonal().clamp(min=0).sqrt()
    alive = size > 0
    logs = torch.where(alive, size, 1.0).log2()
    logs = torch.where(alive, logs - logs[alive].mean() if bool(alive.any()) else 0.0, 0.0)
    best, least = torch.ones_like(size), float("inf")
    for strength in STRENGTHS:
        tried = torch.exp2((strength * logs).round())
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
