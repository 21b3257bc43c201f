"""Pictures of every format, mode and kind of damage."""

import base64
import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.base.pictures import (
    PictureError,
    PictureLimits,
    content_key,
    data_url,
    from_base64,
    open_picture,
)


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8))


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_every_format(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = file_of(gradient(), kind, **options)
    image = open_picture(data)
    assert image.mode == "RGB"
    exact = kind in ("PNG", "BMP", "WEBP")
    assert np.abs(pixels(image) - pixels(gradient())).mean() <= (0 if exact else 12)
    path = tmp_path / "name.txt"  # the content counts, not the name
    path.write_bytes(data)
    for source in (path, str(path)):
        assert content_key(open_picture(source)) == content_key(image)


def test_transparent_parts_are_white() -> None:
    image = gradient().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (24, 20))))
    opened = pixels(open_picture(file_of(image, "PNG")))
    assert (opened[:, ::2] == 255).all()
    assert (opened[:, 1::2] == pixels(gradient())[:, 1::2]).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(open_picture(file_of(palette, "PNG", transparency=0))).tolist() == [[[255] * 3, [40, 50, 60]]]
    grey = Image.merge("LA", (Image.new("L", (1, 1), 90), Image.new("L", (1, 1), 0)))
    assert pixels(open_picture(file_of(grey, "PNG"))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_modes(mode: str) -> None:
    image = gradient().convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    opened = open_picture(file_of(image, kind))
    assert np.abs(pixels(opened) - pixels(image.convert("RGB"))).mean() < 4


def test_grey_of_16_bits_keeps_its_upper_half() -> None:
    values = np.linspace(0, 65535, 300).astype(np.uint16).reshape(10, 30)
    opened = pixels(open_picture(file_of(Image.fromarray(values), "PNG")))
    assert np.abs(opened[..., 0] - values // 256).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_right_way_up(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_picture(file_of(gradient(), "PNG", exif=exif))
    turns = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (4,), 7: (6,), 8: (2,)}[orientation]
    wanted = gradient()
    for turn in turns:
        wanted = wanted.transpose(Image.Transpose(turn))
    assert (pixels(upright) == pixels(wanted)).all()


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = pixels(open_picture(data))[4, 4]
        assert red > 240
        assert green < 10
        assert blue < 10


def test_a_picture_that_is_open_already() -> None:
    image = gradient().convert("RGBA")
    assert content_key(open_picture(image)) == content_key(gradient())
    with pytest.raises(PictureError, match="up to 100"):
        open_picture(image, PictureLimits(max_pixels=100))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (PictureLimits(max_bytes=50), "bytes; allowed: up to 50"),
        (PictureLimits(max_pixels=959), "960 in all; allowed: up to 959"),
        (PictureLimits(max_side=39), "sides of up to 39"),
        (PictureLimits(max_ratio=1.5), "one side up to 1.5 times"),
    ],
)
def test_limits(limits: PictureLimits, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        open_picture(file_of(gradient(), "PNG"), limits)


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (12_000, 9_000), (1, 100_000)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="allowed"):
        open_picture(bomb(*size))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_truncated(kind: str) -> None:
    data = file_of(gradient(300, 200), kind)
    for end in (10, len(data) // 3, len(data) * 2 // 3):
        with pytest.raises(PictureError, match=r"damaged|no format"):
            open_picture(data[:end])


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0", b"II*\0" + bytes(90)],
)
def test_no_picture(data: bytes) -> None:
    with pytest.raises(PictureError, match="allowed: PNG, JPEG, WebP, GIF, BMP"):
        open_picture(data)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(PictureError, match="cannot be read"):
            open_picture(path)
    (tmp_path / "large.png").write_bytes(bytes(200))
    with pytest.raises(PictureError, match="more than 100 bytes"):
        open_picture(tmp_path / "large.png", PictureLimits(max_bytes=100))


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["PNG", "BMP", "WEBP", "GIF", "JPEG"]), data=st.data())
def test_damage_anywhere(kind: str, data: st.DataObject) -> None:
    """Whatever is in the bytes, it is a picture or a PictureError, and no warning."""
    raw = bytearray(file_of(gradient(20, 12), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(3, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(PictureError):
        assert open_picture(bytes(raw), PictureLimits(max_pixels=1_000_000)).mode == "RGB"


def test_data_urls() -> None:
    raw = file_of(gradient(), "PNG")
    text = base64.b64encode(raw).decode()
    for url in (
        f"data:image/png;base64,{text}",
        f"DATA:;base64,{text.rstrip('=')}",
        f"data:;base64,{text[:40]}\n{text[40:]}",
    ):
        assert data_url(url) == raw
    assert data_url("data:text/plain,a%20b") == b"a b"
    assert data_url(f"data:;base64,{text.replace('+', '%2B')}") == raw
    for wrong in ("data:image/png;base64", "http://x/y.png", "data:;base64,a*b=", "data:;base64,a"):
        with pytest.raises(PictureError):
            data_url(wrong)
    with pytest.raises(PictureError, match="most allowed"):
        data_url("data:;base64," + "A" * 400, PictureLimits(max_bytes=100))
    with pytest.raises(PictureError, match="base64"):
        from_base64("é")


def test_keys_tell_pictures_apart() -> None:
    one, other = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert content_key(one) != content_key(other)
    other = one.copy()
    other.putpixel((0, 0), (0, 0, 1))
    assert content_key(one) != content_key(other)
