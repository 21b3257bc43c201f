"""Packed formats on the CPU: other bytes, the same values."""

import logging

import pytest
import torch

from tenfold.ops.blocks import dequantize, quantize
from tenfold.ops.cpu import lib, pack
from tenfold.ops.cpu.native import Native
from tenfold.ops.cpu.repack import cpu_storage, repack
from tenfold.ops.formats import Packed, format_of, is_format, packed_of, raw_tensor
from tenfold.ops.matrix import RawTensor

STORAGES = {
    "int1g128z": "F32",
    "int2": "Q4_0",
    "int3g32": "Q4_0",
    "int3g128z": "Q8_0",
    "int4": "Q4_0",
    "int4g32": "Q4_0",
    "int4g128": "Q4_0",
    "int4g64z": "Q8_0",
    "int8": "Q8_0",
    "int8g128": "Q8_0",
    "fp8": "F32",
    "fp8g128a8": "F32",
}


def weight(storage: str, rows: int = 19, cols: int = 320) -> RawTensor:
    """320 columns end in half a group of 128; rows of 3 bits are whole multiples of that."""
    cols += -cols % (format_of(storage).codes.align if is_format(storage) else 1)
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    return quantize(RawTensor("w", "F32", (rows, cols), dense), storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_values_stay(storage: str) -> None:
    packed = weight(storage)
    again = repack(packed)
    assert again.storage == STORAGES[storage] == cpu_storage(storage)
    assert torch.equal(dequantize(again), dequantize(packed))
    assert repack(again) is again


@pytest.mark.skipif(not lib.available(), reason="no compiled kernels")
@pytest.mark.parametrize("storage", STORAGES)
def test_compiled_kernels_hold_them(storage: str) -> None:
    parts = [weight(storage), weight(storage, 5)]
    parts.append(weight("Q8_0", 3, parts[0].shape[1]))
    assert torch.equal(pack.unpack(Native(1).matrix(parts)), torch.cat([dequantize(part) for part in parts]))


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    format, packed = format_of("int4g32"), packed_of(weight("int4g32"))
    for scales in (packed.scales.float() + 1e-6, packed.scales.bfloat16() * 1e30):
        raw = raw_tensor("w", format, 19, 320, packed._replace(scales=scales))
        assert repack(raw).storage == "F32"
        assert torch.equal(dequantize(repack(raw)), dequantize(raw))


@pytest.mark.skipif(not lib.available(), reason="no compiled kernels")
@pytest.mark.parametrize("storage", ["int1g64z", "int2g64z", "int3g32z", "int4g32z"])
def test_fractions_of_zeros_are_kept(storage: str) -> None:
    """As `tenfold quantize` writes them: the product is that of the values in float32, up to the order of its sums."""
    packed = packed_of(weight(storage, cols=384))
    assert packed.zeros is not None
    raw = raw_tensor("w", format_of(storage), 19, 384, packed._replace(zeros=packed.zeros + 0.375))
    kernels, exact = Native(1), dequantize(raw)
    matrix, x = kernels.matrix([raw]), torch.randn(5, 384, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pack.unpack(matrix), exact)
    torch.testing.assert_close(kernels.linear(x, matrix), x @ exact.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", [2.5, -127.0, 127.0])
def test_zeros_too_fine_or_too_far_stay_float32(zero: float) -> None:
    """Differences of int8 codes may need 9 bits."""
    format = format_of("int8g32z")
    codes = torch.tensor([[-128, 127] * 16], dtype=torch.int8)
    raw = raw_tensor("w", format, 1, 32, Packed(codes, torch.ones(1, 1), torch.full((1, 1), zero)))
    assert repack(raw).storage == "F32"
    assert repack(raw).data.tolist() == [[-128 - zero, 127 - zero] * 16]


def test_ordered_columns_go_back_to_their_places() -> None:
    """The groups of ordered columns lie scattered, so no block has one scale."""
    packed = packed_of(weight("int4g32"))
    order = torch.randperm(320, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    raw = raw_tensor("w", format_of("int4g32o"), 19, 320, packed._replace(order=order))
    assert repack(raw).storage == "F32"
    assert torch.equal(repack(raw).data[:, order], dequantize(weight("int4g32")))


@pytest.mark.skipif(not lib.available(), reason="no compiled kernels")
def test_the_log_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tenfold"):
        kernels = Native(1)
        for _ in range(3):
            kernels.matrix([weight("int4g128"), weight("int4g128", 4)])
        kernels.matrix([weight("fp8")])
    assert caplog.messages == [
        "weights: int4g128 runs as Q4_0 on this CPU, the same values",
        "weights: fp8 runs as F32 on this CPU, the same values",
    ]
