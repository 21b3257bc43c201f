"""On a GPU: products whose weights come by bulk copies, against float64: plans, formats, what is fused, graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops import formats
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix
from tests.ops.gpu.replays import assert_replays
from tests.rounding import excess

bulk = pytest.importorskip("tenfold.ops.gpu.bulk")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),  # a kernel compiles in a second or two
]

SMS = 132
TYPES = [torch.bfloat16, torch.float16]
FORMATS = ["dense", "int2g128", "int2g128z", "int3g128", "int3g128z", "int4", "int4g128z", "int8", "int8g128z"]
FORMATS += ["fp8", "fp8g128", "int4g128"]
CASES = [(kind, format) for kind in bulk.KINDS for format in FORMATS if bulk.reads(kind, format)]


def matrix(format: str, rows: int, cols: int, dtype: torch.dtype, scales: torch.dtype = torch.float16) -> Matrix:
    dense = torch.randn(rows, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(rows)) / cols**0.5
    if format == "dense":
        return Matrix(format, rows, cols, (dense.to(dtype),))
    return Matrix(format, rows, cols, formats.format_of(format).pack(dense, scales).tensors())


def values(w: Matrix) -> Tensor:
    return w.data[0] if w.format == "dense" else formats.unpack(w)


def poisoned(w: Matrix, count: int, act: str | None = None) -> None:
    """Memory as large as the result holds no numbers, so that what is not stored shows."""
    rows = w.rows // 2 if act else w.rows
    spoiled = [torch.full((count, rows), float("nan"), dtype=t, device="cuda") for t in (*TYPES, torch.float32)]
    torch.cuda.synchronize()
    del spoiled


def tokens(count: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(count)).to(dtype)


def reference(
    x: Tensor, w: Matrix, bias: Tensor | None, norm: Norm | None, act: str | None, residual: Tensor | None
) -> Tensor:
    """In float64."""
    read = x.double()
    if norm is not None:
        read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    wanted = read @ values(w).double().T
    wanted = wanted if bias is None else wanted + bias.double()
    if act is not None:
        gate, up = wanted.chunk(2, -1)
        wanted = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
    wanted = wanted if residual is None else wanted + residual.double()
    return wanted


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("kind", "format"), CASES)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 4096), (4, 72, 1280), (13, 72, 1280), (3, 5000, 768)])
def test_products(kind: str, format: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    w, x = matrix(format, rows, cols, dtype), tokens(count, cols, dtype)
    plans = [plan for plan in bulk.candidates(kind, count, rows, cols) if plan.cluster == 1]
    assert plans or (count > bulk.MOST_DIGITS and kind.startswith("digits"))
    for plan in plans:
        assert excess(bulk.run(plan, SMS, x, w), x, values(w), dtype) <= 1, plan


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "format"),
    [
        *(("bulk3", "int3g128z"), ("bulk4", "int4g128z"), ("bulk8", "int8g128"), ("bulk8", "int8")),
        *(("digits3", "int3g128z"), ("digits4", "int4g128"), ("digits8", "int8g128z"), ("digits8", "int8")),
    ],
)
def test_scales_of_each_type(kind: str, format: str, scales: torch.dtype) -> None:
    rows, cols, count = 136, 1280, 3
    w, x = matrix(format, rows, cols, TYPES[0], scales), tokens(count, cols, TYPES[0])
    plan = bulk.BulkPlan(kind, 8, 2, 2, 2, 1)
    got = bulk.run(plan, SMS, x, w, float32=True)
    assert got.dtype == torch.float32
    assert excess(got, x, values(w), TYPES[0]) <= 1


@pytest.mark.parametrize("sizes", [(7, 2, 1), (7, 4, 2), (28, 1, 1), (4, 4, 1), (16, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("kind", "format"), [("bulk", "dense"), ("bulk3", "int3g128z"), ("bulk4", "int4g128"), ("digits3", "int3g128z")]
)
def test_steps_of_other_sizes(kind: str, format: str, sizes: tuple[int, int, int]) -> None:
    rows, cols = 200, 3584
    w, x = matrix(format, rows, cols, TYPES[0]), tokens(3, cols, TYPES[0])
    plan = bulk.BulkPlan(kind, *sizes[:3], 2, 1)
    assert bulk.legal(plan, 3, rows, cols)
    assert excess(bulk.run(plan, SMS, x, w), x, values(w), TYPES[0]) <= 1


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        *(("bulk", "dense"), ("bulk3", "int3g128z"), ("bulk4", "int4"), ("bulk8", "fp8")),
        *(("digits3", "int3g128z"), ("digits4", "int4"), ("digits8", "int8g128z"), ("digits2", "int2g128")),
    ],
)
@pytest.mark.parametrize("fused", ["norm silu bias", "residual", "norm gelu_tanh residual"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_fused(kind: str, format: str, fused: str, dtype: torch.dtype) -> None:
    rows, cols, count = 528, 1024, 3
    w, x = matrix(format, rows, cols, dtype), tokens(count, cols, dtype)
    norm = Norm(torch.rand(cols, device="cuda") + 0.5, 1e-5) if "norm" in fused else None
    bias = torch.randn(rows, device="cuda") if "bias" in fused else None
    act = next((act for act in ("silu", "gelu_tanh") if act in fused), None)
    residual = tokens(count, rows // 2 if act else rows, dtype) if "residual" in fused else None
    wanted = reference(x, w, bias, norm, act, residual)
    plan = next(bulk.candidates(kind, count, rows, cols))
    got = bulk.run(plan, SMS, x, w, bias, norm, act, residual)
    assert (got.double() - wanted).norm() <= (6e-3 if dtype == torch.bfloat16 else 1e-3) * wanted.norm()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["bulk2", "bulk3", "bulk4", "bulk8", "digits2", "digits3", "digits4", "digits8"])
def test_zeros_may_be_fractions(kind: str, dtype: torch.dtype) -> None:
    w, x = matrix(f"int{kind[-1]}g128z", 136, 1280, dtype), tokens(3, 1280, dtype)
    zeros = w.data[2]
    zeros += torch.rand(zeros.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(zeros.dtype)
    plan = next(bulk.candidates(kind, 3, 136, 1280))
    assert excess(bulk.run(plan, SMS, x, w), x, values(w), dtype, weights=kind == "bulk8") <= 1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["digits3", "digits8"])
def test_digits_of_columns_far_apart_in_size(kind: str, dtype: torch.dtype) -> None:
    format = "int3g128z" if kind == "digits3" else "int8"
    w, x = matrix(format, 256, 1024, dtype), tokens(3, 1024, dtype)
    x[0, ::128] *= 1000  # of each group one column
    x[1] *= 2.0**-13
    x[2, :512] = 0
    for plan in bulk.candidates(kind, 3, 256, 1024):
        got = bulk.run(plan, SMS, x, w, float32=True)
        assert excess(got, x, values(w), dtype) <= 1, plan


# Of clusters: sizes of a step (warps, chunks, tall), stages.
SHARED_SIZES = {2: ((8, 2, 1), 3), 4: ((4, 2, 2), 2)}


@pytest.mark.parametrize("cluster", SHARED_SIZES)
@pytest.mark.parametrize(("kind", "format"), CASES)
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1000, 3584), (4, 4100, 1280), (13, 333, 1792)])
def test_blocks_of_a_cluster_divide_the_columns(
    kind: str, format: str, count: int, rows: int, cols: int, cluster: int
) -> None:
    if count > bulk.MOST_DIGITS and kind.startswith("digits"):
        return
    sizes, stages = SHARED_SIZES[cluster]
    w, x = matrix(format, rows, cols, TYPES[0]), tokens(count, cols, TYPES[0])
    plan = bulk.BulkPlan(kind, *sizes, stages, 1, cluster)
    assert bulk.legal(plan, count, rows, cols)
    for sms in (SMS, 8):  # 8: a cluster has many tiles, and turns go round
        poisoned(w, count)
        got = bulk.run(plan, sms, x, w)
        assert excess(got, x, values(w), TYPES[0]) <= 1, sms
        for _ in range(20):
            assert torch.equal(bulk.run(plan, sms, x, w), got)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["digits3:14x1x1x4x1:c2", "digits3:8x1x1x4x2:c4", "bulk4:7x2x2x3x1:c2", "bulk:7x4x1x3x1:c4"]
)
def test_clusters_take_any_number_of_tokens_and_rows(name: str, dtype: torch.dtype) -> None:
    plan, cols = bulk.parse(name), 3584
    format = {"digits3": "int3g128z", "bulk4": "int4g128z", "bulk": "dense"}[plan.kind]
    for count in range(1, 17):
        if count > bulk.MOST_DIGITS and plan.digits:
            break
        rows = 8 * count + 2111
        w, x = matrix(format, rows, cols, dtype), tokens(count, cols, dtype)
        poisoned(w, count)
        for float32 in (False, True):
            got = bulk.run(plan, SMS, x, w, float32=float32)
            assert got.dtype == (torch.float32 if float32 else dtype)
            assert excess(got, x, values(w), dtype) <= 1, count


@pytest.mark.parametrize(
    ("kind", "format"), [("bulk", "dense"), ("bulk4", "int4g128z"), ("digits3", "int3g128z"), ("digits8", "int8")]
)
@pytest.mark.parametrize("cols", [3584, 11008, 18944])
def test_candidates_of_clusters_run_the_shapes_of_models(kind: str, format: str, cols: int) -> None:
    count, rows = 2, 1040
    w, x = matrix(format, rows, cols, TYPES[0]), tokens(count, cols, TYPES[0])
    for plan in bulk.candidates(kind, count, rows, cols):
        if plan.cluster > 1:
            assert excess(bulk.run(plan, SMS, x, w), x, values(w), TYPES[0]) <= 1, plan


@pytest.mark.parametrize("cluster", SHARED_SIZES)
@pytest.mark.parametrize(
    ("kind", "format"),
    [("bulk", "dense"), ("bulk3", "int3g128z"), ("bulk4", "int4"), ("digits3", "int3g128z"), ("digits8", "int8")],
)
@pytest.mark.parametrize("fused", ["norm silu bias", "residual bias", "norm gelu_tanh residual", "norm bias residual"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_fused_into_products_of_clusters(
    kind: str, format: str, fused: str, dtype: torch.dtype, cluster: int
) -> None:
    rows, cols, count = 1104, 1792, 3
    sizes, stages = SHARED_SIZES[cluster]
    plan = bulk.BulkPlan(kind, *sizes, stages, 1, cluster)
    w, x = matrix(format, rows, cols, dtype), tokens(count, cols, dtype)
    x = x * torch.tensor([[1.0], [300.0], [0.01]], device="cuda").to(dtype) if "norm" in fused else x
    norm = Norm(torch.rand(cols, device="cuda") + 0.5, 1e-5) if "norm" in fused else None
    bias = torch.randn(rows, device="cuda") if "bias" in fused else None
    act = next((act for act in ("silu", "gelu_tanh") if act in fused), None)
    residual = tokens(count, rows // 2 if act else rows, dtype) if "residual" in fused else None
    wanted = reference(x, w, bias, norm, act, residual)
    for sms in (SMS, 8):
        poisoned(w, count, act)
        got = bulk.run(plan, sms, x, w, bias, norm, act, residual)
        for y, exact in zip(got.double(), wanted):
            assert (y - exact).norm() <= (6e-3 if dtype == torch.bfloat16 else 1e-3) * exact.norm()
        assert torch.equal(bulk.run(plan, sms, x, w, bias, norm, act, residual), got)


@pytest.mark.parametrize("kind", ["bulk3", "digits3", "digits8"])
def test_numbers_that_are_none_stay_so(kind: str) -> None:
    w, x = matrix("int3g128z" if kind[-1] == "3" else "int8", 64, 512, TYPES[0]), tokens(3, 512, TYPES[0])
    x[0, 100], x[1, 200] = float("nan"), float("inf")
    got = bulk.run(next(bulk.candidates(kind, 3, 64, 512)), SMS, x, w)
    assert not got[:2].isfinite().any()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("cluster", bulk.CLUSTERS)
@pytest.mark.parametrize(
    ("kind", "format"), [("bulk", "dense"), ("bulk3", "int3g128z"), ("bulk8", "int8"), ("digits3", "int3g128z")]
)
def test_bits_repeat_in_a_graph_whose_products_follow_each_other(kind: str, format: str, cluster: int) -> None:
    first, second = (matrix(format, 1024, 1024, TYPES[0]) for _ in range(2))
    x = tokens(4, 1024, TYPES[0])
    plan = next(plan for plan in bulk.candidates(kind, 4, 1024, 1024) if plan.cluster == cluster)

    def three() -> Tensor:
        got = x
        for w in (first, second, first):
            got = bulk.run(plan, SMS, got, w)
        return got

    assert_replays(three)
