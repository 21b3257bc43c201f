"""Packed formats: names, sizes, the layout that kernels rely on, and rounding."""

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from tenfold.ops.blocks import dequantize, quantize, storage_bytes
from tenfold.ops.formats import (
    BFLOAT_MAGIC,
    EVERY_NIBBLE_PAIR,
    HALF_MAGIC,
    Format,
    Packed,
    can_stack,
    format_of,
    interleave,
    is_format,
    packed_of,
    raw_tensor,
    stack,
    two_levels,
    unpack,
)
from tenfold.ops.matrix import Deferred, RawTensor
from tenfold.ops.oracle import Oracle

NAMES = [
    "int1g32z",
    "int1g128z",
    "int1g96z",
    "int2",
    "int2g32",
    "int2g64z",
    "int3",
    "int3g128",
    "int3g32z",
    "int4",
    "int4g32",
    "int4g128",
    "int4g128z",
    "int8",
    "int8g64",
    "int8g128z",
    "fp8",
    "fp8a8",
    "fp8g128",
    "fp8g32a8",
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(rows: int, cols: int, seed: int = 0) -> RawTensor:
    return RawTensor("w", "F32", (rows, cols), random(rows, cols, seed=seed))


@pytest.mark.parametrize("name", [*NAMES, "int8a8", "int4g32zoa8", "int4o", "int1g64zo"])
def test_a_name_says_all(name: str) -> None:
    assert format_of(name).name == name
    assert is_format(name)


@pytest.mark.parametrize("name", ["", "int5", "int4g0", "int4g", "int4zg32", "fp8a4", "Q4_0", "F32", "int4g128 "])
def test_names_that_are_none(name: str) -> None:
    assert not is_format(name)
    with pytest.raises(ValueError, match="is no packed format"):
        format_of(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4g16", "multiples of 32"),
        ("fp8z", "fp8 has no zeros"),
        ("int1", "int1 lacks zeros, and two levels.* such as int1g128z"),
        ("int1g128", "int1g128 lacks zeros"),
        ("int1z", "int1z lacks groups"),
    ],
)
def test_parts_that_do_not_go_together(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_of(name)
    with pytest.raises(ValueError, match="no format of fp4"):
        Format("fp4")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cols", [32, 64, 128, 352, 384])
def test_numbers_are_rounded_to_the_nearest_code(name: str, cols: int) -> None:
    """No value is farther than half a step from its code, but for the end that a format without zeros cuts off.

    A step is the scale; float8's is a sixteenth of the number, or 2^-10 of the scale near zero.
    """
    raw, format = dense(5, cols), format_of(name)
    if format.obstacle(cols):
        with pytest.raises(ValueError, match=f"{cols} columns are no multiple of {format.codes.align}"):
            quantize(raw, name)
        return
    packed = quantize(raw, name)
    assert packed.data.dtype == format.codes.dtype
    assert sum(t.numel() * t.element_size() for t in (packed.data, *packed.extras)) == storage_bytes(name, (5, cols))
    parts = packed_of(packed)
    scales = parts.scales.float().abs()
    every = scales.repeat_interleave(format.group or cols, dim=1)[:, :cols]
    error = (dequantize(packed) - raw.data).abs()
    if format.bits == 1:  # two levels reach nobody's end; what is nearest to a number is taken
        other = dequantize(raw_tensor("w", format, 5, cols, parts._replace(codes=~parts.codes)))
        assert (error <= (other - raw.data).abs() + 1e-6).all()
        return
    if format.kind == "fp8":
        assert (error <= torch.maximum(raw.data.abs() / 16, every * 2**-10) * 1.0001).all()
        return
    # Codes reach one step less far on one side; zeros move the whole range by half a step.
    assert (error <= every * (1.01 if not format.zero else 0.51) + 1e-3 * raw.data.abs()).all()
    assert (error <= every * 0.5001).float().mean() > 0.9


@pytest.mark.parametrize("name", ["int1g32z", "int4", "int4g32z", "int8", "fp8"])
def test_zeros_and_huge_numbers_survive(name: str) -> None:
    values = torch.zeros(2, 128)
    values[1, 3] = 3e38
    out = dequantize(quantize(RawTensor("w", "F32", (2, 128), values), name))
    assert (out[0] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["int1g32z", "int4", "int4g32z", "int8", "fp8"])
def test_numbers_next_to_nothing_stay_numbers(name: str) -> None:
    """The inverse of their scale is infinite."""
    values = torch.zeros(1, 128)
    values[0, 3] = 1e-39
    out = dequantize(quantize(RawTensor("w", "F32", (1, 128), values), name))
    assert (out.abs() <= 1e-38).all()


def test_layout_of_nibbles() -> None:
    """Every code at every place; the pairs that kernels mask out, with the bits that make them numbers."""
    codes = torch.stack([(torch.arange(64) * step + step) % 16 for step in range(16)])
    words = format_of("int4").codes.store(codes)
    assert words.shape == (16, 8)
    assert torch.equal(format_of("int4").codes.load(words).long(), codes)
    for i in range(4):
        pairs = (words >> 4 * i) & EVERY_NIBBLE_PAIR
        wanted = codes.view(16, 8, 4, 2)[:, :, i]
        half = (pairs | HALF_MAGIC).view(torch.float16).view(16, 8, 2)
        bfloat = (pairs | BFLOAT_MAGIC).view(torch.bfloat16).view(16, 8, 2)
        assert torch.equal(half.float() - 1024, wanted.float())
        assert torch.equal(bfloat.float() - 128, wanted.float())
    plain = torch.zeros(16, 8, dtype=torch.int64)
    for i in range(8):
        plain |= codes[:, i::8] << 4 * i
    plain = torch.where(plain >= 1 << 31, plain - (1 << 32), plain)
    assert torch.equal(interleave(plain.to(torch.int32)), words)


@pytest.mark.parametrize("size", [96, 128])
def test_two_levels_are_the_mean_less_and_plus_the_mean_distance(size: int) -> None:
    """Of what a short group at the end has, too; the values nearest to the two are the least square error."""
    w = random(4, 128) + torch.tensor([0.0, 0.5, -3.0, 40.0])[:, None]
    values = torch.nn.functional.pad(w, (0, -128 % size)).unflatten(1, (-1, size))
    means, distances = two_levels(values, torch.tensor([size, 128 - size][: values.shape[1]]))
    format = format_of(f"int1g{size}z")
    got = dequantize(raw_tensor("w", format, 4, 128, format.pack(w, torch.float32)))
    for row in range(4):
        for i, (part, held) in enumerate(zip(w[row].split(size), got[row].split(size))):
            assert float(means[row, i]) == pytest.approx(float(part.mean()), rel=1e-4, abs=1e-6)
            assert float(distances[row, i]) == pytest.approx(2 * float((part - part.mean()).abs().mean()), rel=1e-4)
            low, high = held.unique().tolist()
            assert (low + high) / 2 == pytest.approx(float(part.mean()), rel=1e-4, abs=1e-5)
            assert high - low == pytest.approx(float(distances[row, i]), rel=1e-3)
            assert torch.equal(held == high, part > (low + high) / 2)


@pytest.mark.parametrize("value", [0.0, 0.7, -1e4, 1e-6])
def test_a_group_without_spread_stays_nearly_what_it_is(value: float) -> None:
    held = dequantize(quantize(RawTensor("w", "F32", (1, 128), torch.full((1, 128), value)), "int1g128z"))
    assert (held - value).abs().max() <= abs(value) * 2**-9 + 2**-19  # the least scale of float16 is 2^-24


def test_layout_of_one_bit() -> None:
    """Every column alone, and both codes everywhere, in the pairs that kernels mask out."""
    codes = torch.cat([torch.eye(128), 1 - torch.eye(128)]).long()
    words = format_of("int1g128z").codes.store(codes)
    assert words.shape == (256, 4)
    assert torch.equal(format_of("int1g128z").codes.load(words).long(), codes)
    for i in range(16):
        pairs = (words >> i) & 0x00010001
        wanted = codes.view(256, 4, 16, 2)[:, :, i].float()
        half = (pairs | HALF_MAGIC).view(torch.float16).view(256, 4, 2)
        bfloat = (pairs | BFLOAT_MAGIC).view(torch.bfloat16).view(256, 4, 2)
        assert torch.equal(half.float() - 1024, wanted)
        assert torch.equal(bfloat.float() - 128, wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("int")])
@hypothesis.given(
    seed=strategies.integers(0, 1 << 32), rows=strategies.integers(0, 5), blocks=strategies.integers(1, 4)
)
def test_codes_are_found_as_they_were_stored(name: str, seed: int, rows: int, blocks: int) -> None:
    known = format_of(name).codes
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(known.lowest, known.highest + 1, (rows, blocks * known.align), generator=draw)
    stored = known.store(codes)
    assert (stored.dtype, stored.numel() * stored.element_size() * 8) == (known.dtype, codes.numel() * known.bits)
    assert torch.equal(known.load(stored).long(), codes)
    assert torch.equal(known.store(known.load(stored)), stored)


def test_layout_of_two_bits() -> None:
    """Every code at every place, in the pairs that kernels mask out."""
    codes = torch.stack([torch.arange(64) + step for step in range(4)]) % 4
    words = format_of("int2").codes.store(codes)
    assert words.shape == (4, 4)
    assert torch.equal(format_of("int2").codes.load(words).long(), codes)
    for i in range(8):
        pairs = (words >> 2 * i) & 0x00030003
        half = (pairs | HALF_MAGIC).view(torch.float16).view(4, 4, 2)
        assert torch.equal(half.float() - 1024, codes.view(4, 4, 8, 2)[:, :, i].float())


def test_layout_of_three_bits() -> None:
    """Every code at every place, in the pairs that kernels mask out; the last pair is one bit of each word."""
    codes = torch.stack([torch.arange(128) * (1 + step) + step for step in range(8)]) % 8
    words = format_of("int3").codes.store(codes)
    assert words.shape == (8, 12)
    assert torch.equal(format_of("int3").codes.load(words).long(), codes)
    of_block, wanted = words.view(8, 4, 3), codes.view(8, 4, 16, 2)
    for i in range(15):
        pairs = (of_block[:, :, i // 5] >> 3 * (i % 5)) & 0x00070007
        bfloat = (pairs | BFLOAT_MAGIC)[..., None].contiguous().view(torch.bfloat16)
        assert torch.equal(bfloat.float() - 128, wanted[:, :, i].float())
    first, second, third = of_block.unbind(2)
    pairs = ((first >> 15) & 0x00010001) | ((second >> 14) & 0x00020002) | ((third >> 13) & 0x00040004)
    assert torch.equal(pairs & 0xFFFF, wanted[:, :, 15, 0].int())
    assert torch.equal(pairs >> 16, wanted[:, :, 15, 1].int())


def test_the_meaning_of_codes_scales_zeros_and_order() -> None:
    format = format_of("int8g32zo")
    codes = torch.randint(-128, 128, (3, 80), dtype=torch.int8)
    scales, zeros = random(3, 3).half(), random(3, 3, seed=1).half()
    order = torch.randperm(80).to(torch.int32)
    raw = raw_tensor("w", format, 3, 80, Packed(codes, scales, zeros, order))
    got = dequantize(raw)
    for row, col in ((0, 0), (1, 31), (2, 32), (2, 79)):
        wanted = (codes[row, col].float() - zeros[row, col // 32].float()) * scales[row, col // 32].float()
        assert got[row, order[col]] == wanted
    assert torch.equal(dequantize(raw, torch.bfloat16), got.bfloat16())


@pytest.mark.parametrize("kind", ["int1", "int2", "int3", "int4"])
def test_zeros_may_be_fractions(kind: str) -> None:
    format = format_of(f"{kind}g64z")
    codes = torch.randint(0, 1 << format.bits, (3, 128), generator=torch.Generator().manual_seed(1))
    scales, zeros = random(3, 2).half(), random(3, 2, seed=1).half()
    got = dequantize(raw_tensor("w", format, 3, 128, Packed(format.codes.store(codes), scales, zeros)))
    every = (each.float().repeat_interleave(64, dim=1) for each in (zeros, scales))
    assert torch.equal(got, (codes.float() - next(every)) * next(every))


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="48 columns are no multiple of 32"):
        quantize(dense(2, 48), "int4")
    with pytest.raises(ValueError, match="64 columns are no multiple of 128"):
        quantize(dense(2, 64), "int1g32z")
    with pytest.raises(ValueError, match="cannot be packed as int4o"):
        quantize(dense(2, 64), "int4o")


@pytest.mark.parametrize("name", ["int1g64z", "int2g32z", "int3", "int4g32", "int4g32z", "int8", "fp8a8"])
def test_parts_stack_by_rows(name: str) -> None:
    parts = [quantize(dense(rows, 128, rows), name) for rows in (3, 1, 5)]
    assert can_stack(parts)
    matrix = stack(parts, "cpu")
    assert (matrix.format, matrix.rows, matrix.cols) == (name, 9, 128)
    assert torch.equal(unpack(matrix), torch.cat([dequantize(part) for part in parts]))


def test_scales_of_different_types_meet_without_loss() -> None:
    a, b = quantize(dense(3, 64), "int4"), quantize(dense(2, 64, 1), "int4")
    b = RawTensor("b", "int4", b.shape, b.data, (b.extras[0].bfloat16() * 3e-8,))
    matrix = stack([a, b], "cpu")
    assert torch.equal(unpack(matrix), torch.cat([dequantize(a), dequantize(b)]))


def test_what_does_not_stack() -> None:
    a = quantize(dense(3, 64), "int4")
    assert not can_stack([a, quantize(dense(3, 64), "int4g32")])
    assert not can_stack([a, quantize(dense(3, 96), "int4")])
    assert not can_stack([dense(3, 64)])
    order = torch.arange(64, dtype=torch.int32)
    b, c = (RawTensor("b", "int4o", (3, 64), a.data, (*a.extras, each)) for each in (order, order.flip(0)))
    assert can_stack([b, b])
    assert not can_stack([b, c])
    assert torch.equal(unpack(stack([b, b], "cpu")), torch.cat([dequantize(a)] * 2))


def test_a_deferred_tensor_is_made_when_it_is_asked_for() -> None:
    made = []

    def make(device: object) -> tuple[Tensor, ...]:
        made.append(str(device))
        return (packed.data, *packed.extras)

    packed = quantize(dense(3, 64), "int4g32z")
    raw = Deferred("w", "int4g32z", (3, 64), make)
    assert (raw.storage, raw.shape, made) == ("int4g32z", (3, 64), [])
    assert torch.equal(dequantize(raw), dequantize(packed))
    assert made == ["cpu"]


@pytest.mark.parametrize("name", ["int1g32z", "int2", "int3g32z", "int4g32", "fp8a8"])
def test_the_oracle_runs_packed_matrices(name: str) -> None:
    raw, x, oracle = quantize(dense(6, 128), name), random(3, 128, seed=2), Oracle()
    matrix = stack([raw], "cpu")
    assert torch.equal(oracle.linear(x, matrix), x @ dequantize(raw).T)
    assert torch.equal(oracle.linear(x, oracle.matrix([raw])), x @ dequantize(raw).T)
    assert torch.equal(oracle.embed(torch.tensor([5, 0]), matrix), dequantize(raw)[[5, 0]])
