"""Mixed steps through `attend` against the oracle."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tenfold.ops.attention.attend import Arms, attend, splits_pay
from tenfold.ops.attention.decode import Workspace
from tenfold.ops.kernels import AttentionSpec
from tests.ops.attention.cases import Case, make


def check(case: Case, want_lse: bool = True, **rest: Any) -> int:
    """Compare output and log-sum-exp with the oracle; rows computed again."""
    workspace = Workspace("cpu")
    _, lse = case.blank()
    tables = (case.page_table, case.query_start, case.kv_lengths)
    counts = (max(case.counts), max(case.lengths))
    rest = {"sms": 132, "workspace": workspace} | rest
    out = attend(case.q, case.keys, case.values, *tables, case.spec, *counts, lse if want_lse else None, **rest)
    expected, sums = case.expected()
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    if want_lse:
        torch.testing.assert_close(lse, sums, atol=2e-5, rtol=2e-5)
    return int(workspace.recomputed)


@pytest.mark.parametrize(
    ("lengths", "counts", "decodes"),
    [
        ([20, 33, 7], [1, 1, 1], 0),
        ([20, 33, 7], [1, 1, 7], 2),
        ([20, 33, 7], [1, 20, 7], 1),
        ([20, 33, 7], [3, 20, 7], 0),
        ([20, 33, 7], [1, 4, 1], 0),  # drafts to verify
        ([20, 0], [1, 1], 0),
    ],
)
def test_mixed_steps(lengths: Sequence[int], counts: Sequence[int], decodes: int) -> None:
    case = make(lengths, counts, heads=2, kv_heads=1)
    assert check(case, arms=Arms("unified"), phi=case.phi, decodes=decodes) == 0


@pytest.mark.parametrize("head_dim", [8, 24])
def test_head_sizes_of_small_models(head_dim: int) -> None:
    check(make([20, 9, 7], [1, 9, 1], head_dim=head_dim), decodes=1)


def test_recomputed_rows_of_decodes_and_chunks_are_counted_together() -> None:
    case = make([20, 33], [1, 20], heads=2, kv_heads=1)
    phi = torch.tensor([0.0, -500.0])
    assert check(case, arms=Arms("unified"), phi=phi, decodes=1) == 21


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_whole_prompts_and_chunks_through_pytorch(heads: tuple[int, int]) -> None:
    case = make([20, 9, 33], [1, 9, 20], heads=heads[0], kv_heads=heads[1])
    lengths = tuple(zip(case.counts, case.lengths))
    check(case, False, arms=Arms(chunks="sdpa"), decodes=1, lengths=lengths)


@pytest.mark.parametrize("rules", [{"window": 5}, {"softcap": 3.0}], ids=str)
def test_what_pytorch_has_no_kernel_for_runs_in_tiles(rules: dict[str, Any]) -> None:
    case = make([9, 33], [9, 20], **rules)
    check(case, False, arms=Arms(chunks="sdpa"), lengths=tuple(zip(case.counts, case.lengths)))


def test_only_few_short_chunks_split_their_contexts() -> None:
    spec = AttentionSpec(32, 8, 128, 1.0)
    assert splits_pay(spec, 4, 5, 132)
    assert not splits_pay(spec, 64, 5, 132)
    assert not splits_pay(spec, 4, 17, 132)
    assert not splits_pay(AttentionSpec(32, 1, 128, 1.0), 1, 5, 132)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="chunks is 'cudnn'"):
        Arms(chunks="cudnn")
