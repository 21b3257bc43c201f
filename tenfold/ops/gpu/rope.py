"""Norm, rotary embedding and write of new tokens in CUDA C++: csrc/rope.cu, whose launch costs the host less than that
of the kernel in Triton, which serves all it cannot.
"""

from torch import Tensor

from tenfold.ops import elementwise
from tenfold.ops.gpu import nvrtc
from tenfold.ops.kernels import AttentionSpec, Heads

HEAD_DIMS = (64, 128, 256)
THREADS = 256


def legal(qkv: Tensor, keys: Tensor, spec: AttentionSpec) -> bool:
    """Whether the kernel can run: lanes have whole parts of what rotates."""
    each = spec.head_dim // 32
    return (
        qkv.is_cuda
        and qkv.dtype in nvrtc.HALF
        and keys.dtype == qkv.dtype
        and spec.head_dim in HEAD_DIMS
        and spec.rotary_dim % (2 * each) == 0
    )


def write(qkv: Tensor, heads: Heads, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `Kernels.rope_write`. A token whose slot is negative is not written. keys, values: contiguous in a page."""
    spec, q_norm, k_norm = heads.spec, heads.q_norm, heads.k_norm
    if not legal(qkv, keys, spec):
        return elementwise.rope_write(qkv, heads, positions, slots, keys, values)
    elementwise.refuse_strided(qkv, heads.rope, positions, slots)
    out = qkv.new_empty(len(qkv), spec.heads * spec.head_dim)
    kernel = nvrtc.load("rope.cu", "rope_write", (("HALF", nvrtc.HALF[qkv.dtype]), ("D", spec.head_dim)))
    kernel(
        (len(qkv), 1, 1),
        THREADS,
        0,
        [
            *(qkv, heads.rope, positions, slots, keys, values, out),
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else float(q_norm.eps),
            0.0 if k_norm is None else float(k_norm.eps),
            *(spec.heads, spec.kv_heads, keys.shape[2], keys.stride(0), spec.rotary_dim),
        ],
        dependent=True,
    )
    return out
