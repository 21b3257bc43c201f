"""Prefill attention under Triton's interpreter against the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops.attention import prefill
from tenfold.ops.attention.plan import PrefillPlan
from tenfold.ops.kernels import SOFTMAX
from tests.ops.attention.cases import Case, make

PLAN = PrefillPlan(rows=16, tile=16)


def attend(case: Case, plan: PrefillPlan, phi: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor, int]:
    out, lse = case.blank()
    recomputed = torch.zeros(1, dtype=torch.int64)
    arguments = (case.q, case.keys, case.values, case.page_table, case.query_start, case.kv_lengths, case.spec)
    prefill.run(plan, *arguments, max(case.counts), recomputed=recomputed, phi=phi, lse=lse, out=out, **rest)
    return out, lse, int(recomputed)


def check(case: Case, plan: PrefillPlan, phi: Tensor | None = None, **rest: Any) -> int:
    """Compare with the oracle in float32; the tolerance is the rounding of weights and result to the case's type."""
    out, lse, again = attend(case, plan, phi, **rest)
    expected, sums = case.expected()
    loose = 2e-5 if case.q.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.float(), expected, atol=loose, rtol=loose)
    torch.testing.assert_close(lse, sums, atol=loose, rtol=loose)
    return again


@pytest.mark.parametrize(("softmax", "branch"), [*((softmax, True) for softmax in SOFTMAX), ("lazy", False)])
def test_prompts_and_chunks_behind_a_prefix(softmax: str, branch: bool) -> None:
    case = make([37, 50, 1], [20, 5, 1], heads=3, kv_heads=1)
    assert check(case, replace(PLAN, softmax=softmax, branch=branch), case.phi) == 0


@pytest.mark.parametrize("softmax", ["lazy", "unified"])
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 1, "kv_heads": 1},
        {"heads": 7, "kv_heads": 1, "head_dim": 80, "page_size": 4},
        {"heads": 4, "kv_heads": 2, "head_dim": 96, "dtype": torch.float16},
        {"window": 9, "softcap": 5.0, "page_size": 32},
        {"window": 1, "page_size": 1},
    ],
    ids=str,
)
def test_shapes(softmax: str, shape: dict[str, Any]) -> None:
    case = make([20, 40], [20, 3], **shape)
    check(case, replace(PLAN, softmax=softmax), case.phi)


@pytest.mark.parametrize("softmax", ["unified", "paper"])
@pytest.mark.parametrize("bad", [1e4, -1e4, float("nan")])
def test_an_absurd_phi_costs_time_only(bad: float, softmax: str) -> None:
    case = make([20], [17], heads=2, kv_heads=2)
    assert check(case, replace(PLAN, softmax=softmax), torch.tensor([0.0, bad])) == 17


def test_only_rows_that_failed_are_computed_again() -> None:
    """And the others keep their bits."""
    case = make([24], [24], heads=1, kv_heads=1)
    plain = attend(case, replace(PLAN, softmax="unified"), case.phi)
    case.q[5] *= 1000.0
    found = attend(case, replace(PLAN, softmax="unified"), case.phi)
    assert found[2] == 1
    others = [t for t in range(24) if t != 5]
    assert torch.equal(found[0][others], plain[0][others])
    assert check(case, replace(PLAN, softmax="unified"), case.phi) == 1


def test_logits_spread_as_in_opt() -> None:
    case = make([33], [33], spread=150.0)
    out, _, again = attend(case, replace(PLAN, softmax="unified"), case.phi)
    torch.testing.assert_close(out, case.expected()[0], atol=2e-4, rtol=2e-4)  # a score of 500 is rounded by 3e-5
    assert again > 50


def test_the_paper_guard_refuses_by_element() -> None:
    case = make([20], [20], heads=1, kv_heads=1, spread=3.0)
    assert check(case, replace(PLAN, softmax="paper"), case.phi, around=1.0) > 10
    assert check(case, replace(PLAN, softmax="paper"), case.phi, around=40.0) == 0


def test_without_phi_a_unified_arm_is_lazy() -> None:
    case = make([20], [20])
    assert torch.equal(attend(case, replace(PLAN, softmax="unified"))[0], attend(case, PLAN)[0])


def test_rows_of_other_requests_are_left_alone() -> None:
    """A step's first rows may be decodes, which run elsewhere."""
    case = make([12, 20], [1, 20])
    rest = replace(
        case, page_table=case.page_table[1:], kv_lengths=case.kv_lengths[1:], query_start=case.query_start[1:]
    )
    out, _, _ = attend(rest, PLAN)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], case.expected()[0][1:], atol=2e-5, rtol=2e-5)
