"""`Gpu`: the `Kernels` of an NVIDIA GPU in bfloat16 or float16.

Each operation runs the arm that the table of choices picks, else a rule. What no arm can run falls to the oracle's
plain PyTorch. Matrices lie as Hugging Face stores them, so every arm, ours or a library's, reads the same bytes.
"""

import torch
from torch import Tensor

from tenfold.ops import elementwise
from tenfold.ops.gemm import dense
from tenfold.ops.gpu import decode, graphs, nvrtc, stream
from tenfold.ops.kernels import AttentionSpec, Norm, Replay
from tenfold.ops.matrix import Matrix
from tenfold.ops.oracle import Oracle

LEAST_CAPABILITY = (9, 0)  # Hopper: programmatic dependent launch


class Gpu(Oracle):
    """Kernels for one device and one stream of launches. Raises ValueError for a GPU or type they do not serve."""

    name = "gpu"

    def __init__(self, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device, dtype)
        capability = torch.cuda.get_device_capability(self.device)
        if capability < LEAST_CAPABILITY:
            raise ValueError(
                f"the GPU kernels need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Hopper) or "
                f"newer, and {torch.cuda.get_device_name(self.device)} has {capability[0]}.{capability[1]}."
            )
        if dtype not in stream.DTYPES:
            raise ValueError(
                f"the GPU kernels compute in bfloat16 or float16 and the compute type is {str(dtype).split('.')[-1]}."
            )
        nvrtc.check_available()
        self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.softmax = "lazy"
        self._streaming = stream.Workspace(self.device)
        self._decoding: decode.Workspace | None = None

    def graph(self) -> Replay:
        return graphs.Graphs()

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
        tokens = x.shape[0]
        if w.format == "dense" and 0 < tokens <= stream.MOST_TOKENS["wide"]:
            if tokens not in w.arms:
                w.arms[tokens] = stream.rule(tokens, w.rows, w.cols, self.sms) if tokens <= 8 else None
            plan = w.arms[tokens]
            if plan is not None:
                return stream.run(plan, self._streaming, self.sms, x, w.data[0], bias, norm, act, residual)
        if w.format == "dense":
            return dense.linear(x, w.data[0], bias, norm, act, residual)
        return super().linear(x, w, bias, norm=norm, act=act, residual=residual)

    def embed(self, ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
        return elementwise.embed(ids, table.data[0], scale)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return elementwise.norm(x, norm)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return elementwise.add_norm(x, y, norm)

    def rope_write(
        self,
        qkv: Tensor,
        table: Tensor,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> Tensor:
        return elementwise.rope_write(qkv, table, positions, slots, keys, values, spec, q_norm, k_norm)

    def attention(
        self,
        qkv: Tensor,
        table: Tensor,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        page_table: Tensor,
        query_start: Tensor,
        kv_lengths: Tensor,
        spec: AttentionSpec,
        max_query: int,
        max_kv: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        phi: Tensor | None = None,
    ) -> Tensor:
        requests = len(kv_lengths)
        if max_query == 1 and requests == len(qkv) and decode.legal(spec, keys.dtype, keys.shape[2]):
            longest = page_table.shape[1] * keys.shape[2]  # a captured step serves contexts up to its page table
            plan = decode.plan(spec, requests, longest, self.sms, self.softmax)
            workspace = self._decode_workspace(requests, spec.kv_heads)
            return decode.run(
                *(plan, workspace, qkv, table, positions, slots, keys, values, page_table, kv_lengths),
                *(spec, q_norm, k_norm, phi),
            )
        q = self.rope_write(qkv, table, positions, slots, keys, values, spec, q_norm, k_norm)
        return self.attend(q, keys, values, page_table, query_start, kv_lengths, spec, max_query, max_kv)

    def _decode_workspace(self, requests: int, kv_heads: int) -> decode.Workspace:
        known = self._decoding
        if known is None or known.pairs < requests * kv_heads:
            known = decode.Workspace(self.device, self.sms, max(requests, graphs.LARGEST) * kv_heads)
            self._decoding = known
        return known
