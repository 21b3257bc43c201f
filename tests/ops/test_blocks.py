"""Block types against the reference decoder and encoder of the `gguf` package."""

import gguf
import numpy as np
import pytest
import torch

from tenfold.ops import blocks
from tenfold.ops.blocks import BLOCKS, dequantize, quantize, row_bytes
from tenfold.ops.matrix import RawTensor
from tests.ops.cpu.weights import SCALES


def random_tensor(storage: str, rows: int, cols: int, seed: int = 0) -> RawTensor:
    """Random bytes in every field but the scales, which are random finite numbers."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[storage]
    row = cols // block.elements
    data = rng.integers(0, 256, (rows * row, block.nbytes), dtype=np.uint8)
    for at in SCALES[storage]:
        data[:, at : at + 2] = rng.normal(size=(len(data), 1)).astype(np.float16).view(np.uint8)
    return RawTensor("w", storage, (rows, cols), torch.from_numpy(data.reshape(rows, row * block.nbytes)))


def reference(raw: RawTensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[raw.storage]
    return torch.from_numpy(gguf.dequantize(raw.data.numpy(), kind).reshape(raw.shape))


@pytest.mark.parametrize("storage", sorted(BLOCKS))
def test_sizes_are_those_of_the_format(storage):
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[storage]]
    assert (BLOCKS[storage].elements, BLOCKS[storage].nbytes) == (elements, nbytes)


@pytest.mark.parametrize("storage", sorted(BLOCKS))
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (3, 512), (7, 768)])
def test_decoding_equals_the_reference_bit_for_bit(storage, rows, cols):
    raw = random_tensor(storage, rows, cols)
    assert torch.equal(dequantize(raw), reference(raw))


@pytest.mark.parametrize("storage", sorted(BLOCKS))
def test_chunks_do_not_change_the_result(storage, monkeypatch):
    raw = random_tensor(storage, 5, 512)
    whole = dequantize(raw)
    monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", 768)
    assert torch.equal(dequantize(raw), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_rounded_once(dtype):
    raw = random_tensor("Q4_K", 2, 256)
    assert torch.equal(dequantize(raw, dtype), dequantize(raw).to(dtype))


def test_no_rows_and_strided_rows():
    assert dequantize(random_tensor("Q8_0", 0, 64)).shape == (0, 64)
    raw = random_tensor("Q5_K", 6, 256)
    every_other = RawTensor("w", "Q5_K", (3, 256), raw.data[::2])
    assert torch.equal(dequantize(every_other), dequantize(raw)[::2])


@pytest.mark.parametrize(
    ("storage", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_dense_tensors_are_cast_and_not_copied_needlessly(storage, dtype):
    data = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = RawTensor("w", storage, (3, 5), data)
    assert torch.equal(dequantize(raw), data.float())
    assert dequantize(raw, dtype).data_ptr() == data.data_ptr()


def dense(values: torch.Tensor) -> RawTensor:
    return RawTensor("w", "F32", tuple(values.shape), values)


def hard_values() -> torch.Tensor:
    """Random rows, a row of zeros, one of equal values, one of exact halves, one of large values."""
    values = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    values[1] = 0
    values[2] = 0.25
    values[3] = torch.arange(96) * 0.5 - 24
    values[4] *= 1000
    values[5, :32] = -values[5, :32].abs()
    return values


@pytest.mark.parametrize("storage", sorted(blocks.ENCODERS))
def test_encoding_equals_the_reference_byte_for_byte(storage):
    values = hard_values()
    expected = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[storage])
    assert np.array_equal(quantize(dense(values), storage).data.numpy(), expected)


@pytest.mark.parametrize(("storage", "tolerance"), [("Q8_0", 0.5 / 127), ("Q4_0", 0.5 / 8), ("Q4_1", 0.5 / 7.5)])
def test_encoding_keeps_values_within_half_a_step(storage, tolerance):
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    error = (dequantize(quantize(dense(values), storage)) - values).abs().reshape(-1, 32).amax(1)
    largest = values.abs().reshape(-1, 32).amax(1)
    # Q4_0 clips what lies beyond 7 steps on the far side of zero: a whole step instead of half.
    assert (error <= largest * tolerance * (2.01 if storage == "Q4_0" else 1.05)).all()


@pytest.mark.parametrize("shape", [(4, 33), (64,), (2, 2, 32)])
def test_shapes_that_are_not_whole_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(dense(torch.zeros(shape)), "Q8_0")


def test_unknown_storage_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"IQ2_XS.*Q4_0"):
        row_bytes("IQ2_XS", 256)
    with pytest.raises(ValueError, match=r"Q6_K.*Q8_0"):
        quantize(dense(torch.zeros(1, 256)), "Q6_K")
    with pytest.raises(ValueError, match="multiples of 256"):
        row_bytes("Q4_K", 128)
