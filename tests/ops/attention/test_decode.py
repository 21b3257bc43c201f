"""Decode attention under Triton's interpreter against the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops.attention import decode
from tenfold.ops.attention.plan import MERGES, DecodePlan
from tenfold.ops.kernels import SOFTMAX
from tests.ops.attention.cases import Case, make

PLAN = DecodePlan(splits=3, tile=16, least=1)


def attend(case: Case, plan: DecodePlan, phi: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor, int]:
    """Output, log-sum-exp, rows computed again."""
    workspace = decode.Workspace(case.q.device)
    out, lse = case.blank()
    starts = case.query_start if plan.queries > 1 else None
    decode.run(
        *(plan, workspace, case.q, case.keys, case.values, case.page_table, case.kv_lengths, case.spec),
        query_start=starts,
        phi=phi,
        lse=lse,
        out=out,
        **rest,
    )
    assert not workspace.counters.any()
    return out, lse, int(workspace.recomputed)


def check(case: Case, plan: DecodePlan, phi: Tensor | None = None, **rest: Any) -> int:
    """Compare with the oracle in float32; the tolerance is the rounding of weights and result to the case's type."""
    out, lse, again = attend(case, plan, phi, **rest)
    expected, sums = case.expected()
    loose = 2e-5 if case.q.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.float(), expected, atol=loose, rtol=loose)
    torch.testing.assert_close(lse, sums, atol=loose, rtol=loose)
    return again


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_every_arm_and_merge(softmax: str, merge: str) -> None:
    case = make([37, 0, 1])
    again = check(case, replace(PLAN, softmax=softmax, merge=merge), case.phi)
    assert again == 0


@pytest.mark.parametrize("softmax", ["lazy", "unified"])
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 1, "kv_heads": 1},
        {"heads": 7, "kv_heads": 1, "head_dim": 80, "page_size": 4},
        {"heads": 8, "kv_heads": 2, "head_dim": 96, "dtype": torch.float16},
        {"window": 18, "softcap": 5.0, "page_size": 32},
        {"window": 1, "page_size": 1},
        {"softcap": 2.0, "page_size": 16, "dtype": torch.float16, "head_dim": 128},
    ],
    ids=str,
)
def test_shapes(softmax: str, shape: dict[str, Any]) -> None:
    case = make([33, 50], **shape)
    check(case, replace(PLAN, softmax=softmax), case.phi)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("merge", MERGES)
def test_without_the_matrix_unit(softmax: str, merge: str) -> None:
    case = make([37, 0, 1], heads=1, kv_heads=1, head_dim=80, window=25, softcap=4.0)
    assert check(case, replace(PLAN, softmax=softmax, merge=merge, dot=False), case.phi) == 0


@pytest.mark.parametrize("softmax", ["lazy", "unified"])
@pytest.mark.parametrize("merge", MERGES)
def test_several_new_tokens(softmax: str, merge: str) -> None:
    case = make([40, 2, 0], [3, 2, 1], heads=3, kv_heads=1, window=21)
    check(case, replace(PLAN, softmax=softmax, merge=merge, queries=4), case.phi)


@pytest.mark.parametrize(
    ("softmax", "merge", "dot"),
    [*(("unified", merge, True) for merge in MERGES), ("paper", "last", True), ("unified", "last", False)],
)
@pytest.mark.parametrize("bad", [1e4, -1e4, float("nan")])
def test_an_absurd_phi_costs_time_only(bad: float, softmax: str, merge: str, dot: bool) -> None:
    case = make([20], heads=2, kv_heads=2)
    phi = torch.tensor([0.0, bad])
    assert check(case, replace(PLAN, softmax=softmax, merge=merge, dot=dot), phi) == 1


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), 3e38, -3e38])
def test_no_phi_at_all_is_too_absurd(bad: float) -> None:
    case = make([20], heads=2, kv_heads=2)
    assert check(case, replace(PLAN, softmax="unified"), torch.tensor([0.0, bad])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [-200.0, -75.0, -20.0, 20.0, 75.0, 200.0])
def test_row_maxima_far_from_phi(dtype: torch.dtype, shift: float) -> None:
    case = make([20], heads=2, kv_heads=1, dtype=dtype)
    again = check(case, replace(PLAN, softmax="unified"), case.phi + shift)
    wide = dtype == torch.float32
    assert again == (2 if abs(shift) > (50 if wide else 10) else 0)


def test_one_huge_score() -> None:
    case = make([37], heads=2, kv_heads=1)
    case.keys[case.page_table[0, 2], 0, 3] = 40 * case.q[0, :64]  # a score of about 320 for the first head
    assert check(case, replace(PLAN, softmax="unified"), case.phi) >= 1


def test_logits_spread_as_in_opt() -> None:
    case = make([50, 33], spread=150.0)
    check(case, replace(PLAN, softmax="unified"), case.phi)


def test_float16_weights_that_vanish_are_noticed() -> None:
    """exp(x - phi) fits float32 but not float16, so float32 sums alone would look healthy."""
    case = make([37], dtype=torch.float16)
    assert check(case, replace(PLAN, softmax="unified"), case.phi + 40.0) == 4


def test_the_paper_guard_refuses_by_element() -> None:
    case = make([37], heads=1, kv_heads=1, spread=3.0)
    plan = replace(PLAN, softmax="paper", splits=1)
    assert check(case, plan, case.phi, around=1.0) == 1
    assert check(case, plan, case.phi, around=30.0) == 0


@pytest.mark.parametrize("scores", [([4.0, 5, 6, 7], 0), ([3.5, 6, 10, 7], 1)], ids=["passes", "fails"])
@pytest.mark.parametrize("merge", MERGES)
def test_the_papers_example(scores: tuple[list[float], int], merge: str) -> None:
    """Section 3 of FlashDecoding++: phi = 6 and |x - phi| < 3; 10 is refused."""
    values, refused = scores
    case = make([4], heads=1, kv_heads=1, page_size=4)
    page = int(case.page_table[0, 0])
    case.q[0] = torch.nn.functional.one_hot(torch.tensor(0), 64).float() / case.spec.scale
    case.keys[page, 0, :, 0] = torch.tensor(values)
    out, _, again = attend(case, replace(PLAN, softmax="paper", merge=merge), case.phi + 6.0, around=3.0)
    assert again == refused
    torch.testing.assert_close(out[0], torch.tensor(values).softmax(0) @ case.values[page, 0], atol=1e-5, rtol=1e-5)


def test_without_phi_a_unified_arm_is_lazy() -> None:
    case = make([37])
    lazy = attend(case, replace(PLAN, softmax="lazy"))
    for softmax in ("unified", "paper"):
        for merge in MERGES:
            found = attend(case, replace(PLAN, softmax=softmax, merge=merge))
            assert torch.equal(found[0], lazy[0])
            assert found[2] == 0


def test_lazy_follows_a_maximum_that_keeps_growing() -> None:
    case = make([48], heads=2, kv_heads=1)
    for place in range(48):
        page = int(case.page_table[0, place // 8])
        case.keys[page, 0, place % 8] *= 1 + place
    for softmax in ("online", "lazy"):
        check(case, replace(PLAN, softmax=softmax, splits=1))


@pytest.mark.parametrize("merge", ["two", "last"])
def test_results_repeat_bit_for_bit(merge: str) -> None:
    case = make([66, 77], heads=2, kv_heads=1)
    plan = replace(PLAN, splits=5, merge=merge, softmax="unified")
    first, again = attend(case, plan, case.phi), attend(case, plan, case.phi)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    """Not even on neighbours that must be computed again."""
    case = make([40, 25])
    alone = replace(case, q=case.q[:1], page_table=case.page_table[:1], kv_lengths=case.kv_lengths[:1])
    plan = replace(PLAN, softmax="unified")
    phi = case.phi.clone()
    phi[3] = 1e4
    together = attend(case, plan, phi)[0]
    assert torch.equal(together[:1], attend(alone, plan, phi)[0])
    assert torch.equal(together[:, : 3 * 64], attend(case, plan, case.phi)[0][:, : 3 * 64])


def test_more_splits_than_tiles_and_a_workspace_used_again() -> None:
    workspace = decode.Workspace("cpu")
    for lengths in ([5, 60], [64, 3], [1, 1]):
        case = make(lengths, heads=2, kv_heads=1)
        plan = replace(PLAN, splits=8, merge="last")
        out = decode.run(plan, workspace, case.q, case.keys, case.values, case.page_table, case.kv_lengths, case.spec)
        torch.testing.assert_close(out, case.expected()[0], atol=2e-5, rtol=2e-5)


def test_no_requests() -> None:
    case = make([5])
    q = case.q[:0]
    out = decode.run(
        PLAN, decode.Workspace("cpu"), q, case.keys, case.values, case.page_table[:0], case.kv_lengths[:0], case.spec
    )
    assert out.shape == q.shape
