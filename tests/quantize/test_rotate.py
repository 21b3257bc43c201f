"""A rotated model is the same model, with fewer outliers; what cannot be rotated is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.models.table import build_model
from tenfold.ops.matrix import RawTensor
from tenfold.ops.oracle import Oracle
from tenfold.quantize.rotate import Rotated, orthogonal
from tenfold.weights.checkpoint import Checkpoint, CheckpointError
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.models.test_moe import stacked
from tests.steps import Sequences, make_store

Folder = Callable[[str], Path]
NAMES = [
    "llama-bias",
    "llama-tied",
    "qwen3",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "olmoe-clip",
    "deepseek-v2",
    "deepseek-v3",
]


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle()), 128)
    with torch.inference_mode():
        return model.forward(Sequences(make_store(model.config)).step({0: [5, 9, 31], 1: list(range(20, 45))}, "all"))


@pytest.mark.parametrize("size", [1, 48, 64, 96, 100])
def test_the_matrix_is_orthogonal_and_repeats(size: int) -> None:
    q = orthogonal(size, seed=3)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(q, orthogonal(size, seed=3))
    assert size == 1 or not torch.equal(q, orthogonal(size, seed=4))


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_what_they_were(name: str, tiny: Folder) -> None:
    source = open_checkpoint(tiny(name))
    before, after = logits(source), logits(Rotated(source, seed=1))
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "deepseek-v2"])
def test_experts_in_one_tensor_are_turned_as_one_by_one(name: str, tiny: Folder, tmp_path: Path) -> None:
    plain, whole = open_checkpoint(tiny(name)), open_checkpoint(stacked(tiny(name), tmp_path / "stacked"))
    assert any(own.endswith("experts.gate_up_proj") for own in whole.names())
    assert torch.equal(logits(Rotated(whole, seed=1)), logits(Rotated(plain, seed=1)))


def test_outliers_are_spread(tiny: Folder) -> None:
    class Outlier:
        """A checkpoint one of whose features is loud."""

        def __init__(self, source: Checkpoint) -> None:
            self.__dict__.update(vars(source) | {"source": source})
            self.names, self.tokenizer = source.names, source.tokenizer

        def __contains__(self, name: str) -> bool:
            return name in self.source  # type: ignore[attr-defined]

        def tensor(self, name: str) -> RawTensor:
            raw = self.source.tensor(name)  # type: ignore[attr-defined]
            data = raw.data.clone()
            if name.endswith("q_proj.weight"):
                data[:, 7] *= 20
            return RawTensor(name, raw.storage, raw.shape, data)

    source = Outlier(open_checkpoint(tiny("llama")))
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = source.tensor(name).data, Rotated(source).tensor(name).data  # type: ignore[arg-type]
    loud = [float(w.abs().max() / w.square().mean().sqrt()) for w in (before, after)]
    assert loud[1] < 0.6 * loud[0]


def test_what_cannot_be_rotated_is_said(tiny: Folder) -> None:
    with pytest.raises(CheckpointError, match="Gemma3 cannot be rotated; families that can: Llama"):
        Rotated(open_checkpoint(tiny("gemma3")))
