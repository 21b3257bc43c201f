"""CBAM (Woo et al. 2018, arXiv 1807.06521): a gate for each channel, then one for each place, over features of which
some places are padding.

Invariant: padding changes no mean and no maximum, and comes out as zeros.
"""

import torch
from torch import Tensor, nn

LOWEST = -16384.0  # below every feature, and the same number in 16 bits of either kind


def masked_mean(x: Tensor, real: Tensor) -> Tensor:
    """Mean of x [B, C, ...] over the real places, [B, C]; zeros where there is none. real [B, 1, ...]: bool."""
    dims = tuple(range(2, x.dim()))
    count = real.expand(-1, 1, *x.shape[2:]).sum(dims).clamp(min=1)
    return (x * real).sum(dims) / count


def masked_max(x: Tensor, real: Tensor) -> Tensor:
    """Likewise the maximum; zeros where no place is real."""
    dims = tuple(range(2, x.dim()))
    top = x.masked_fill(~real, LOWEST).amax(dims)
    return top * (top > LOWEST)


class ChannelGate(nn.Module):
    """sigmoid(MLP(mean) + MLP(max)) of each channel; one MLP for both."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, C, ...], real [B, 1, ...] -> [B, C, 1, ...]."""
        gate = torch.sigmoid(self.mlp(masked_mean(x, real)) + self.mlp(masked_max(x, real)))
        return gate.view(*gate.shape, *[1] * (x.dim() - 2))


class SpatialGate(nn.Module):
    """sigmoid(conv7([mean; max] over channels)) of each place."""

    def __init__(self, dims: int, size: int = 7) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.conv = conv(2, 1, size, padding=size // 2)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, C, ...], real [B, 1, ...] -> [B, 1, ...]."""
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1) * real
        return torch.sigmoid(self.conv(seen))


class Cbam(nn.Module):
    """x plus x through the gates. which: "none", "channel", "spatial" or "both". dims: of places, 1 or 2."""

    def __init__(self, channels: int, which: str, dims: int) -> None:
        super().__init__()
        self.channel = ChannelGate(channels) if which in ("channel", "both") else None
        self.spatial = SpatialGate(dims) if which in ("spatial", "both") else None

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, C, ...], real [B, 1, ...] bool -> as x, zeros where it is not real."""
        if self.channel is None and self.spatial is None:
            return x * real
        gated = x
        if self.channel is not None:
            gated = gated * self.channel(gated, real)
        if self.spatial is not None:
            gated = gated * self.spatial(gated, real)
        return (x + gated) * real
