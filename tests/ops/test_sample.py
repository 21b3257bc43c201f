"""Sampling functions against references written the long way, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tenfold.ops import sample as ops

VOCAB = 50


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def cut(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The distribution that is left, token by token: temperature, then top-k, then top-p, then min-p."""
    p = softmax(logits.astype(np.float64) / temperature)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    kept, share, total = [], 0.0, sum(p[i] for i in order)
    for i in order:
        kept.append(i)
        share += p[i] / total
        if share >= top_p:
            break
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    rest = sum(p[i] for i in kept)
    return {i: p[i] / rest for i in kept}


# Random numbers


def test_uniform_numbers_depend_on_seed_and_count_alone() -> None:
    assert ops.uniform(1, 2) == ops.uniform(1, 2)
    values = {ops.uniform(seed, count) for seed in range(-20, 20) for count in range(50)}
    assert len(values) == 2000
    assert all(0 < u < 1 for u in values)


@pytest.mark.parametrize("along", ["seeds", "counts"])
def test_uniform_numbers_are_uniform_and_uncorrelated(along: str) -> None:
    n = 20_000
    u = np.array([ops.uniform(i, 3) if along == "seeds" else ops.uniform(12, i) for i in range(n)])
    observed, _ = np.histogram(u, bins=50, range=(0, 1))
    chi = ((observed - n / 50) ** 2 / (n / 50)).sum()
    assert chi < 85.4  # 49 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def test_extreme_seeds_work() -> None:
    for seed in (-(2**63), 2**63 - 1, 0):
        assert 0 < ops.uniform(seed, 0) < 1


# Transforms


def test_argmax_is_the_first_of_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, -1.0, 0.0]])
    assert ops.argmax(logits).tolist() == [1, 0]
    assert ops.argmax(logits.double()).tolist() == [1, 0]


def test_penalties_follow_their_definitions() -> None:
    logits = logits_of(2)
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(rng.integers(0, 3, (2, VOCAB)).astype(np.float32))
    seen = torch.from_numpy(rng.random((2, VOCAB)) < 0.3)
    factors = [(1.5, 0.2, 0.7), (1.0, -0.5, 0.0)]
    repetition, presence, frequency = (column(*f) for f in zip(*factors))
    got = ops.penalise_repetition(logits, seen | (counts > 0), repetition)
    got = ops.penalise_use(got, counts, presence, frequency)
    for r, (repetition, presence, frequency) in enumerate(factors):
        for t in range(VOCAB):
            x, count = float(logits[r, t]), int(counts[r, t])
            if seen[r, t] or count:
                x = x / repetition if x > 0 else x * repetition
            x -= frequency * count + presence * (count > 0)
            assert float(got[r, t]) == pytest.approx(x, abs=1e-5)


def test_log_probabilities_are_the_models_own() -> None:
    logits = logits_of(3)
    tokens = torch.tensor([4, 0, 49])
    own, best, ids = ops.log_probabilities(logits, tokens, 2)
    for r in range(3):
        logs = np.log(softmax(logits[r].double().numpy()))
        assert float(own[r]) == pytest.approx(logs[tokens[r]], abs=1e-5)
        assert ids[r].tolist() == list(np.argsort(-logs)[:2])
        assert best[r].tolist() == pytest.approx(sorted(logs)[::-1][:2], abs=1e-5)


def test_asking_for_no_best_tokens_gives_none() -> None:
    own, best, _ = ops.log_probabilities(logits_of(1), torch.tensor([3]), 0)
    assert best.shape == (1, 0)
    assert own.shape == (1,)


# Drawing

CUTS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.0, 0, 1.0, 1.0),
    (0.9, 20, 0.9, 0.05),
    (1.0, 3, 0.5, 0.0),
    (1.0, VOCAB, 0.999, 0.0),
]


@pytest.mark.parametrize("values", CUTS)
@pytest.mark.parametrize("width", [0, VOCAB])
def test_drawing_inverts_the_cut_distribution(values: tuple[float, int, float, float], width: int) -> None:
    """Fine steps of u must give each token its share, and no token that was cut."""
    temperature, top_k, top_p, min_p = values
    logits = logits_of(1)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    rows = logits.expand(4000, -1)
    if values == CUTS[0]:
        drawn = ops.draw(rows, column(temperature), u)
    else:
        sizes = column(top_k, dtype=torch.int64), column(top_p, dtype=torch.float64), column(min_p)
        drawn = ops.draw_truncated(rows, *(c.expand(4000, 1) for c in (column(temperature), *sizes)), u, width)
    expected = cut(logits[0].numpy(), *values)
    assert set(drawn.tolist()) <= set(expected)
    shares = np.bincount(drawn.numpy(), minlength=VOCAB) / 4000
    for token, p in expected.items():
        assert abs(shares[token] - p) < 1e-3


@pytest.mark.parametrize("values", [(1.0, 0, 1.0, 0.0), (0.8, 12, 0.95, 0.02)])
def test_draws_by_seed_have_the_right_distribution(values: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = values
    n, logits = 8000, logits_of(1, vocab=20, spread=1.0)
    u = torch.from_numpy(ops.uniforms(list(range(n)), [5] * n))
    rows = logits.expand(n, -1)
    cuts = column(temperature), column(top_k, dtype=torch.int64), column(top_p, dtype=torch.float64), column(min_p)
    drawn = ops.draw_truncated(rows, *(c.expand(n, 1) for c in cuts), u) if top_k else ops.draw(rows, cuts[0], u)
    expected = cut(logits[0].numpy(), *values)
    observed = np.bincount(drawn.numpy(), minlength=20)
    chi = sum((observed[t] - n * p) ** 2 / (n * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert chi < freedom + 3.1 * math.sqrt(2 * freedom) + 5  # beyond p = 0.001
    assert observed.sum() == sum(observed[t] for t in expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (0, 0.9), (0, 0.9999), (2000, 0.99), (2000, 0.3), (99999, 0.9)])
def test_a_nucleus_wider_than_the_first_candidates_is_exact(top_k: int, top_p: float) -> None:
    """Flat logits over 12000 tokens: a half fits into 8192 candidates but not into 1024, 0.9 not even into those; of
    the best 2000 the mass of all is what counts, and of as many as there are.
    """
    vocab, n = 12000, 64
    logits = logits_of(1, vocab=vocab, spread=0.05)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    cuts = column(1.0), column(top_k, dtype=torch.int64), column(top_p, dtype=torch.float64), column(0.0)
    drawn = ops.draw_truncated(logits.expand(n, -1), *(c.expand(n, 1) for c in cuts), u)
    expected = cut(logits[0].numpy(), 1.0, top_k, top_p, 0.0)
    order = list(expected)
    mass = np.cumsum([expected[t] for t in order])
    for value, token in zip(u.tolist(), drawn.tolist()):
        place = order.index(token)
        assert mass[place] - expected[token] - 1e-4 <= value <= mass[place] + 1e-4


@pytest.mark.parametrize("top_k", [1024, 1025, 8193])
def test_a_top_k_larger_than_the_first_candidates_is_exact(top_k: int) -> None:
    logits = logits_of(1, vocab=12000, spread=0.01)
    u = torch.tensor([0.5, 1 - 2.0**-49])
    cuts = column(1.0), column(top_k, dtype=torch.int64), column(1.0, dtype=torch.float64), column(0.0)
    drawn = ops.draw_truncated(logits.expand(2, -1), *(c.expand(2, 1) for c in cuts), u.double())
    ranks = logits[0].argsort(descending=True, stable=True).argsort()[drawn]
    assert abs(int(ranks[0]) - top_k / 2) < top_k / 50
    assert int(ranks[1]) == top_k - 1


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = logits_of(1)
    logits[0, ::2] = -torch.inf
    logits[0, -1] = -torch.inf
    u = torch.tensor([2.0**-49, 0.3, 1 - 2.0**-49], dtype=torch.float64)
    drawn = ops.draw(logits.expand(3, -1), column(5.0), u)
    assert torch.isfinite(logits[0, drawn]).all()
    cuts = column(5.0), column(VOCAB, dtype=torch.int64), column(1.0, dtype=torch.float64), column(0.0)
    drawn = ops.draw_truncated(logits.expand(3, -1), *(c.expand(3, 1) for c in cuts), u)
    assert torch.isfinite(logits[0, drawn]).all()


@pytest.mark.parametrize("vocab", [50, 331, 9001])
def test_a_row_does_not_depend_on_its_batch_in_a_single_bit(vocab: int) -> None:
    """Each function on many rows gives exactly what it gives on each row alone."""
    rows = 9
    logits = logits_of(rows, vocab=vocab)
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    temperature = torch.rand(rows, 1, generator=generator) + 0.3
    top_k = torch.randint(0, 40, (rows, 1), generator=generator)
    top_p = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    min_p = torch.rand(rows, 1, generator=generator) * 0.1
    counts = torch.randint(0, 3, (rows, vocab), generator=generator, dtype=torch.int32)
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    functions = [
        (ops.draw, (logits, temperature, u)),
        (ops.draw_truncated, (logits, temperature, top_k, top_p, min_p, u)),
        (ops.penalise_repetition, (logits, counts > 1, temperature)),
        (ops.penalise_use, (logits, counts.float(), temperature, min_p)),
        (lambda x, t: ops.log_probabilities(x, t, 5)[0], (logits, tokens)),
        (lambda x, t: ops.log_probabilities(x, t, 5)[1], (logits, tokens)),
    ]
    for function, arguments in functions:
        together = function(*arguments)
        for r in range(rows):
            alone = function(*(a[r : r + 1] for a in arguments))
            assert torch.equal(together[r : r + 1], alone)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_allow_only_keeps_the_tokens_whose_bit_is_set(vocab, dtype):
    """Both ways it is done: NumPy for float32 on a CPU, tensor operations for the rest."""
    rng = np.random.default_rng(vocab)
    logits = torch.from_numpy(rng.normal(size=(4, vocab))).to(dtype)
    bits = rng.integers(0, 2**32, (2, vocab // 32 + 1), dtype=np.uint32)
    expected = logits.clone()
    for place, row in zip((3, 1), bits):
        for token in range(vocab):
            if not row[token // 32] >> (token % 32) & 1:
                expected[place, token] = -torch.inf
    ops.allow_only(logits, [3, 1], list(bits))
    assert torch.equal(logits, expected)
    ops.allow_only(logits, [], [])
    assert torch.equal(logits, expected)


def test_allow_few_keeps_the_tokens_named():
    logits = logits_of(3)
    expected = torch.full((3, VOCAB), -torch.inf)
    expected[1, [0, 7, 49]] = logits[1, [0, 7, 49]]
    expected[[0, 2]] = logits[[0, 2]]
    ops.allow_few(logits, 1, np.array([0, 7, 49]))
    assert torch.equal(logits, expected)
