"""Graphs of whole steps, without a GPU: what a capture that failed leaves behind."""

import pytest
import torch
from torch import Tensor

from tenfold.cache.store import KVSpec, KVStore
from tenfold.nn.step import Step
from tenfold.ops.gpu.graphs import Graphs


def test_what_a_failed_capture_worked_out_of_a_step_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it was computed: a decode beside a prompt's last token, parted in both runs."""
    capturing = False

    def forward(step: Step) -> Tensor:
        parts = step.parted()
        assert parts is not None
        if "captured" in step.memo:
            raise AssertionError("a plain run goes by what was captured")
        if capturing:
            step.memo["captured"] = True
        return torch.cat([part.positions for part in parts])

    def capture(self: Graphs, run: object) -> None:
        nonlocal capturing
        capturing = True
        run()  # type: ignore[operator]
        capturing, self.failure = False, "refused"

    monkeypatch.setattr(Graphs, "capture", capture)
    numbers = torch.arange(2, dtype=torch.int32)
    kv = KVStore(KVSpec(1, 1, 16, torch.float32, 16), 4, torch.device("cpu"))
    step = Step(
        *(numbers, numbers, numbers[:, None], torch.arange(3, dtype=torch.int32), numbers + 1),
        max_query=1,
        max_kv=2,
        decodes=1,
        token_ids=numbers.long(),
        logits_rows=numbers.long(),
        kv=kv,
    )
    graphs = Graphs()
    for _ in range(3):  # plainly, in a capture and plainly, plainly
        step.memo.clear()
        assert graphs(forward, step).tolist() == [0, 1]
    assert graphs.failure == "refused"
