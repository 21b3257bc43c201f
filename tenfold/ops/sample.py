"""From logits to a token, as pure functions on tensors.

Rows are independent: the result of a row never depends on the others, on a CPU not in a single bit. So transcendental
functions run only inside row kernels (`softmax`, `log_softmax` over the last dimension), never elementwise over a
batch, where vectorised bodies and scalar tails may round differently; and random numbers are a hash of (seed, count),
made on the host. Shapes: R rows, V vocabulary entries; logits [R, V] float32.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tenfold.ops.gpu import argmax as gpu
from tenfold.ops.host import sent

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
WIDTHS = (1024, 8192)  # how many candidates are looked at before the whole vocabulary is sorted


# For each byte of a mask, what its 8 tokens' logits are at most.
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_LIMITS = _LIMITS.astype(np.float32)


def uniform(seed: int, count: int) -> float:
    """A number in (0, 1), at least 2^-49 from both ends: SplitMix64 (Steele et al. 2014) of the seed, then of that
    and the count.
    """
    bits = _mix((_mix(seed & _MASK) + (count + 1) * _GOLDEN) & _MASK)
    return ((bits >> 16) + 0.5) * 2.0**-48


def _mix(z: int) -> int:
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def argmax(logits: Tensor) -> Tensor:
    """The best token of each row, the first of equals -> [R] int64."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(-1))  # 10 times faster than torch's for one row of 49k
    if logits.is_cuda and gpu.can_run(logits):
        return gpu.argmax(logits)
    return logits.argmax(-1)


def penalise_repetition(logits: Tensor, seen: Tensor, repetition: Tensor) -> Tensor:
    """Tokens of prompt or answer, seen [R, V] bool: their logits are divided where positive and multiplied where
    negative by repetition [R, 1].
    """
    return torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)


def penalise_use(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Each token generated counts [R, V] float32 times loses `presence + frequency * count` (both [R, 1])."""
    return logits - frequency * counts - presence * counts.sign()


def allow_only(logits: Tensor, places: list[int], bits: Sequence[np.ndarray]) -> None:
    """In place: logits[places[i], t] becomes -inf for each token t whose bit is not set in bits[i] [words] uint32."""
    vocab = logits.shape[1]
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # A row of 49k takes 12 us; by masked_fill_, which branches, up to 200 us (AVX-512, 2026-11).
        rows = logits.numpy()
        limits = np.empty((-(-vocab // 8), 8), np.float32)
        for place, row in zip(places, bits):
            np.take(_LIMITS, row.view(np.uint8)[: len(limits)], axis=0, out=limits, mode="clip")
            np.minimum(rows[place], limits.reshape(-1)[:vocab], out=rows[place])
        return
    if not places:
        return
    words = sent(np.stack(bits).view(np.int32), logits.device)
    allowed = (words[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32)) & 1
    index = sent(places, logits.device)
    logits[index] = logits[index].masked_fill(allowed.flatten(1)[:, :vocab] == 0, -torch.inf)


def allow_few(logits: Tensor, place: int, ids: np.ndarray) -> None:
    """In place, on a CPU: logits[place, t] becomes -inf for each token t that is not in ids [A] int64."""
    row = logits.numpy()[place]
    kept = row[ids]
    row.fill(-np.inf)
    row[ids] = kept


def draw(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Sample from softmax(logits / temperature): the first token, in order of ids, at which the cumulated
    probability exceeds u of the total. temperature [R, 1], u [R] float64 -> [R] int64.
    """
    mass = torch.softmax(logits / temperature, -1).cumsum(-1, dtype=torch.float64)
    return _locate(mass, u * mass[:, -1])


def draw_truncated(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor, width: int = 0
) -> Tensor:
    """Sample from softmax(logits / temperature) cut to its best tokens, in order of probability.

    Kept are the top_k best (0: all); of those the fewest whose share reaches top_p; of those the ones with at least
    min_p times the best one's probability. All three keep a beginning of the sorted order, so the cut is one number a
    row. All but logits and u are [R, 1]. width: how many of the best to look at, where the caller knows that it
    suffices; 0: found out, which reads a flag back to the host.
    """
    probabilities = torch.softmax(logits / temperature, -1)
    if width:
        return _draw_best(*_best(probabilities, width), top_k, top_p, min_p, u)[0]
    size = probabilities.shape[1]
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    left = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for width in (*(w for w in WIDTHS if w < size), size):
        drawn, fits = _draw_best(*_best(probabilities[left], width), top_k[left], top_p[left], min_p[left], u[left])
        tokens[left] = drawn
        if width == size or bool(fits.all()):
            break
        left[left.clone()] = ~fits
    return tokens


def _best(probabilities: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` highest of each row, best first, and their ids."""
    if probabilities.device.type != "cpu":
        values, ids = probabilities.topk(width, -1)
        return values, ids
    # NumPy selects and sorts with vectors: for one row of 49k, 0.06 ms for the best 1024 where torch.topk takes 0.8 ms,
    # and 0.5 ms for all where torch.sort takes 8 ms (AVX2, 2026-11).
    if width == probabilities.shape[1]:
        ids = torch.from_numpy(np.argsort(-probabilities.numpy(), axis=-1))
        return probabilities.gather(1, ids), ids
    ids = torch.from_numpy(np.argpartition(probabilities.numpy(), -width, axis=-1)[:, -width:])
    values = probabilities.gather(1, ids)
    order = torch.from_numpy(np.argsort(-values.numpy(), axis=-1))
    return values.gather(1, order), ids.gather(1, order)


def _draw_best(
    sorted_p: Tensor, ids: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the best `width` probabilities, and for which rows the cut lies within them."""
    width = sorted_p.shape[1]
    mass = sorted_p.cumsum(-1, dtype=torch.float64)
    k = torch.where((top_k > 0) & (top_k < width), top_k, width)
    total = torch.where(top_k > 0, mass.gather(1, k - 1), 1.0)
    in_nucleus = mass - sorted_p < top_p * total
    kept = (
        (torch.arange(width, device=mass.device) < k)
        & (in_nucleus | (top_p >= 1))
        & (sorted_p >= min_p * sorted_p[:, :1])
    )
    count = kept.sum(-1, keepdim=True).clamp_(min=1)  # none, where no token has a probability
    told = (top_k <= width) | (top_p >= 1)  # else the mass that top_p is a share of lies further on
    fits = (count < width) & told | ((top_k > 0) & (top_k <= width))
    index = _locate(mass, u * mass.gather(1, count - 1).squeeze(1))
    return ids.gather(1, torch.minimum(index[:, None], count - 1)).squeeze(1), fits.squeeze(1)


def _locate(mass: Tensor, target: Tensor) -> Tensor:
    """First index of each row of the non-decreasing mass [R, W] that exceeds target [R]."""
    return torch.searchsorted(mass, target[:, None], right=True).squeeze(1).clamp_(max=mass.shape[1] - 1)


def log_probabilities(logits: Tensor, tokens: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of softmax(logits): of `tokens` [R] -> [R]; the `best` highest -> [R, best], and their ids."""
    logs = torch.log_softmax(logits, -1)
    values, ids = logs.topk(min(best, logs.shape[1]), -1)
    return logs.gather(1, tokens[:, None]).squeeze(1), values, ids


def asked_probabilities(logits: Tensor, asked: Tensor) -> Tensor:
    """Natural logarithms of softmax(logits) of the ids asked [R, A] -> [R, A]."""
    return torch.log_softmax(logits, -1).gather(1, asked)


def uniforms(seeds: list[int], counts: list[int]) -> np.ndarray:
    """`uniform` of each pair -> [R] float64."""
    return np.array([uniform(s, c) for s, c in zip(seeds, counts)], dtype=np.float64)
