"""Packed weights hold exactly the values of the file, whatever is stacked, and refuse what does not fit."""

import gguf
import pytest
import torch

from tenfold.ops.blocks import dequantize
from tenfold.ops.cpu import lib, pack
from tenfold.ops.matrix import RawTensor
from tests.ops.cpu.weights import DENSE, STORAGES, numbers, random_weight, width

pytestmark = pytest.mark.skipif(not lib.available(), reason="no compiled kernels")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (15, 2), (16, 1), (37, 3)])
def test_values_are_those_of_the_file(storage, rows, blocks):
    raw = random_weight(storage, rows, width(storage, blocks))
    assert torch.equal(pack.unpack(pack.pack([raw])), dequantize(raw).float())


@pytest.mark.parametrize("storage", [s for s in STORAGES if s not in DENSE])
def test_values_are_those_of_the_gguf_package(storage):
    raw = random_weight(storage, 19, 512)
    want = gguf.dequantize(raw.data.numpy(), gguf.GGMLQuantizationType[storage])
    assert torch.equal(pack.unpack(pack.pack([raw])), torch.from_numpy(want))


def test_parts_of_different_formats_stack():
    parts = [
        random_weight(s, n, 256, n) for s, n in (("Q4_K", 5), ("Q4_K", 20), ("Q6_K", 16), ("F16", 3), ("Q8_0", 33))
    ]
    matrix = pack.pack(parts)
    assert (matrix.rows, matrix.cols, matrix.format) == (77, 256, "q4_k+q6_k+f16+q8_0")
    assert torch.equal(pack.unpack(matrix).double(), numbers(*parts))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_takes_the_bits_it_takes_in_the_file(storage):
    raw = random_weight(storage, 64, 1024)
    overhead = pack.pack([raw]).data[0].numel() / (raw.data.numel() * raw.data.element_size())
    assert 1 <= overhead < (1.05 if storage not in ("Q2_K", "Q3_K") else 1.21)


def test_rows_by_id_repeated_scaled_and_none(native):
    raw = random_weight("Q5_K", 50, 256)
    matrix, ids = pack.pack([raw]), torch.tensor([49, 0, 7, 7, 16, 15])
    assert torch.equal(pack.rows(matrix, ids, 3.0), dequantize(raw)[ids] * 3)
    assert torch.equal(native.embed(ids, matrix), dequantize(raw)[ids])
    assert pack.rows(matrix, ids[:0]).shape == (0, 256)


@pytest.mark.parametrize("storage", ["Q4_1", "BF16"])
def test_rows_may_stand_apart_in_the_file(storage):
    raw = random_weight(storage, 40, 64)
    every_second = RawTensor("w", storage, (20, 64), raw.data[::2])
    assert torch.equal(pack.unpack(pack.pack([every_second])), dequantize(raw).float()[::2])


def test_a_copy_lives_on_its_own():
    raw = random_weight("Q4_0", 40, 64)
    matrix = pack.pack([raw, raw])
    copy = pack.copy(matrix)
    matrix.data[0].zero_()
    assert torch.equal(pack.unpack(copy).double(), numbers(raw, raw))


def changed(raw: RawTensor, **fields: object) -> RawTensor:
    return RawTensor(**{n: fields.get(n, getattr(raw, n)) for n in ("name", "storage", "shape", "data")})  # type: ignore[arg-type]


GOOD = random_weight("Q4_1", 4, 64)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one"),
        ([changed(GOOD, storage="IQ2_XS")], "IQ2_XS; the CPU kernels take Q4_0"),
        ([GOOD, random_weight("Q4_1", 4, 32)], r"shape \(4, 32\); expected \(rows, 64\)"),
        ([changed(GOOD, shape=(4, 64, 1))], "shape"),
        ([changed(GOOD, shape=(64,))], "shape"),
        ([changed(GOOD, shape=(4, 48))], "48 columns; Q4_1 needs a multiple of 32"),
        ([changed(GOOD, shape=(5, 64))], "expected 5 x 40 of torch.uint8"),
        ([changed(GOOD, data=GOOD.data.float())], "torch.float32 on cpu"),
        ([changed(random_weight("F16", 4, 64), storage="BF16")], "expected 4 x 64 of torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        pack.pack(parts)
