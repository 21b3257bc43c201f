"""How many splits: pure host decisions."""

import pytest

from tenfold.ops.attention.plan import DecodePlan, plan_decode, plan_prefill, splits
from tenfold.ops.attention.tune import decode_candidates
from tenfold.ops.kernels import AttentionSpec

LLAMA2 = AttentionSpec(32, 32, 128, 128**-0.5)
LLAMA3 = AttentionSpec(32, 8, 128, 128**-0.5)


@pytest.mark.parametrize(
    ("programs", "tiles", "expected"),
    [
        (256, 512, 1),  # the GPU is full
        (106, 512, 1),  # and with 106 of 132 full enough
        (105, 512, 5),  # 525 of 528 places; fewer leave a fifth idle
        (32, 512, 4),  # 128 of 132 places
        (8, 512, 14),  # 112 of 132 are within 85 % of the 128 that 16 would take
        (64, 512, 2),
        (8, 4, 1),  # too short
        (8, 5, 5),
        (1, 512, 128),  # 103 would have parts as long as 127, and fill less than 85 % of what 128 do
    ],
)
def test_split_rule_on_132_multiprocessors(programs: int, tiles: int, expected: int) -> None:
    assert splits(132, programs, tiles) == expected


def test_splits_never_exceed_tiles_or_their_bound() -> None:
    for programs in range(1, 140, 3):
        for tiles in (1, 5, 17, 2000):
            count = splits(132, programs, tiles, most=64)
            assert 1 <= count <= min(64, max(1, tiles))


def test_a_window_is_split_and_not_the_context() -> None:
    windowed = AttentionSpec(32, 8, 128, 128**-0.5, window=128)
    assert plan_decode(windowed, 1, 100_000, 132).splits == 1
    assert plan_decode(LLAMA3, 1, 100_000, 132).splits > 8


def test_a_plan_says_what_it_is() -> None:
    plan = plan_decode(LLAMA2, 1, 32768, 132, softmax="unified", merge="two")
    assert str(plan) == f"decode unified/two: {plan.splits} splits of 2+ tiles of 64, dot, 4 warps, 5 stages"
    assert "prefill lazy: 128 x 64" in str(plan_prefill(LLAMA2))


def test_what_no_kernel_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 512"):
        plan_decode(AttentionSpec(4, 4, 512, 1.0), 1, 100, 132)
    with pytest.raises(ValueError, match="evenly"):
        plan_prefill(AttentionSpec(5, 2, 64, 1.0))
    with pytest.raises(ValueError, match="scale is 0"):
        plan_prefill(AttentionSpec(4, 2, 64, 0.0))
    with pytest.raises(ValueError, match="64 new tokens"):
        plan_decode(LLAMA3, 1, 100, 132, queries=64)
    with pytest.raises(ValueError, match="softmax is 'max'"):
        DecodePlan(1, softmax="max")
    with pytest.raises(ValueError, match="merge is 'first'"):
        DecodePlan(1, merge="first")
    with pytest.raises(ValueError, match="splits is 0"):
        DecodePlan(0)


@pytest.mark.parametrize("spec", [LLAMA2, LLAMA3])
def test_candidates_are_legal_and_start_with_the_rule(spec: AttentionSpec) -> None:
    found = decode_candidates(spec, 8, 32768, 132, softmax=("lazy", "unified"), merge=("last", "two"))
    assert found[0] == plan_decode(spec, 8, 32768, 132)
    assert len(found) == len(set(found))
    assert all(p.dot for p in found) == (spec is LLAMA3)
