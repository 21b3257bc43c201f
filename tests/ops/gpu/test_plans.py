"""Plans of CUDA C++ kernels are pure: what they promise holds for every shape, and their names lead back to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.ops.gpu import (
    bulk,
    decode,
    even,
    experts,
    graphs,
    hopper,
    nvrtc,
    prefill,
    ring,
    ring_packed,
    stream,
    stream_packed,
    sums,
)
from tenfold.ops.kernels import AttentionSpec

SMS = 132
TOKENS = st.integers(1, 64)
ROWS = st.integers(1, 4096).map(lambda n: 8 * n)
COLS = st.integers(1, 512).map(lambda n: 32 * n)


@given(TOKENS, ROWS, COLS)
def test_every_candidate_is_legal_and_its_name_leads_back(tokens: int, rows: int, cols: int) -> None:
    for module in (stream, ring):
        for plan in module.candidates(tokens, rows, cols, *(() if module is stream else (SMS,))):
            assert module.legal(plan, tokens, rows, cols)
            assert module.parse(str(plan)) == plan
    for kind in stream_packed.CODES:
        for plan in stream_packed.candidates(kind, tokens, rows, cols):
            assert stream_packed.legal(plan, tokens, rows, cols)
            assert stream_packed.parse(str(plan)) == plan
    for kind in bulk.KINDS:
        for copied in bulk.candidates(kind, tokens, rows, cols):
            assert bulk.legal(copied, tokens, rows, cols)
            assert bulk.parse(str(copied)) == copied
            assert copied.threads <= 1024
    for kind in ring_packed.CODES:
        for packed in ring_packed.candidates(kind, tokens, rows, cols, SMS):
            assert ring_packed.legal(packed, tokens, rows, cols)
            assert ring_packed.parse(str(packed)) == packed


@pytest.mark.parametrize("kind", bulk.KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (28672, 4096), (3584, 18944), (4096, 14336), (22016, 11264)])
def test_bulk_copies_serve_the_shapes_of_models(kind: str, rows: int, cols: int) -> None:
    plans = list(bulk.candidates(kind, 1, rows, cols))
    assert plans
    for cluster in bulk.CLUSTERS:
        idle = [bulk.idle(plan, cols) for plan in plans if plan.cluster == cluster]
        assert idle == sorted(idle)
    assert [plan.cluster for plan in plans] == sorted(plan.cluster for plan in plans)
    assert len(set(plans)) == len(plans) <= 2 * len(bulk.SIZES_DENSE if kind == bulk.DENSE else bulk.SIZES)
    assert not list(bulk.candidates(kind, 17, rows, cols))
    assert bool(list(bulk.candidates(kind, 5, 4096, 4096))) != kind.startswith("digits")


@given(st.sampled_from(bulk.KINDS), TOKENS, COLS, st.sampled_from(bulk.CLUSTERS), st.integers(1, 5), st.integers(1, 2))
def test_blocks_of_a_cluster_divide_the_columns(
    kind: str, tokens: int, cols: int, cluster: int, chunks: int, tall: int
) -> None:
    plan = bulk.BulkPlan(kind, 4, chunks, tall, 2, 1, cluster)
    if not bulk.legal(plan, tokens, 64, cols):
        return
    shares = [plan.share(rank, cols) for rank in range(cluster)]
    assert [col for share in shares for col in share] == list(range(cols))
    assert all(0 < len(share) <= plan.widest(cols) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) in (0, plan.unit)
    for share in shares:  # copies begin at whole 16 bytes, those of numbers at whole words, and no warp has half a turn
        assert share.start * plan.bits % 128 == 0
        assert kind == bulk.DENSE or share.start // 128 % 2 == 0
        assert len(share) % (chunks * plan.chunk_cols) == 0
    one = bulk.BulkPlan(kind, 4, chunks, tall, 2, 1)
    own = bulk.shared_bytes(plan, tokens, cols) - bulk.sent_bytes(plan, tokens)
    assert own == bulk.shared_bytes(one, tokens, plan.widest(cols))


def test_clusters_that_cannot_be_are_not_legal() -> None:
    assert not ring.legal(ring.parse("ring:5x1x64:c8"), 8, 4096, 4096)
    assert bulk.legal(bulk.parse("digits3:8x1x1x2x1:c4"), 1, 64, 1024)
    for name in ("digits3:8x1x1x2x1:c4", "bulk8:8x2x1x2x1:c4"):  # three units of columns for four blocks
        assert not bulk.legal(bulk.parse(name), 1, 64, 768)
    assert not bulk.legal(bulk.BulkPlan("bulk4", 8, 1, 1, 2, 1, 3), 1, 64, 4096)
    assert not bulk.legal(bulk.parse("digits4:14x2x1x2x1"), 4, 4096, 18944)  # digits of all columns do not fit
    assert bulk.legal(bulk.parse("digits4:14x2x1x2x1:c4"), 4, 4096, 18944)


@pytest.mark.parametrize("stages", [0, 1])
def test_rings_of_fewer_than_two_stages_are_not_legal(stages: int) -> None:
    """Sums of a cluster do not fit where one stage was, and experts give a stage back when they have the next."""
    for name in (f"ring:{stages}x1x256:c2", f"ring-fp8:{stages}x1x64"):
        assert not ring.legal(ring.parse(name), 33, 4096, 4096)
    assert not experts.legal(experts.parse(f"experts:8x64x2x{stages}x1"), 4096, 4096, gate=True)
    assert experts.legal(experts.parse("experts:8x64x2x2x1"), 4096, 4096, gate=True)


def test_two_blocks_divide_long_rows_of_digits_where_nothing_was_measured() -> None:
    for tokens in (1, 2, 8):
        for cols in (3584, 18944):
            plans = list(bulk.rule("int4g128", tokens, 4096, cols))
            assert {plan.kind for plan in plans} <= {"digits4", "bulk4"}
            assert any(plan.digits for plan in plans) == (tokens <= 2)
            for plan in plans:
                assert plan.cluster == (2 if plan.digits and cols > 8192 else 1)


@given(TOKENS, ROWS, COLS)
def test_sums_of_a_ring_fit(tokens: int, rows: int, cols: int) -> None:
    for plan in ring.candidates(tokens, rows, cols, SMS):
        blocks = ring.grid(plan, rows, cols, SMS)
        assert blocks > 0
        assert ring.shared_bytes(plan, tokens, cols) <= hopper.SHARED
        if plan.splits != 1:
            assert 2 * blocks * plan.height * ring.width(tokens) * 4 <= sums.WORKSPACE
        if plan.cluster > 1:
            assert plan.splits == plan.blocks == 1
            assert blocks <= SMS
            assert plan.height // 2 % (8 * plan.cluster) == 0  # with a gate threads store 8 rows together, too
            assert -(-cols // plan.step_cols) >= plan.cluster
            stages = plan.stages * 128 * ring.boxes(plan.height) * (plan.height + ring.width(tokens))
            assert ring.width(tokens) * (plan.height + 4) * 4 <= stages  # sums lie where stages were


@given(TOKENS, ROWS, COLS, st.sampled_from(list(ring_packed.CODES)))
def test_a_ring_of_codes_has_stages_and_room_for_sums(tokens: int, rows: int, cols: int, kind: str) -> None:
    plans = list(ring_packed.candidates(kind, tokens, rows, cols, SMS))
    assert {plan.splits for plan in plans} >= {0, 1}
    for plan in plans:
        codes, boxes = plan.height * 128, plan.step_cols // 64
        assert ring_packed.stage_bytes(plan, tokens) == codes + boxes * ring.width(tokens) * 128
        assert ring_packed.shared_bytes(plan, tokens) * plan.blocks <= hopper.SHARED_SM
        if plan.splits != 1:
            blocks = ring.grid(plan, rows, cols, SMS)
            assert blocks > 0
            assert 2 * blocks * plan.height * ring.width(tokens) * 4 <= sums.WORKSPACE


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((stream, "stream:16x4"), (stream, "flat:1x2x3"), (ring, "ring:6x1x64:other"), (ring, "ring:6x1")),
        (stream_packed, "stream:1x2x3"),
        (stream_packed, "stream8:1x2"),
        (bulk, "bulk3:14x2x3x2x1"),
        (bulk, "digits:14x2x1x2x1"),
        (bulk, "digits3:14x2x1x2x1:c1"),
        (bulk, "digits3:14x2x1x2x1:c8"),
        *((ring, "ring-fp8:6x1"), (ring, "ring:4x1x256:s2:c2"), (ring, "ring:4x1x256:c3")),
        (ring_packed, "ring:6x1x64"),
        (ring_packed, "ring4:6x1x32"),
    ],
)
def test_names_of_other_plans_are_refused(module: object, name: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        module.parse(name)  # type: ignore[attr-defined]


@given(
    st.sampled_from([(32, 32), (32, 8), (28, 4), (8, 8), (9, 3), (16, 2)]),
    st.sampled_from([64, 128]),
    st.integers(1, 256),
    st.integers(1, 1 << 20),
    st.sampled_from([0, 100, 4096]),
)
def test_splits_find_room_to_merge(
    heads: tuple[int, int], head_dim: int, requests: int, max_kv: int, window: int
) -> None:
    spec = AttentionSpec(*heads, head_dim, head_dim**-0.5, window, 0.0, head_dim)
    plan = decode.plan(spec, requests, max_kv, SMS)
    if plan.splits == decode.EVEN:
        assert decode.even_fits(plan, spec, requests, SMS)
        assert decode.most_splits(head_dim, plan.warps) >= even.SPLITS
        parts = decode.kind(plan, spec, SMS).capacity(requests)
        assert parts >= requests
        assert parts * spec.kv_heads * partial_floats(spec) <= decode.SUMS
    elif plan.cluster:
        assert plan.splits in (2, 4, 8)
        assert spec.heads // spec.kv_heads * head_dim % plan.splits == 0
    elif plan.splits > 1:
        assert plan.splits <= decode.most_splits(head_dim, plan.warps)
        assert requests * spec.kv_heads * plan.splits * partial_floats(spec) <= decode.SUMS


def partial_floats(spec: AttentionSpec) -> int:
    """PARTIAL of csrc/decode.cu."""
    group = spec.heads // spec.kv_heads
    return group * spec.head_dim + -(-2 * group // 4) * 4


def test_contexts_that_may_differ_are_shared_out_by_their_lengths() -> None:
    spec = AttentionSpec(32, 8, 128, 128**-0.5, rotary_dim=128)
    shared = [
        (requests, longest)
        for requests in (1, 2, 8, 64)
        for longest in (512, 1024, 2048, 8192)
        if decode.plan(spec, requests, longest, SMS).splits == decode.EVEN
    ]
    assert shared == [(2, 8192), (8, 2048), (8, 8192), (64, 2048), (64, 8192)]
    assert decode.plan(spec, 2048, 8192, SMS).splits == 1  # more than one block has threads to share out
    assert decode.plan(spec, 1, 32768, SMS).splits == 49


def test_the_kernel_of_decodes_refuses_what_it_cannot_do() -> None:
    spec = AttentionSpec(32, 8, 128, 1.0)
    assert decode.legal(spec, torch.bfloat16, 16)
    assert not decode.legal(spec, torch.float32, 16)
    assert not decode.legal(spec, torch.bfloat16, 8)
    assert not decode.legal(AttentionSpec(32, 8, 96, 1.0), torch.bfloat16, 16)
    assert not decode.legal(AttentionSpec(64, 2, 128, 1.0), torch.bfloat16, 16)


@pytest.mark.parametrize("head_dim", prefill.HEAD_DIMS)
def test_plans_of_chunks_fit_and_their_names_lead_back(head_dim: int) -> None:
    spec = AttentionSpec(32, 8, head_dim, 1.0)
    plans = list(prefill.candidates(spec, prefill.ARMS))
    assert len(set(plans)) == len(plans)
    assert plans[: len(prefill.ARMS)] == [prefill.rule(arm) for arm in prefill.ARMS]
    for plan in plans:
        assert prefill.fits(plan, head_dim)
        assert prefill.parse(str(plan)) == plan
        assert dict(prefill.defines(plan, spec, torch.float16, 48))["BOX"] in (16, 48)


@pytest.mark.parametrize(
    "name", ["wgmma:paper:2x128x2:turns", "wgmma:lazy:4x128x2:turns", "tiles", "wgmma:lazy:2x128x2"]
)
def test_names_of_no_plan_of_chunks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="allowed: wgmma"):
        prefill.parse(name)


def test_the_kernel_of_chunks_refuses_what_it_cannot_do() -> None:
    spec = AttentionSpec(32, 8, 128, 1.0)
    assert prefill.legal(spec, torch.bfloat16, 16)
    assert prefill.legal(AttentionSpec(64, 2, 64, 1.0, 100, 30.0), torch.float16, 48)
    assert not prefill.legal(spec, torch.float32, 16)
    assert not prefill.legal(spec, torch.bfloat16, 8)
    assert not prefill.legal(AttentionSpec(32, 8, 96, 1.0), torch.bfloat16, 16)
    assert not prefill.runs_on(torch.device("cpu"))
    assert not prefill.fits(prefill.ChunkPlan(stages=4), 128)
    assert not prefill.fits(prefill.ChunkPlan(3, 96), 128)


@given(st.integers(1, 600), st.integers(1, 70_000))
def test_steps_are_padded_to_few_shapes(requests: int, pages: int) -> None:
    padded, columns = graphs.bucket(requests, pages)
    assert padded >= requests
    assert columns >= pages
    assert padded <= 2 * requests or requests == 3
    assert columns <= max(8, 2 * pages)
    assert graphs.bucket(padded, columns) == (padded, columns)


def test_memory_that_is_used_again_for_other_numbers_has_another_map(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    monkeypatch.setattr(nvrtc, "TensorMap", lambda matrix, height, width: made.append(matrix.dtype) or len(made))
    monkeypatch.setattr(nvrtc, "_maps", {})
    monkeypatch.setattr(nvrtc, "MOST_MAPS", 2)
    memory = torch.zeros(8, 64, dtype=torch.bfloat16)
    bytes_ = memory.view(torch.uint8)[:, :64]
    assert bytes_.data_ptr() == memory.data_ptr()
    assert [nvrtc.tensor_map(matrix, 64) for matrix in (memory, bytes_, memory)] == [1, 2, 1]
    assert made == [torch.bfloat16, torch.uint8]
    assert [nvrtc.tensor_map(memory[:4], height) for height in (64, 128, 64)] == [3, 4, 3]  # no more than two are kept
    assert nvrtc.tensor_map(memory, 64) == 5


@given(
    st.integers(1, 8),
    st.sampled_from([64, 128]),
    st.sampled_from([(4, 2), (2, 4), (8, 2), (4, 4)]),
)
def test_padding_keeps_out_one_block_more(group: int, head_dim: int, sizes: tuple[int, int]) -> None:
    spec, plan = AttentionSpec(8 * group, 8, head_dim, 1.0), decode.DecodePlan(*sizes, 1, "lazy", False)
    block = decode.shared_bytes(plan, spec) + decode.padding(plan, spec) + 1024
    assert plan.blocks * block <= hopper.SHARED_SM or not decode.padding(plan, spec)
    assert (plan.blocks + 1) * block > hopper.SHARED_SM
