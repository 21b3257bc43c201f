"""On a GPU: chunks on Hopper's tensor cores, straight from the pages, against the oracle."""

from functools import partial
from typing import Any

import pytest
import torch

from tenfold.ops.attention.attend import Arms, attend, suits
from tenfold.ops.attention.decode import Workspace
from tenfold.ops.gpu import prefill
from tenfold.ops.gpu.prefill import ARMS, ChunkPlan
from tenfold.ops.kernels import AttentionSpec
from tests.ops.gpu.prefill_cases import ROUNDING, SMS, check
from tests.ops.gpu.prefill_cases import chunks as chunks_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not prefill.runs_on(torch.device("cuda")), reason="needs a Hopper GPU"
    ),
]
TYPES = list(ROUNDING)
chunks = partial(chunks_on, "cuda")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", prefill.HEAD_DIMS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_requests_of_all_lengths(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    case = chunks([600, 700, 1, 129, 0], [600, 50, 1, 129, 0], heads, head_dim, dtype=dtype)
    for softmax in ARMS:
        assert check(case, ChunkPlan(softmax=softmax), case.phi) == 0 or dtype == torch.float16


@pytest.mark.parametrize("page_size", [16, 32, 48, 256])
def test_pages_of_all_sizes(page_size: int) -> None:
    case = chunks([300, 333], [300, 40], page_size=page_size)
    for tile in prefill.TILES:
        check(case, ChunkPlan(tile=tile))


@pytest.mark.parametrize("head_dim", prefill.HEAD_DIMS)
def test_every_candidate(head_dim: int) -> None:
    case = chunks([500, 333], [500, 70], head_dim=head_dim)
    for plan in prefill.candidates(case.spec, ARMS):
        check(case, plan, case.phi)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rules", [{"window": 1}, {"window": 100}, {"softcap": 30.0}, {"window": 100, "softcap": 5.0}])
def test_windows_and_capped_scores(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    case = chunks([300, 333], [300, 40], dtype=dtype, **rules)
    for softmax in ARMS:
        check(case, ChunkPlan(softmax=softmax), case.phi)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [1e4, -1e4, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("groups", [2, 3])
def test_a_wrong_unified_maximum_costs_time_only(dtype: torch.dtype, bad: float, groups: int) -> None:
    case = chunks([300, 70], [300, 20], dtype=dtype)
    phi = case.phi.clone()
    phi[3] = bad
    plan = ChunkPlan(groups, 64, 3, softmax="unified")
    few = check(case, plan, phi)
    assert few >= 320
    assert few == 320 or dtype == torch.float16
    assert check(case, plan, torch.full_like(phi, bad)) == 4 * 320


def test_scores_that_grow_along_the_context() -> None:
    case = chunks([900], [900], spread=20.0)
    for softmax in ARMS:
        check(case, ChunkPlan(softmax=softmax), case.phi)


def test_more_tiles_than_multiprocessors() -> None:
    case = chunks([700] * 4, [700, 600, 500, 64], (32, 8))
    check(case, ChunkPlan())
    assert check(case, ChunkPlan(softmax="unified"), torch.full_like(case.phi, 1e4)) == 32 * sum(case.counts)


def test_a_mixed_step_chooses_it() -> None:
    case = chunks([900, 300, 333, 200], [1, 1, 40, 200], (8, 2))
    workspace = Workspace("cuda")
    assert suits(case.spec, case.q, case.keys, "unified", 200)
    out = attend(
        *(case.q, case.keys, case.values, case.page_table, case.query_start, case.kv_lengths, case.spec, 200, 900),
        workspace=workspace,
        sms=SMS,
        arms=Arms("unified"),
        phi=case.phi,
        decodes=2,
    )
    torch.testing.assert_close(out.float(), case.expected()[0], atol=1.6e-2, rtol=1.6e-2)


def test_what_it_cannot_do_is_left_to_others() -> None:
    spec = AttentionSpec(4, 2, 128, 1.0)
    case = chunks([70], [70])
    assert not suits(spec, case.q, case.keys, "paper", 70)
    assert not suits(spec, case.q, case.keys, "lazy", 8)
    assert not suits(spec, case.q.float(), case.keys, "lazy", 70)
