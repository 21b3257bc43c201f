"""The linear operations, experts and attentions of a model, found by running its forward on nothing: shapes and uses,
no weights.

Invariant: no matrix of the checkpoint is read or allocated, so a model of any size is answered for at once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tenfold.cache.store import KVSpec, KVStore
from tenfold.models.table import build_model
from tenfold.nn.step import Step
from tenfold.ops import tiles
from tenfold.ops.formats import is_format
from tenfold.ops.gpu.arms import HEAD, ROUTER, Use, Work
from tenfold.ops.gpu.attending import Layer
from tenfold.ops.gpu.expert_arms import DENSE, ExpertsWork
from tenfold.ops.kernels import Contexts, Heads, Kernels, Norm, Replay, Separate, run
from tenfold.ops.matrix import Bank, Experts, Matrix, RawTensor
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.load import Weights, loaded_storage

Call = Work | ExpertsWork | Layer


class Tracing(Separate):
    """Kernels that compute nothing and write down every linear operation and attention they are asked for, in order."""

    name = "tracing"
    reason = ""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.calls: list[Call] = []

    def replay(self) -> Replay:
        return run

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        raise NotImplementedError("shapes are made into matrices by `Shapes`")

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        return torch.zeros(len(ids), table.cols)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return x

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return x

    def linear(
        self,
        x: Tensor,
        w: Matrix,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        use = Use(norm is not None, act, residual is not None)
        self.calls.append(Work(w.rows, w.cols, w.format, use, len(x), self.dtype))
        return torch.zeros(len(x), w.rows // 2 if act else w.rows)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, own: Experts, residual: Tensor | None = None) -> Tensor:
        formats = Counter((up.format, down.format) for up, down in zip(own.gate_up.each, own.down.each))
        if not tiles.refuses(name for pair in formats for name in pair):  # else they run one by one
            up, down = own.gate_up.each[0], own.down.each[0]
            mix = tuple((*pair, count) for pair, count in sorted(formats.items()))
            self.calls.append(ExpertsWork(len(own), ids.shape[1], up.cols, down.cols, mix, own.act, len(x), self.dtype))
        return x

    def each(self, x: Tensor, bank: Bank) -> Tensor:
        return torch.zeros(*x.shape[:2], bank.each[0].rows)

    def logits(self, x: Tensor, w: Matrix, norm: Norm | None = None) -> Tensor:
        use = ROUTER if norm is None else HEAD
        self.calls.append(Work(w.rows, w.cols, w.format, use, len(x), self.dtype))
        return torch.zeros(len(x), w.rows)

    def attention(self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        self.calls.append(Layer(heads.spec, heads.phi is not None))
        return torch.zeros(len(qkv), heads.spec.heads * heads.spec.head_dim)


class Shapes(Weights):
    """Weights whose matrices have a shape and a format only."""

    def _make(self, parts: Sequence[RawTensor], storages: Sequence[str]) -> Matrix:
        one = storages[0] if len(set(storages)) == 1 else ""
        made = Matrix(one if is_format(one) else "dense", sum(p.shape[0] for p in parts), parts[0].shape[-1], ())
        self.matrices.append(made)
        return made

    def bank(
        self,
        stacked: str,
        names: Sequence[Sequence[str]],
        rows: Sequence[int],
        cols: int,
        beside: Sequence[Sequence[str]] = (),
    ) -> Bank:
        if self.has(stacked):
            return Bank((self._shape([stacked], sum(rows), cols),) * len(names))
        return Bank(tuple(self._shape(own, sum(rows), cols) for own in names))

    def _shape(self, names: Sequence[str], rows: int, cols: int) -> Matrix:
        parts = [self._take(name) for name in names]
        storages = {loaded_storage(self.mode, part.name, part.storage, (rows, cols)) for part in parts}
        one = storages.pop()
        return Matrix(one if is_format(one) and not storages else DENSE, rows, cols, ())

    def bank_of(self, matrices: Tensor) -> Bank:
        return Bank(tuple(Matrix("dense", part.shape[0], part.shape[1], ()) for part in matrices))

    def dense(self, name: str, rows: int, cols: int) -> Tensor:
        return torch.zeros(rows, cols)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward asked of its kernels, in its order."""

    calls: tuple[Call, ...]

    @property
    def works(self) -> list[Work]:
        """Every different linear operation."""
        return [call for call in dict.fromkeys(self.calls) if isinstance(call, Work)]

    @property
    def experts(self) -> list[ExpertsWork]:
        """Every different layer of experts."""
        return [call for call in dict.fromkeys(self.calls) if isinstance(call, ExpertsWork)]

    @property
    def attentions(self) -> list[Layer]:
        """Every different attention."""
        return [call for call in dict.fromkeys(self.calls) if isinstance(call, Layer)]


def traced(checkpoint: Checkpoint, dtype: torch.dtype, mode: str = "auto") -> Trace:
    """A decode step of one token on a GPU. mode: as `Weights`. Raises ValueError for a model that cannot be built."""
    kernels = Tracing(dtype)
    model = build_model(checkpoint.config, Shapes(checkpoint, cast(Kernels, kernels), "cpu", dtype, mode), 1)
    config = model.config
    store = KVStore(KVSpec(config.layers, 1, 1, torch.float32, 1), 1, torch.device("cpu"))
    one = torch.ones(1, dtype=torch.int32)
    model.forward(
        Step(
            token_ids=torch.zeros(1, dtype=torch.int64),
            positions=0 * one,
            slots=0 * one,
            page_table=0 * one[None],
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            kv_lengths=one,
            logits_rows=torch.zeros(1, dtype=torch.int64),
            max_query=1,
            max_kv=1,
            kv=store,
        )
    )
    return Trace(tuple(kernels.calls))
