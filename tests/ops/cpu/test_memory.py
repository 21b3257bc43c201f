"""Memory for weights: aligned, separate, and freed with the tensors in it."""

import pytest
import torch

from tenfold.ops.cpu import memory


@pytest.fixture
def blocks(monkeypatch):
    """Sizes of the blocks that are made; they are small here."""
    made = []

    def recorded(nbytes, usual=memory.huge_empty):
        made.append(nbytes)
        return usual(nbytes)

    monkeypatch.setattr(memory, "huge_empty", recorded)
    monkeypatch.setattr(memory, "BLOCK", 1 << 16)
    return made


def test_parts_are_aligned_and_do_not_overlap(blocks):
    weights = memory.Weights()
    parts = [weights.empty(n) for n in (1, 63, 64, 65, 1000, 30000, 32768, 20000, 0, 5)]
    for i, part in enumerate(parts):
        part.fill_(i)
        assert part.data_ptr() % memory.ALIGN == 0
    assert all((part == i).all() for i, part in enumerate(parts))
    assert blocks == [1 << 16, 1 << 16]


def test_large_ones_have_their_own(blocks):
    weights = memory.Weights()
    small, large = weights.empty(100), weights.empty(40000)
    assert large.shape == (40000,)
    assert large.data_ptr() % memory.HUGE_PAGE == 0
    assert small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()


def test_a_block_is_full_to_the_last_byte(blocks):
    weights = memory.Weights()
    parts = [weights.empty(1 << 14) for _ in range(8)]
    assert len(blocks) == 2
    for i, part in enumerate(parts):
        part.fill_(i)
    assert all((part == i).all() for i, part in enumerate(parts))


def test_huge_empty():
    for n in (0, 1, memory.HUGE_PAGE, 3 * memory.HUGE_PAGE + 5):
        tensor = memory.huge_empty(n)
        assert tensor.shape == (n,)
        assert tensor.dtype is torch.uint8
        assert tensor.data_ptr() % memory.HUGE_PAGE == 0 or n == 0
        tensor.fill_(7)


def test_a_full_block_is_not_held(blocks):
    """Its memory then goes with the last tensor in it."""
    weights = memory.Weights()
    parts = [weights.empty(1 << 14) for _ in range(3)]
    assert weights._block is not None
    parts.append(weights.empty(1 << 14))
    assert weights._block is None


def test_keep_memory_may_be_called_again():
    memory.keep_memory()
    memory.keep_memory()
