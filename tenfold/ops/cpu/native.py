"""`Native`: the `Kernels` of the CPU. Each operation is one call into the compiled library with a struct of arguments.

Activations are float32 and contiguous; keys and values may be float32, float16 or bfloat16. Ids, positions, slots and
page numbers are the engine's own and are not checked here: they must lie in range.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_void_p, cast
from struct import Struct
from threading import get_ident
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tenfold.base.log import logger
from tenfold.ops.cpu import memory, pack, packed_kv
from tenfold.ops.cpu.lib import prototype, set_threads
from tenfold.ops.cpu.repack import repack
from tenfold.ops.cpu.replay import Recorder, Replay
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Norm, Separate
from tenfold.ops.kv import attend as packed
from tenfold.ops.kv.layer import PackedLayer
from tenfold.ops.matrix import Matrix, RawTensor

# The structs of csrc/ops.h and csrc/packed.h, in their order.
_NORM = Struct("@4P2qf")
_GATHER = Struct("@3P2qif")
_ROWS = Struct("@3Pif")
_LINEAR = Struct("@6Pif2i")
_ROPE_WRITE = Struct("@9P7i2f")
_ATTEND = Struct("@8P8i2f")
_ARGMAX = Struct("@2P2q")
_MAP = Struct("@2Pqi")
_ROPE_WRITE_PACKED = Struct("@11P4i2f")
_ATTEND_PACKED = Struct("@8P8i2f3Pi")
_TYPES = packed_kv.TYPES
_ACTS = {None: 0, "silu": 1, "gelu_tanh": 2}
_LONGEST_HEAD = packed_kv.MOST_CHANNELS
_OPERATIONS = {
    "_norm": "tf_norm",
    "_gather": "tf_gather",
    "_rows": "tf_rows",
    "_linear": "tf_linear_call",
    "_rope_write": "tf_rope_write",
    "_attend": "tf_attend",
    "_rope_write_packed": "tf_rope_write_packed",
    "_attend_packed": "tf_attend_packed",
    "_argmax": "tf_argmax",
    "_map": "tf_map",
}
_F32 = torch.float32


class Native(Separate):
    """Kernels over the compiled library. Raises `lib.Unavailable` where there is none."""

    name = "native"

    def __init__(self, threads: int = 0) -> None:
        """threads: of the process's one pool; 0 takes `lib.default_threads()`."""
        self.reason = ""
        self.threads = set_threads(threads)
        memory.keep_memory()
        self._recording = threading.Lock()
        self._told: set[tuple[str, str]] = set()
        self._prepared: WeakKeyDictionary[PackedLayer, packed_kv.Prepared] = WeakKeyDictionary()
        self._norm: Any
        self._gather: Any
        self._rows: Any
        self._linear: Any
        self._rope_write: Any
        self._attend: Any
        self._rope_write_packed: Any
        self._attend_packed: Any
        self._argmax: Any
        self._map: Any
        for name, function in _OPERATIONS.items():
            setattr(self, name, _operation(function))
        self._empty: Any = torch.empty

    def replay(self) -> Replay:
        return Replay(self._recorded)

    @contextmanager
    def _recorded(self, recorder: Recorder) -> Iterator[None]:
        """Report the calls of the recorder's thread to it, and take the memory of results from it."""
        with self._recording:
            usual = {name: getattr(self, name) for name in (*_OPERATIONS, "_empty")}
            try:
                for name in _OPERATIONS:
                    setattr(self, name, _reporting(usual[name], recorder))
                self._empty = _lending(recorder)
                yield
            finally:
                for name, function in usual.items():
                    setattr(self, name, function)

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        return pack.pack([self._repacked(part) for part in parts])

    def _repacked(self, part: RawTensor) -> RawTensor:
        packed = repack(part)
        if packed is not part and (part.storage, packed.storage) not in self._told:
            self._told.add((part.storage, packed.storage))
            logger.info("weights: %s runs as %s on this CPU, the same values", part.storage, packed.storage)
        return packed

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        if ids.dtype is not torch.int64 or not ids.is_contiguous():
            _refuse("ids", ids, "contiguous int64")
        rows = ids.numel()
        out = self._empty((rows, table.cols))
        if table.handle:
            self._rows(_ROWS.pack(table.handle, ids.data_ptr(), out.data_ptr(), rows, scale))
        else:
            data = table.data[0]
            kind = _type_of(data, "table")
            self._gather(_GATHER.pack(data.data_ptr(), ids.data_ptr(), out.data_ptr(), rows, table.cols, kind, scale))
        return out

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._normed(x, None, norm)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        if x.shape != y.shape:
            raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; they must be equal.")
        return self._normed(y, x, norm)

    def _normed(self, x: Tensor, add: Tensor | None, norm: Norm) -> Tensor:
        _check(x, "x")
        cols = norm.weight.shape[0]
        if x.shape[-1] != cols:
            _refuse("x", x, f"[.., {cols}], the width of the norm")
        if add is not None:
            _check(add, "x")
        out = self._empty(x.shape)
        to_add = 0 if add is None else add.data_ptr()
        self._norm(
            _NORM.pack(x.data_ptr(), norm.weight.data_ptr(), to_add, out.data_ptr(), x.numel() // cols, cols, norm.eps)
        )
        return out

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
        _check(x, "x")
        rows, cols = x.shape
        if cols != w.cols:
            _refuse("x", x, f"[T, {w.cols}], the columns of the weight")
        out = self._empty((rows, w.rows if act is None else w.rows // 2))
        if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
            _refuse("residual", residual, f"contiguous {tuple(out.shape)}, as the result")
        self._linear(
            _LINEAR.pack(
                w.handle,
                x.data_ptr(),
                0 if norm is None else norm.weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                out.data_ptr(),
                rows,
                0.0 if norm is None else norm.eps,
                _ACTS[act],
                w.arms.get(rows, -1),
            )
        )
        return out

    def rope_write(
        self, qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        _check(qkv, "qkv")
        spec, q_norm, k_norm = heads.spec, heads.q_norm, heads.k_norm
        tokens, width = qkv.shape
        if width != (spec.heads + 2 * spec.kv_heads) * spec.head_dim:
            _refuse("qkv", qkv, f"[T, {(spec.heads + 2 * spec.kv_heads) * spec.head_dim}], the heads of q, k and v")
        page_size = self._pages(keys, values, spec)
        out = self._empty((tokens, spec.heads * spec.head_dim))
        self._rope_write(
            _ROPE_WRITE.pack(
                qkv.data_ptr(),
                heads.rope.data_ptr(),
                positions.data_ptr(),
                slots.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                0 if q_norm is None else q_norm.weight.data_ptr(),
                0 if k_norm is None else k_norm.weight.data_ptr(),
                out.data_ptr(),
                tokens,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                spec.rotary_dim,
                page_size,
                _TYPES[keys.dtype],
                0.0 if q_norm is None else q_norm.eps,
                0.0 if k_norm is None else k_norm.eps,
            )
        )
        return out

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
        _check(q, "q")
        if q.shape[1] != spec.heads * spec.head_dim:
            _refuse("q", q, f"[T, {spec.heads * spec.head_dim}], the heads of q")
        if lse is not None and (
            lse.shape != (q.shape[0], spec.heads) or lse.dtype is not _F32 or not lse.is_contiguous()
        ):
            _refuse("lse", lse, f"contiguous float32 [{q.shape[0]}, {spec.heads}]")
        page_size = self._pages(keys, values, spec)
        requests, table_width = page_table.shape
        out = self._empty(q.shape)
        self._attend(
            _ATTEND.pack(
                q.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                page_table.data_ptr(),
                query_start.data_ptr(),
                kv_lengths.data_ptr(),
                out.data_ptr(),
                0 if lse is None else lse.data_ptr(),
                requests,
                table_width,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                page_size,
                _TYPES[keys.dtype],
                spec.window,
                spec.scale,
                spec.softcap,
            )
        )
        return out

    def attention_packed(self, qkv: Tensor, heads: Heads, layer: PackedLayer, step: Contexts) -> Tensor:
        spec = heads.spec
        if not packed_kv.served(layer, spec.head_dim, step):
            parts = step.parted()
            if parts is None or not packed_kv.served(layer, spec.head_dim, parts[0]):
                return packed.attention(self, qkv, heads, layer, step)
            rows = zip(step.parted_rows(qkv), parts)
            return torch.cat([self.attention_packed(x, heads, layer, part) for x, part in rows])
        _check(qkv, "qkv")
        if qkv.shape[1] != (spec.heads + 2 * spec.kv_heads) * spec.head_dim:
            _refuse("qkv", qkv, f"[T, {(spec.heads + 2 * spec.kv_heads) * spec.head_dim}], the heads of q, k and v")
        prepared = self._prepared.get(layer)
        if prepared is None:
            with _disable_current_modes():  # no part of a step that is recorded
                prepared = self._prepared[layer] = packed_kv.prepare(layer, spec.head_dim)
        q = self._write_packed(qkv, heads, prepared, step)
        return self._read_packed(q, heads, layer, prepared, step)

    def _write_packed(self, qkv: Tensor, heads: Heads, prepared: packed_kv.Prepared, step: Contexts) -> Tensor:
        """Rotated queries [T, heads * head_dim]; keys and values go to their pages and rooms."""
        spec, q_norm, k_norm = heads.spec, heads.q_norm, heads.k_norm
        out = self._empty((qkv.shape[0], spec.heads * spec.head_dim))
        self._rope_write_packed(
            _ROPE_WRITE_PACKED.pack(
                prepared.address,
                qkv.data_ptr(),
                heads.rope.data_ptr(),
                step.positions.data_ptr(),
                step.slots.data_ptr(),
                step.query_start.data_ptr(),
                step.kv_lengths.data_ptr(),
                0 if step.rooms is None else step.rooms.data_ptr(),
                0 if q_norm is None else q_norm.weight.data_ptr(),
                0 if k_norm is None else k_norm.weight.data_ptr(),
                out.data_ptr(),
                qkv.shape[0],
                step.page_table.shape[0],
                spec.heads,
                spec.rotary_dim,
                0.0 if q_norm is None else q_norm.eps,
                0.0 if k_norm is None else k_norm.eps,
            )
        )
        return out

    def _read_packed(
        self, q: Tensor, heads: Heads, layer: PackedLayer, prepared: packed_kv.Prepared, step: Contexts
    ) -> Tensor:
        spec, (requests, table_width) = heads.spec, step.page_table.shape
        exact = (layer.exact_keys, layer.exact_values)
        out = self._empty(q.shape)
        self._attend_packed(
            _ATTEND_PACKED.pack(
                q.data_ptr(),
                *(0 if tensor is None else tensor.data_ptr() for tensor in exact),
                step.page_table.data_ptr(),
                step.query_start.data_ptr(),
                step.kv_lengths.data_ptr(),
                out.data_ptr(),
                0,
                requests,
                table_width,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                layer.page_size,
                0 if exact[0] is None else _TYPES[exact[0].dtype],
                0,
                spec.scale,
                spec.softcap,
                prepared.address,
                heads.rope.data_ptr(),
                0 if step.rooms is None else step.rooms.data_ptr(),
                spec.rotary_dim,
            )
        )
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """Index of the largest of each row, the first where several are: [L, V] float32, V at least 1 -> [L] int64."""
        _check(logits, "logits")
        rows, cols = logits.shape
        if cols < 1:
            _refuse("logits", logits, "[L, V] with V at least 1")
        out = self._empty((rows,), dtype=torch.int64)
        self._argmax(_ARGMAX.pack(logits.data_ptr(), out.data_ptr(), rows, cols))
        return out

    def map(self, x: Tensor, function: str) -> Tensor:
        """The "exp" or "tanh" that attention is made of, of each element."""
        _check(x, "x")
        out = self._empty(x.shape)
        self._map(_MAP.pack(x.data_ptr(), out.data_ptr(), x.numel(), ("exp", "tanh").index(function)))
        return out

    def _pages(self, keys: Tensor, values: Tensor, spec: AttentionSpec) -> int:
        """The page size, after a look at the shapes of the pages."""
        _, kv_heads, page_size, head_dim = keys.shape
        if head_dim > _LONGEST_HEAD:
            raise ValueError(f"head_dim is {head_dim}; the CPU kernels take up to {_LONGEST_HEAD}. Use kernels=torch.")
        if kv_heads != spec.kv_heads or head_dim != spec.head_dim:
            _refuse("keys", keys, f"[pages, {spec.kv_heads}, page size, {spec.head_dim}]")
        if keys.dtype not in _TYPES or not keys.is_contiguous():
            _refuse("keys", keys, "contiguous float32, float16 or bfloat16")
        if values.dtype is not keys.dtype or values.shape != keys.shape or not values.is_contiguous():
            _refuse("values", values, f"as keys: contiguous {tuple(keys.shape)} {keys.dtype}")
        return page_size


def _operation(name: str) -> Any:
    """A function of the library that takes one struct. The bytes of the struct live as long as the call."""
    return prototype(name, None, c_char_p)


def _reporting(operation: Any, recorder: Recorder) -> Callable[[bytes], None]:
    address = cast(operation, c_void_p).value or 0

    def call(args: bytes) -> None:
        operation(args)
        if get_ident() == recorder.thread:
            recorder.calls.append((address, args))

    return call


def _lending(recorder: Recorder) -> Callable[..., Tensor]:
    def empty(shape: tuple[int, ...], dtype: torch.dtype = _F32) -> Tensor:
        return (recorder.empty if get_ident() == recorder.thread else torch.empty)(shape, dtype=dtype)

    return empty


def _check(x: Tensor, name: str) -> None:
    if x.dtype is not _F32 or not x.is_contiguous():
        _refuse(name, x, "contiguous float32")


def _type_of(x: Tensor, name: str) -> int:
    if x.dtype not in _TYPES or not x.is_contiguous():
        _refuse(name, x, "contiguous float32, float16 or bfloat16")
    return _TYPES[x.dtype]


def _refuse(name: str, x: Tensor, allowed: str) -> NoReturn:
    layout = "contiguous" if x.is_contiguous() else "not contiguous"
    raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}, {layout}; the CPU kernels take {allowed}.")
