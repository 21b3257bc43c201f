"""Weights: what reaches the kernels, and what is said when config and file disagree."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.blocks import dequantize, quantize
from tenfold.ops.matrix import RawTensor
from tenfold.ops.oracle import Oracle
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.load import HEAD, TABLE, Weights


class Memory:
    """A checkpoint of a few tensors."""

    path = Path("memory")
    config: dict[str, Any] = {}  # noqa: RUF012
    chat_template = None
    special: dict[str, str] = {}  # noqa: RUF012
    eos_ids = ()

    def __init__(self, *tensors: RawTensor) -> None:
        self.tensors = {raw.name: raw for raw in tensors}

    def names(self) -> Iterable[str]:
        return self.tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> RawTensor:
        return self.tensors[name]

    def tokenizer(self) -> Any:
        return None


class Recorder(Oracle):
    """Remembers the storage of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[str] = []

    def matrix(self, parts: Any) -> Any:
        self.storages += [part.storage for part in parts]
        return super().matrix(parts)


def raw(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> RawTensor:
    storage = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    data = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
    return RawTensor(name, storage, shape, data)


Q, K, ODD = raw("q", 4, 32), raw("kk", 2, 32, dtype=torch.bfloat16), raw("odd", 3, 5)
PACKED = quantize(raw("packed", 3, 32), "Q8_0")
BIAS = raw("bias", 6, dtype=torch.float16)
CHECKPOINT = Memory(Q, K, ODD, PACKED, BIAS, raw("layer.rotary_emb.inv_freq", 4))


def test_matrix_stacks() -> None:
    matrix = Weights(CHECKPOINT, Oracle()).matrix("q", "kk", rows=[4, 2], cols=32)
    assert torch.equal(matrix.data[0], torch.cat((Q.data, K.data.float())))


def test_vector() -> None:
    weights = Weights(CHECKPOINT, Oracle())
    assert weights.vector("bias", size=6).dtype == torch.float32
    assert torch.equal(weights.vector("bias", "bias", size=12), torch.cat((BIAS.data, BIAS.data)).float())


@pytest.mark.parametrize(
    ("mode", "storages"),
    [
        ("auto", ["F32", "BF16", "Q8_0", "F32"]),
        ("dense", ["F32", "BF16", "F32", "F32"]),
        ("q8_0", ["Q8_0", "Q8_0", "Q8_0", "F32"]),
        ("fp8", ["fp8a8", "fp8a8", "Q8_0", "F32"]),
        ("int8", ["int8g128", "int8g128", "Q8_0", "F32"]),
        ("int4", ["int4g128", "int4g128", "Q8_0", "F32"]),
        ("int3", ["F32", "BF16", "Q8_0", "F32"]),
        ("w4a8", ["int4a8", "int4a8", "Q8_0", "F32"]),
    ],
)
def test_modes(mode: str, storages: list[str]) -> None:
    """Rows that are not whole blocks stay dense; what is packed stays as it is. Each mode rounds to its own steps:
    127 and 8 on either side of zero, or 3 bits behind the leading one.
    """
    kernels = Recorder()
    weights = Weights(CHECKPOINT, kernels, mode=mode)
    matrices = [weights.matrix(name) for name in ("q", "kk", "packed", "odd")]
    assert kernels.storages == storages
    assert torch.equal(matrices[2].data[0], dequantize(PACKED))
    steps = {"q8_0": 127, "int8": 128, "int4": 8, "fp8": 28, "w4a8": 8}
    error = (matrices[0].data[0] - Q.data).abs().max()
    assert error <= (Q.data.abs().max() / steps[mode] if mode in steps else 0.0)
    assert (error > 0) == (mode in steps)


@pytest.mark.parametrize(
    ("mode", "table", "head"),
    [
        *((packed, "F32", "int8g128") for packed in ("int4", "int8", "fp8")),
        ("q8_0", "Q8_0", "Q8_0"),
        *(("int4-blocks", "F32", "F32"), ("fp8-blocks", "F32", "F32"), ("auto", "F32", "F32"), ("dense", "F32", "F32")),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_packed_and_the_table_is_not(tied: bool, mode: str, table: str, head: str) -> None:
    """A table that is the head, too, is kept beside a packed copy, so what is looked up stays exact."""
    kernels = Recorder()
    names = (TABLE,) if tied else (TABLE, HEAD)
    weights = Weights(Memory(*(raw(name, 4, 32) for name in names)), kernels, mode=mode)
    found = weights.matrix(TABLE)
    other = weights.tied_head(found) if tied else weights.matrix(HEAD)
    assert kernels.storages == [table] + [head] * (not tied or table != head)
    assert (other is found) == (tied and table == head)
    assert other.rows == 4
    assert weights.unused() == []


def test_q8_0_takes_float8_too() -> None:
    """It has no fewer bits, and CPUs have no float8."""
    kernels = Recorder()
    Weights(Memory(quantize(Q, "fp8"), quantize(raw("k", 2, 32), "int4")), kernels, mode="q8_0").matrix("q", "k")
    assert kernels.storages == ["Q8_0", "int4"]


def test_a_bias_of_zeros_is_no_leftover() -> None:
    zeros = RawTensor("a.bias", "F16", (4,), torch.zeros(4, dtype=torch.float16))
    weights = Weights(Memory(Q, zeros, raw("b.bias", 4)), Oracle())
    weights.matrix("q")
    assert weights.unused() == ["b.bias"]


def test_a_mode_that_is_not_one() -> None:
    with pytest.raises(ValueError, match="weights is 'int5'; allowed: auto, dense, q8_0"):
        Weights(CHECKPOINT, Oracle(), mode="int5")


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda w: w.matrix("none"), "has no tensor none"),
        (lambda w: w.vector("none"), "has no tensor none"),
        (lambda w: w.matrix("q", rows=[5], cols=32), r"Tensor q has shape \[4, 32\]; the config calls for \[5, 32\]"),
        (lambda w: w.matrix("q", "kk", rows=[4, 2], cols=31), r"calls for \[4, 31\]"),
        (lambda w: w.matrix("bias"), r"Tensor bias has shape \[6\]"),
        (lambda w: w.vector("q"), "a vector of F32, F16 or BF16 was expected"),
        (lambda w: w.vector("bias", size=7), "bias hold 6 numbers; the config calls for 7"),
    ],
)
def test_disagreement(take: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        take(Weights(CHECKPOINT, Oracle()))


def test_progress_and_leftovers(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[int, int]] = []
    weights = Weights(CHECKPOINT, Oracle(), progress=lambda done, total: calls.append((done, total)))
    weights.matrix("q", "kk")
    weights.vector("bias")
    weights.vector("bias")
    assert calls == [(1, 6), (2, 6), (3, 6), (3, 6)]
    assert weights.unused() == ["odd", "packed"]
    with caplog.at_level(logging.WARNING, "tenfold"):
        weights.finish()
    assert caplog.messages == ["2 of 6 tensors in memory are not used by this model: odd, packed"]


def test_nothing_left_over_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    weights = Weights(Memory(Q), Oracle())
    weights.matrix("q")
    weights.finish()
    assert not caplog.messages
