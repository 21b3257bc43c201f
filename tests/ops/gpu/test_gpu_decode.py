"""On a GPU: attention of decode steps in one launch against the oracle, whatever the softmax, splits and merge."""

from functools import partial

import pytest
import torch

from tenfold.ops.gpu import argmax
from tests.ops.gpu import decode_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
check = partial(decode_cases.check, torch.device("cuda"))


@pytest.mark.parametrize("softmax", ["online", "lazy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shapes(softmax: str, dtype: torch.dtype) -> None:
    check(32, 32, 128, [1], softmax=softmax, dtype=dtype)
    check(32, 8, 128, [1000, 17], softmax=softmax, dtype=dtype)
    check(8, 2, 64, [5, 0, 333], softmax=softmax, dtype=dtype, norms=True)
    check(9, 3, 64, [16, 15, 17, 100], page=32, softmax=softmax, dtype=dtype)
    check(28, 4, 128, [3000, 700], norms=True, softmax=softmax, dtype=dtype)
    check(16, 2, 128, [3000, 700], window=100, softmax=softmax, dtype=dtype)
    check(4, 4, 128, [300, 70], softcap=20.0, softmax=softmax, dtype=dtype)
    check(8, 2, 128, [300, 70], rotary=64, softmax=softmax, dtype=dtype)


@pytest.mark.parametrize("lengths", [[2000], [4096, 1], [33] * 40])
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("cluster", [False, True])
def test_splits_and_merges(lengths: list[int], splits: int, cluster: bool) -> None:
    for heads, kv_heads in ((32, 8), (32, 4), (8, 8)):
        check(heads, kv_heads, 128, lengths, splits=splits, cluster=cluster and splits > 1)


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("softmax", ["online", "lazy"])
def test_two_tiles_a_warp(softmax: str, splits: int) -> None:
    """At the borders of a tile, of a block's tiles and of twice as many."""
    for lengths in ([1, 16, 17, 127, 128, 129], [255, 256, 257, 300, 0], [5000, 2049]):
        check(32, 8, 128, lengths, splits=splits, softmax=softmax, depth=2)
    check(16, 2, 128, [3000, 700], window=100, splits=splits, softmax=softmax, depth=2)
    check(28, 4, 128, [3000, 700], norms=True, splits=splits, softmax=softmax, depth=2)


@pytest.mark.parametrize("depth", [3, 6])
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_through_shared_memory(dtype: torch.dtype, splits: int, depth: int) -> None:
    """At the borders of a tile, of a ring, and of the 32 tiles whose pages a warp knows; pages of several tiles."""
    for lengths in ([1, 16, 17, 127, 128, 129], [383, 384, 385, 512, 0], [8192, 8193, 8200, 2049], [20000, 30]):
        check(32, 8, 128, lengths, splits=splits, dtype=dtype, depth=depth)
    check(16, 2, 128, [3000, 700], window=100, splits=splits, dtype=dtype, depth=depth)
    check(28, 4, 128, [3000, 700], norms=True, splits=splits, dtype=dtype, depth=depth, page=64)
    check(8, 8, 128, [5000, 0, 33], splits=splits, dtype=dtype, depth=depth, page=32)
    check(9, 3, 64, [5000, 33], splits=splits, dtype=dtype, depth=depth)
    check(32, 8, 128, [3000, 700], splits=splits, softmax="unified", phi=2.0, dtype=dtype, depth=depth)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("softmax", ["online", "lazy"])
def test_contexts_that_are_shared_out_evenly(softmax: str, depth: int) -> None:
    even = partial(check, splits=decode_cases.EVEN_SPLITS, depth=depth, softmax=softmax)
    for heads, kv_heads in ((32, 8), (28, 4), (8, 8), (64, 8)):
        even(heads, kv_heads, 128, [300] * 30 + [8400, 0, 8700])
    even(32, 8, 128, [1, 0, 17, 20_000], dtype=torch.float16)
    even(9, 3, 64, [5000, 33, 0, 16], page=32)
    even(16, 2, 128, [3000, 700, 50], window=100, norms=True)
    even(32, 8, 128, list(range(1, 2600, 13)), page=64)
    even(4, 4, 128, [2000] * 48, softcap=20.0)


@pytest.mark.parametrize("sms", [1, 20, 96])
def test_contexts_that_are_shared_out_to_a_part_of_the_gpu(sms: int) -> None:
    check(32, 8, 128, [300] * 30 + [8400, 0, 8700], splits=decode_cases.EVEN_SPLITS, sms=sms)


@pytest.mark.parametrize("phi", decode_cases.ADVERSARIAL)
@pytest.mark.parametrize("softmax", ["unified", "paper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_unified_maximum_costs_time_only(softmax: str, phi: float, dtype: torch.dtype) -> None:
    again = check(32, 8, 128, [1000, 17], softmax=softmax, phi=phi, dtype=dtype)
    if not abs(phi) < 100:
        assert again == 2 * 2 * 32  # two runs of two requests
    for depth in (2, 3, 6):
        again = check(32, 8, 128, [1000, 17], softmax=softmax, phi=phi, dtype=dtype, splits=2, depth=depth)
        if not abs(phi) < 100:
            assert again == 2 * 2 * 32
    again = check(*(32, 8, 128, [1000, 17]), softmax=softmax, phi=phi, dtype=dtype, splits=decode_cases.EVEN_SPLITS)
    if not abs(phi) < 100:
        assert again == 2 * 2 * 32
    again = check(32, 8, 128, [1000, 17], softmax=softmax, phi=phi, dtype=dtype, splits=4, cluster=True)
    if not abs(phi) < 100:
        assert again == 2 * 2 * 32  # two runs of two requests


def test_argmax_takes_the_first_of_the_best() -> None:
    for rows, width in ((1, 128256), (8, 32000), (33, 151936), (300, 777), (5000, 7)):
        logits = torch.randn(rows, width, device="cuda")
        logits[0, [3, width - 1]] = 99.0
        for _ in range(2):
            found = argmax.argmax(logits)
            assert found[0] == 3
            assert torch.equal(found[1:], logits[1:].argmax(-1))
