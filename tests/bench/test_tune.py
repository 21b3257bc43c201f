"""The ablation of stages: the best flat plan that was measured, with every number of stages, beside the library."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.choose import Table

bench = pytest.importorskip("tenfold.bench.tune")
arms = pytest.importorskip("tenfold.ops.gpu.arms")


class FakeTimer:
    def copies(self, nbytes: int) -> int:
        return 2

    def memory_microseconds(self) -> dict[str, float]:
        return {"copy": 1.0}

    def measure(self, arms: Any, copies: int, reference: Any = None, farthest: float = 0.0) -> dict[str, float]:
        return dict.fromkeys(arms, 1.0)


def test_stages_of_the_best_flat_plan(tmp_path: Path) -> None:
    table = Table("gpu", "1", tmp_path / "t.json")
    running = arms.Arms(torch.device("cpu"), torch.bfloat16, 132, table)
    work = arms.Work(64, 256, "dense", arms.Use(residual=True), 1)
    packed = arms.Work(64, 256, "int4g128", arms.Use(), 1)
    table.record(arms.key(work, 132), {"flat:64x64x6:s2": 3.0, "flat:32x128x4:s1": 2.0, "cublas": 1.0})
    (row,) = bench.stages([work, work, packed], running, FakeTimer(), [1])
    stages = (f"flat:32x128x{n}:s1" for n in (1, 2, 3, 4, 6))
    assert list(row["microseconds"]) == ["cublas", *stages, "flat:32x128x4:s1:early"]
    assert (row["op"], row["rows"], row["cols"], row["batch"]) == ("linear+residual", 64, 256, 1)
