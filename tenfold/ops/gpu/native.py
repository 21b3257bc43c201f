"""`Gpu`: the `Kernels` of an NVIDIA GPU in bfloat16 or float16.

Each operation runs the arm that the table of choices picks, else a rule. What no arm can run falls to the oracle's
plain PyTorch. Matrices lie as Hugging Face stores them, so every arm, ours or a library's, reads the same bytes.
"""

import copy
import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tenfold.ops import elementwise, formats, tiles
from tenfold.ops.attention import latent
from tenfold.ops.attention.attend import attend
from tenfold.ops.attention.plan import MOST_HEAD_DIM
from tenfold.ops.choose import Table
from tenfold.ops.gemm import grouped
from tenfold.ops.gpu import arms, expert_arms, experts, graphs, nvrtc, rope
from tenfold.ops.gpu import norm as norms
from tenfold.ops.gpu.attending import TRITON, Attending, Reading
from tenfold.ops.gpu.packed import Packing
from tenfold.ops.gpu.pieces import Pieces, Recording
from tenfold.ops.kernels import FREE, UNIFIED, AttentionSpec, Contexts, Heads, Norm, Options, Replay, run
from tenfold.ops.kv import attend as unpacking
from tenfold.ops.kv.layer import PackedLayer
from tenfold.ops.matrix import Bank, Experts, Matrix, RawTensor
from tenfold.ops.oracle import Oracle
from tenfold.ops.route import Routing

COUNT_EVERY = 1.0  # seconds between two reads of the counter of `recomputed`


class Gpu(Oracle):
    """Kernels for one device and one stream of launches. Raises ValueError for a GPU or type they do not serve."""

    name = "gpu"
    recording: Recording | None = None  # of calls of attention, while a model is written down

    def __init__(
        self,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        options: Options = FREE,
    ) -> None:
        super().__init__(device, dtype)
        self.options = options
        capability = torch.cuda.get_device_capability(self.device)
        if capability != nvrtc.CAPABILITY:
            raise ValueError(
                f"the GPU kernels are made for compute capability {'.'.join(map(str, nvrtc.CAPABILITY))} (Hopper), and "
                f"{torch.cuda.get_device_name(self.device)} has {'.'.join(map(str, capability))}."
            )
        if dtype not in nvrtc.HALF:
            raise ValueError(
                f"the GPU kernels compute in bfloat16 or float16 and the compute type is {str(dtype).split('.')[-1]}."
            )
        nvrtc.check_available()
        nvrtc.check_compiler()
        self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        table = arms.table(torch.cuda.get_device_name(self.device))
        self.arms = arms.Arms(self.device, dtype, self.sms, table, options.gemm)
        self.attending = Attending(self.device, self.sms, table, options.merge, options.softmax)
        self.expert_arms = expert_arms.ExpertArms(table, self.sms)
        self.packing = Packing(self.device, self.sms)
        self._recomputed = Recomputed(self.attending.recomputed)

    def on(self, sms: int, table: Table | None = None) -> "Gpu":
        """The same kernels for streams that have so many of the SMs, with workspaces of their own; recomputed rows are
        counted with ours. table: of choices, where it is another.
        """
        other, table = copy.copy(self), self.arms.table if table is None else table
        other.sms = sms
        other.arms = arms.Arms(self.device, self.dtype, sms, table, self.options.gemm)
        options, recomputed = self.options, self.attending.recomputed
        other.attending = Attending(self.device, sms, table, options.merge, options.softmax, recomputed)
        other.expert_arms = expert_arms.ExpertArms(table, sms)
        other.packing = Packing(self.device, sms)
        return other

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        """Packed parts of one format stay packed; all else becomes dense in the compute type."""
        return formats.stack(parts, self.device) if formats.can_stack(parts) else super().matrix(parts)

    def bank(self, experts: Sequence[Sequence[RawTensor]], pairs: bool = False, beside: Collection[str] = ()) -> Bank:
        """Packed experts lie in tiles where their formats and those beside them allow it: one projection alone would be
        made dense at every use.
        """
        if not tiles.can_tile(experts) or tiles.refuses(beside):
            return super().bank(experts, pairs)
        tiled = tiles.bank(
            experts, pairs, lambda parts: super(Gpu, self).matrix(parts).data[0], self.device, self.dtype
        )
        return Bank(tiles.Untiled(tiled), tiled=tiled)

    def replay(self) -> Replay:
        return Pieces(self) if self.options.graphs else run

    def graph(self) -> Replay:
        return graphs.Graphs() if self.options.graphs else run

    def bucket(self, requests: int, pages: int) -> tuple[int, int]:
        return graphs.bucket(requests, pages)

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
        return self.arms(x, w, bias, norm, act, residual)

    def records(self, own: Experts) -> bool:
        return own.stacked is not None or own.tiled is not None

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, own: Experts, residual: Tensor | None = None) -> Tensor:
        chosen = self.expert_arms.plan(x, ids.shape[1], own) if len(x) else None
        if chosen is None:
            return super().experts(x, ids, weights, own, residual)
        by = grouped.sort(ids, len(own), expert_arms.width(chosen), self.expert_arms.turns(own))
        return self.expert_arms.run(chosen, x, by, weights.contiguous(), own, residual)

    def routed(
        self, x: Tensor, scores: Tensor, routing: Routing, own: Experts, residual: Tensor | None = None
    ) -> Tensor:
        """One launch routes and sorts few tokens."""
        few = len(x) > 0 and experts.routes(len(x), routing)
        chosen = self.expert_arms.plan(x, routing.top, own) if few else None
        if chosen is None:
            return super().routed(x, scores, routing, own, residual)
        width, turns = expert_arms.width(chosen), self.expert_arms.turns(own)
        shares, by = experts.routed(scores.contiguous(), routing, width, turns)
        return self.expert_arms.run(chosen, x, by, shares, own, residual)

    def logits(self, x: Tensor, w: Matrix, norm: Norm | None = None) -> Tensor:
        return self.arms.logits(x, w, norm)

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        return elementwise.embed(ids, self.dense(table), scale)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        plain = x.dim() == 2 and x.is_contiguous() and x.dtype in nvrtc.HALF
        return norms.run(x, norm) if plain else elementwise.norm(x, norm)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return elementwise.add_norm(x, y, norm)

    def rope_write(
        self, qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        return rope.write(qkv, heads, positions, slots, keys, values)

    def attention(self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts) -> Tensor:
        if self.recording is not None:
            layer = keys, values
            later = lambda qkv, step, out: self._attention(qkv, heads, *layer, step, out)  # noqa: E731
            return self.recording.attend(qkv, _width(heads), later)
        return self._attention(qkv, heads, keys, values, step)

    def _attention(
        self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts, out: Tensor | None = None
    ) -> Tensor:
        """out: where the result goes."""
        parts = step.parted()
        if parts is None:
            return self._attention_of(qkv, heads, keys, values, step, out)
        out = qkv.new_empty(len(qkv), _width(heads)) if out is None else out
        for x, y, part in zip(step.parted_rows(qkv), step.parted_rows(out), parts):
            self._attention_of(x, heads, keys, values, part, y)
        return out

    def _attention_of(
        self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts, out: Tensor | None
    ) -> Tensor:
        """Of decodes alone, or of what need not be parted."""
        requests, page_size, max_kv = len(step.kv_lengths), keys.shape[2], step.max_kv
        if heads.spec.head_dim > MOST_HEAD_DIM:
            return self._attention_plain(qkv, heads, keys, values, step, out)
        alone = step.max_query == 1 and requests == len(qkv) and not step.shared  # else all is written, then read
        if step.max_query == 1:
            max_kv = step.page_table.shape[1] * page_size  # a captured step serves contexts up to its page table
        known = heads.phi is not None
        place = heads.spec, known  # layers of a kind run alike, and all of a store have one type
        if place not in step.memo:
            tokens = 0 if alone else len(qkv)
            whole = requests == 1 and tokens == step.max_query == step.max_kv
            reading = Reading(heads.spec, requests, max_kv, page_size, keys.dtype, tokens, known, whole)
            arm, softmax = self.attending.pick(reading)
            self._recomputed.used |= known and softmax in UNIFIED
            step.memo[place] = arm if keys.dtype == qkv.dtype else TRITON, softmax
        arm, softmax = step.memo[place]
        return self.attending.run(arm, qkv, heads, keys, values, step, max_kv, softmax, out)

    def _attention_plain(
        self, qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, step: Contexts, out: Tensor | None
    ) -> Tensor:
        """Heads wider than our kernels take: latent attention by one of its own, others by the oracle."""
        max_kv = step.page_table.shape[1] * keys.shape[2] if step.max_query == 1 else step.max_kv
        q = rope.write(qkv, heads, step.positions, step.slots, keys, values)
        contexts, spec = (step.page_table, step.query_start, step.kv_lengths), heads.spec
        if keys.data_ptr() == values.data_ptr() and latent.takes(spec):
            plan = latent.plan(spec, len(step.kv_lengths), step.max_query, max_kv, self.sms)
            found = latent.run(plan, q.contiguous(), keys, *contexts, spec, step.max_query)
        else:
            graphs.refuse(f"attention with heads of {spec.head_dim} channels")
            found = Oracle.attend(self, q, keys, values, *contexts, spec, step.max_query, max_kv)
        return found if out is None else out.copy_(found)

    def attention_packed(self, qkv: Tensor, heads: Heads, layer: PackedLayer, step: Contexts) -> Tensor:
        """Steps of one token a request run kernels that read codes; others read a copy as numbers."""
        if self.recording is not None:
            later = lambda qkv, step, out: out.copy_(self.attention_packed(qkv, heads, layer, step))  # noqa: E731
            return self.recording.attend(qkv, _width(heads), later)
        if self.packing.serves(qkv, heads.spec, layer, step):
            return self.packing(qkv, heads, layer, step)
        parts = step.parted()
        if parts is None:
            graphs.refuse("attention over packed pages that no kernel reads")
            means = self.packing.chunks(qkv, heads.spec, layer)
            return unpacking.attention(self, qkv, heads, layer, step, means)
        return torch.cat([self.attention_packed(x, heads, layer, y) for x, y in zip(step.parted_rows(qkv), parts)])

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        page_table: Tensor,
        query_start: Tensor,
        kv_lengths: Tensor,
        spec: AttentionSpec,
        max_query: int,
        max_kv: int,
        lse: Tensor | None = None,
    ) -> Tensor:
        return attend(
            *(q, keys, values, page_table, query_start, kv_lengths, spec, max_query, max_kv, lse),
            workspace=self.attending.splits,
            sms=self.sms,
        )

    @property
    def recomputed(self) -> int:
        return self._recomputed.total()


class Recomputed:
    """Rows that a unified maximum did not serve, of all lanes of a device. counter: [1] int64 there. used: whether any
    layer runs with a unified maximum.
    """

    def __init__(self, counter: Tensor) -> None:
        self.used = False
        self._counter = counter
        self._told = torch.zeros(1, dtype=torch.int64, pin_memory=counter.is_cuda)
        self._due = 0.0

    def total(self) -> int:
        """As of the last read; the number comes when the device gets there, and nobody waits for it."""
        now = time.monotonic()
        if self.used and now >= self._due:
            self._due = now + COUNT_EVERY
            self._told.copy_(self._counter, non_blocking=True)
        return int(self._told)


def _width(heads: Heads) -> int:
    return heads.spec.heads * heads.spec.head_dim
