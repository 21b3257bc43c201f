"""Contrastive losses, over features of length 1: between two views of each post, and between posts of one label.

They are those of CLMLF (Li et al. 2022), after SimCLR (arXiv 2002.05709) and SupCon (arXiv 2004.11362).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

HEAT = 0.07  # temperature of both


def of_views(one: Tensor, other: Tensor) -> Tensor:
    """one, other [B, d]: each post must find its other view among those of all posts, and the other way round."""
    close = one @ other.T / HEAT
    target = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(close, target) + F.cross_entropy(close.T, target)) / 2


def of_labels(features: Tensor, labels: Tensor) -> Tensor:
    """features [B, d], labels [B]: each post must find those of its label among all others; 0 where none has a mate."""
    close = features @ features.T / HEAT
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    logs = close - close.masked_fill(itself, float("-inf")).logsumexp(-1, keepdim=True)
    mates = (labels[:, None] == labels[None]) & ~itself
    count = mates.sum(-1)
    each = -(logs * mates).sum(-1) / count.clamp(min=1)
    return each.sum() / (count > 0).sum().clamp(min=1)
