"""Tiles of packed weights: every value comes back, and a lane's codes lie where the kernel takes them."""

import itertools

import pytest
import torch
from torch import Tensor

from tenfold.ops import tiles
from tenfold.ops.formats import Packed, format_of, raw_tensor
from tenfold.ops.matrix import RawTensor

NAMES = (
    *("int2g128", "int2g128z", "int3g128", "int3g256z", "int4g128", "int4g128z", "int4", "int8g128z", "int8", "fp8"),
    *("int4g128a8", "int4a8", "int4g128za8", "fp8a8"),
)
SIZES = ((64, 128), (8, 256), (72, 384), (200, 640))


def weights(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_value_comes_back(name: str, scales: torch.dtype, pairs: bool) -> None:
    format = format_of(name)
    for rows, cols in SIZES:
        packed = format.pack(weights(rows, cols), scales)
        kind = tiles.kind_of(format, packed)
        found = tiles.tile(format, packed, pairs)
        assert found.shape == (*tiles.grid(rows if not pairs else -(-rows // 64) * 64, cols), kind.nbytes)
        assert torch.equal(tiles.untile(kind, found, rows, cols, torch.float32, pairs), format.unpack(packed))


@pytest.mark.parametrize("pairs", [False, True])
def test_dense_values_come_back(pairs: bool) -> None:
    w = weights(72, 200).bfloat16()
    found = tiles.tile_dense(w, pairs)
    assert found.shape[2] == tiles.DENSE.nbytes
    assert torch.equal(tiles.untile(tiles.DENSE, found, 72, 200, torch.bfloat16, pairs), w)


def lane_codes(bits: int, signs: bool, tile: Tensor, warp: int, lane: int) -> dict[tuple[int, int], int]:
    """What a lane reads of a tile's codes as the module's text says, by (row, column)."""

    def piece(size: int, i: int, count: int, base: int = 0) -> Tensor:
        at = base + ((warp * count + i) * 32 + lane) * size
        return tile[at : at + size].clone().view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    found = {}
    for j, h, u, c in itertools.product(range(8), range(2), range(2), range(2)):
        r = 2 * h + u
        if signs:
            word = int(piece(16, j // 4, 2)[j % 4])
            byte = word >> 8 * (2 * c + h) & 255
            above = word >> 8 * ((2 * c + h + 1) % 4) & 255
            magnitude, negative = (byte >> 4 & 7, above >> 3 & 1) if u else (byte & 7, byte >> 7)
            code = (8 - magnitude if negative else 8 + magnitude) & 15
        elif bits == 4:
            code = int(piece(16, j // 4, 2)[j % 4]) >> 4 * (4 * c + r) & 15
        elif bits == 8:
            code = int(piece(16, j // 2, 4)[j % 2 * 2 + u]) >> 8 * (2 * c + h) & 255
        else:
            code = int(piece(16, 0, 1)[j // 2]) >> 2 * (8 * c + 4 * (j % 2) + r) & 3
            if bits == 3:
                code |= (int(piece(8, 0, 1, 2048)[j // 4]) >> (16 * c + 4 * (j % 4) + r) & 1) << 2
        row, col = 16 * warp + lane // 4 + 8 * u, 16 * j + 8 * h + 2 * (lane % 4) + c
        found[row, col] = code
    return found


@pytest.mark.parametrize(("bits", "acts"), [(2, ""), (3, ""), (4, ""), (4, "a8"), (8, "")])
def test_a_lanes_codes_lie_where_the_kernel_takes_them(bits: int, acts: str) -> None:
    format = format_of(f"int{bits}g128{acts}")
    numbers = torch.randint(int(bool(acts)), 1 << bits, (64, 128), generator=torch.Generator().manual_seed(bits))
    signed = numbers if bits < 8 else numbers - 128
    scales = torch.arange(64, dtype=torch.float16)[:, None]
    found = tiles.tile(format, Packed(format.codes.store(signed), scales))[0, 0]
    seen = {}
    for warp, lane in itertools.product(range(4), range(32)):
        seen |= lane_codes(bits, bool(acts), found, warp, lane)
    assert len(seen) == 64 * 128
    assert all(code == int(signed[at]) & ((1 << bits) - 1) for at, code in seen.items())
    assert torch.equal(found[64 * 128 * bits // 8 :].view(torch.float16), scales[:, 0])


def test_signs_become_small_numbers_of_float8() -> None:
    """As the kernel takes them: a mask, and a mask of the word turned by four bits."""
    format = format_of("int4g128a8")
    packed = format.pack(weights(64, 128))
    tile = tiles.tile(format, packed)[0, 0, : 64 * 128 // 2]
    words = tile.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    turned = (words >> 4) | (words & 15) << 28
    each = [(w & 0x87878787).to(torch.int32).view(torch.float8_e4m3fn).float() * 512 for w in (words, turned)]
    want = format.codes.load(packed.codes).float() - 8
    assert want.abs().max() == 7
    assert torch.equal(torch.cat(each).sort().values, want.flatten().sort().values)


def test_codes_without_an_opposite_keep_16_bit_activations() -> None:
    """Other tools write code 0 of 4 bits; our own rounding does not where activations may have 8 bits."""
    format, scales = format_of("int4g128a8"), torch.ones(64, 1, dtype=torch.float16)
    numbers = torch.full((64, 128), 15)
    assert tiles.kind_of(format, Packed(format.codes.store(numbers), scales)) == tiles.Kind("sign4", acts8=True)
    numbers[63, 127] = 0
    packed = Packed(format.codes.store(numbers), scales)
    kind = tiles.kind_of(format, packed)
    assert kind == tiles.Kind("int4")
    assert torch.equal(tiles.untile(kind, tiles.tile(format, packed), 64, 128, torch.float32), format.unpack(packed))


def test_pairs_stand_in_turns_of_eight() -> None:
    """Rows 16 w to 16 w + 7 of a tile are gate, the next eight up of the same features."""
    w = torch.arange(2 * 40.0)[:, None].expand(-1, 128).bfloat16()  # 40 features
    found = tiles.untile(tiles.DENSE, tiles.tile_dense(w, pairs=True), 128, 128, torch.bfloat16)[:, 0]
    for feature in range(40):
        row = feature // 8 * 16 + feature % 8
        assert (found[row], found[row + 8]) == (feature, 40 + feature)
    assert not found[80:].any()


def test_what_tiles_cannot_hold() -> None:
    for name, words in (
        ("int4g32", "32 columns are no multiple of 128"),
        ("int4g128o", "an order of their own"),
        ("int1g128z", "tiles have no codes of int1"),
    ):
        assert words in tiles.obstacle(format_of(name))
        with pytest.raises(ValueError, match="cannot lie in tiles"):
            tiles.tile(format_of(name), Packed(torch.zeros(1), torch.zeros(1)))


def raw(name: str, w: Tensor) -> RawTensor:
    if name == "dense":
        return RawTensor("w", "F32", tuple(w.shape), w)
    return raw_tensor("w", format_of(name), *w.shape, format_of(name).pack(w))


def bank(names: tuple[str, ...]) -> tuple[tiles.Tiled, list[list[RawTensor]]]:
    parts = [
        [raw(name, weights(48 + i, 256)[:48]), raw(name, weights(90 + i, 256)[:48])] for i, name in enumerate(names)
    ]
    dense = lambda parts: torch.cat([part.data for part in parts])  # noqa: E731
    return tiles.bank(parts, True, dense, torch.device("cpu"), torch.bfloat16), parts


def test_experts_of_several_formats_lie_side_by_side() -> None:
    names = ("int4g128", "int2g128z", "dense", "int4g128", "fp8a8")
    found, parts = bank(names)
    assert [found.kinds[at].name for at in found.of] == ["int4", "int2", "dense", "int4", "fp8"]
    assert found.of[0] == found.of[3]
    assert found.kinds[found.of[4]].acts8
    assert found.nbytes == sum(t.numel() for t in found.data)
    assert (found.rows, found.cols) == (96, 256)
    each = tiles.Untiled(found)
    assert len(each) == len(names)
    for i, (name, own) in enumerate(zip(names, parts)):
        address, kind = found.sources[i].tolist()
        assert address == found.data[i].data_ptr()
        assert (kind & 0xFFFFFFFF, kind >> 32) == (found.of[i], found.kinds[found.of[i]].nbytes)
        want = torch.cat(
            [p.data if name == "dense" else format_of(name).unpack(Packed(p.data, *p.extras)) for p in own]
        )
        assert torch.equal(each[i].data[0], want.bfloat16())
    assert [m.rows for m in each[1:3]] == [96, 96]


def test_kinds_beyond_the_eighth_become_dense() -> None:
    names = ("int2g128", "int2g128z", "int3g128", "int3g128z", "int4g128", "int4g128z", "int8g128", "int8g128z", "fp8")
    found, _ = bank(names)
    assert len(found.kinds) == tiles.MOST_KINDS
    assert [found.kinds[at].name for at in found.of[-2:]] == ["dense", "dense"]


def test_which_experts_lie_in_tiles() -> None:
    some = [raw("int4g128", weights(16, 128))]
    assert tiles.can_tile([some, [raw("dense", weights(16, 128))]])
    assert not tiles.can_tile([[raw("dense", weights(16, 128))]])
    assert not tiles.can_tile([some, [raw("int4g32", weights(16, 128))]])
    assert not tiles.can_tile([some, [raw("int1g128z", weights(16, 128))]])
