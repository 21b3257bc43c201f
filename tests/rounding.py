"""How far a product of 16-bit or float8 numbers may lie from float64: the bound of tests on a GPU, from the arithmetic.

y = sum over c of x[c] * w[c] is rounded once, to UNIT of its size at most. What is rounded before, each weight or each
sum inside a tensor core, is felt in units of the spread, the root of the sum of squares of x[c] * w[c]:

- Weights that are rounded to 16 bits: errors of at most UNIT each, with signs that x makes random. By Hoeffding's
  inequality a sum leaves t units of the spread with a probability below 2 exp(-t^2 / 2), whatever the errors are: 3e-8
  at t = 6, were every error the largest. Usual ones are a third to a half of it, so that hundreds of millions of
  outputs stay inside; four units, which look like plenty, are left by one output in 5,000 of rows with one scale.
- Sums in float32: a tensor core cuts addends 23 to 25 bits below the largest; 256 additions cost 2^-12 at most.
- Sums of float8: a tensor core cuts its 32 products and their sum 13 bits below the largest, and such sums meet in
  float32 every 128 columns. Emulated, the worst of 10,000 outputs lies 2^-9.9 away over 352 columns, less over more.
"""

import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half of the last bit of 1
WEIGHTS = 6.0  # units of the spread where weights are rounded
SUMS = 2.0**-12
SUMS_FLOAT8 = 2.0**-8


def excess(
    got: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype, *, weights: bool = False, float8: bool = False
) -> float:
    """The largest error of got [T, rows] in units of what is allowed; at most 1 for a right result.

    x [T, cols] and w [rows, cols]: the numbers that are multiplied, exactly. dtype: what results are rounded to;
    weights: whether weights are, too; float8: whether tensor cores add products of float8.
    """
    exact, dense = x.double(), w.double()
    wanted, spread = exact @ dense.T, (exact.square() @ dense.T.square()).sqrt()
    before = (WEIGHTS * UNIT[dtype] if weights else 0.0) + (SUMS_FLOAT8 if float8 else SUMS)
    allowed = UNIT[dtype] * wanted.abs() + before * (1 + UNIT[dtype]) * spread
    smallest = 2.0**-24  # below float16's normal numbers roundings have one size
    return float(((got.double() - wanted).abs() / (allowed + smallest)).max())
