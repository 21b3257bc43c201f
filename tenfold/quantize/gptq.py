"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and what is lost goes into those to come, by the
second moments of the inputs.

Columns that matter most go first (act-order), with scales and zeros of groups fixed before from the weights as they
were ("static groups"), so the order leaves no trace in what is stored.
"""

import torch
from torch import Tensor

from tenfold.quantize.schemes import Scheme, grid_of

DAMP = 0.01  # of the mean diagonal, added to it
BLOCK = 128  # columns whose later columns wait for one product


class Moments:
    """Second moments of a linear's inputs, and how many there were."""

    def __init__(self, cols: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.sums = torch.zeros(cols, cols, dtype=torch.float32, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x [tokens, cols]; weights [tokens]: how much each counts."""
        x = x.float()
        self.sums += x.T @ (x if weights is None else x * weights.float()[:, None])
        self.count += len(x)

    def mean(self) -> Tensor:
        """[cols, cols]; zeros where there was nothing."""
        return self.sums / max(1, self.count)

    def shrunk(self, others: Tensor, as_many: float) -> Tensor:
        """The mean as if so many inputs more had had the mean of `others`: few inputs alone say little."""
        whole = self.count + as_many
        return (self.sums + others * as_many) / whole if whole else others


def gptq(w: Tensor, moments: Tensor, scheme: Scheme, order: bool = True, damp: float = DAMP) -> Tensor:
    """w [rows, cols] as it is stored, float32; moments [cols, cols]: of the inputs. order: largest moments first.
    Inputs that never were leave their columns rounded by themselves. Raises ValueError for moments that are not finite.
    """
    weight, grid = w.float().clone(), grid_of(w, scheme)
    cols = weight.shape[1]
    hessian = moments.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0  # of no weight in what is added to it
    diagonal += damp * diagonal.mean()
    if not bool(hessian.isfinite().all()):
        raise ValueError(
            "The second moments of a matrix's inputs are not finite; allowed: finite numbers. Check that the model's "
            "weights are whole, or take --rounding rtn."
        )
    places = diagonal.argsort(descending=True, stable=True) if order else torch.arange(cols, device=w.device)
    hessian, weight = hessian[places][:, places], weight[:, places]
    factor = _inverse_factor(hessian)
    rounded = torch.empty_like(weight)
    columns = places.tolist()
    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        own, errors = weight[:, begin:end], torch.zeros(len(weight), end - begin, device=w.device)
        inner = factor[begin:end, begin:end]
        for i in range(end - begin):
            rounded[:, begin + i] = grid.rounded(own[:, i], columns[begin + i])
            error = (own[:, i] - rounded[:, begin + i]) / inner[i, i]
            own[:, i:] -= error[:, None] * inner[i, i:]
            errors[:, i] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    found = torch.empty_like(rounded)
    found[:, places] = rounded
    return found


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper factor U of the inverse, `inverse = U^T U`; damped more where that has none."""
    damp = 0.0
    while True:
        try:
            lower = torch.linalg.cholesky(hessian + damp * torch.eye(len(hessian), device=hessian.device))
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        except torch.linalg.LinAlgError:
            damp = max(10 * damp, 1e-4 * float(hessian.diagonal().mean()))


def loss_of(w: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """Mean square of what the outputs differ by, summed over rows."""
    lost = (w - rounded).float()
    return float(((lost @ moments.float()) * lost).sum())
