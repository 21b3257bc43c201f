"""Tuning: every arm is measured, the table is written, and matrices made later pick it up."""

import pytest
import torch

from tenfold.ops.cpu import arms, lib, pack, tune
from tests.ops.cpu.weights import random_weight

pytestmark = pytest.mark.skipif(not lib.available(), reason="no compiled kernels")


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "ROTATION", 1 << 16)
    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 1e-4)
    arms._table.cache_clear()
    yield
    arms._table.cache_clear()


def test_untuned_shapes_follow_the_rule():
    matrix = pack.pack([random_weight("Q8_0", 32, 64)])
    assert matrix.arms == {}
    rows = arms.explain([matrix, matrix])
    assert [row.key.batch for row in rows] == list(arms.BATCHES)
    assert {row.source for row in rows} == {"rule"}
    assert rows[0].arm == "gemv"
    assert rows[-1].arm == "tiled"


def test_tuning_measures_every_arm_and_is_remembered():
    raw = random_weight("Q4_1", 48, 64)
    matrices, seen = [pack.pack([raw]), pack.pack([raw])], []
    rows = tune.tune_linear(matrices, (1, 8), lambda *what: seen.append(what))
    assert [(done, total) for done, total, _ in seen] == [(0, 2), (1, 2)]
    assert [row.source for row in rows] == ["measured", "measured"]
    for batch in (1, 8):
        times = arms.table().times(arms.key(matrices[0], batch))
        assert set(times) == set(arms.ARMS)
        assert min(times.values()) > 0
    assert set(matrices[0].arms) == {1, 5, 6, 7, 8}
    arms._table.cache_clear()  # as in a new process
    assert pack.pack([raw]).arms == matrices[0].arms


def test_a_table_made_for_other_kernels_is_ignored(monkeypatch):
    matrix = pack.pack([random_weight("Q4_1", 48, 64)])
    tune.tune_linear([matrix], (1,))
    made = arms.table()
    arms._table(made.device, made.version + "x")
    monkeypatch.setattr(arms, "table", lambda: arms._table(made.device, made.version + "x"))
    arms.apply(matrix)
    assert matrix.arms == {}


def test_rotation_reaches_its_size_with_copies():
    matrix = pack.pack([random_weight("Q4_1", 48, 64)])
    rotated = tune.rotation([matrix], 10 * matrix.nbytes)
    assert len(rotated) == 10
    assert len({m.handle for m in rotated}) == 10
    assert all(torch.equal(pack.unpack(m), pack.unpack(matrix)) for m in rotated)
