"""Pictures from files and from bytes that strangers send, as RGB.

Invariant: what a picture costs is known before it is decoded. Its format is told by its first bytes, its size by its
header, and only a picture within the limits is decoded; whatever a decoder raises becomes one sentence without any of
the decoder's own words, which have told of memory addresses before (CVE-2026-22778).
"""

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

WHITE = (255, 255, 255)

# Format, whether bytes begin like it, and its decoder. Formats that bring interpreters or containers along, such as
# PostScript or TIFF, are left out.
FORMATS: tuple[tuple[str, Callable[[bytes], bool], Any], ...] = (
    ("PNG", lambda b: b.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("JPEG", lambda b: b.startswith(b"\xff\xd8\xff"), JpegImageFile),
    ("WebP", lambda b: b[:4] == b"RIFF" and b[8:12] == b"WEBP", WebPImageFile),
    ("GIF", lambda b: b.startswith((b"GIF87a", b"GIF89a")), GifImageFile),
    ("BMP", lambda b: b.startswith(b"BM"), BmpImageFile),
)
NAMES = ", ".join(name for name, _, _ in FORMATS)


class PictureError(ValueError):
    """A picture that is not taken: says what is wrong with it and what is allowed."""


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """The largest picture that is decoded: bytes of the file, pixels in all, and pixels of a side. ratio: longer side
    over shorter one.
    """

    max_bytes: int = 20 << 20
    max_pixels: int = 64_000_000
    max_side: int = 32_768
    max_ratio: float = 200.0


LIMITS = PictureLimits()


def open_picture(source: bytes | str | Path | Image.Image, limits: PictureLimits = LIMITS) -> Image.Image:
    """A picture as RGB: the first frame, the right way up, what is transparent on white.

    source: the bytes of a file, its path, or a picture that is open already. Raises PictureError.
    """
    if isinstance(source, Image.Image):
        check_size(source.size, limits)
        return _decoded(source)
    data = source if isinstance(source, bytes) else read_file(Path(source), limits)
    if len(data) > limits.max_bytes:
        raise PictureError(f"The picture has {len(data)} bytes; allowed: up to {limits.max_bytes}.")
    image = _opened(data)
    check_size(image.size, limits)
    return _decoded(image)


def read_file(path: Path, limits: PictureLimits = LIMITS) -> bytes:
    """The bytes of a picture file, no more than are allowed. Raises PictureError."""
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise PictureError(f"The picture {path} cannot be read: {error.strerror or 'not a file'}.") from None
    if len(data) > limits.max_bytes:
        raise PictureError(f"The picture {path} has more than {limits.max_bytes} bytes, which is the most allowed.")
    return data


def data_url(url: str, limits: PictureLimits = LIMITS) -> bytes:
    """The bytes of a `data:` URL. What it says of their type is not relied on. Raises PictureError."""
    head, comma, body = url.partition(",")
    if not head[:5].lower() == "data:" or not comma:
        raise PictureError("The picture's data URL has no data; allowed: data:image/png;base64,... and the like.")
    if len(body) > 3 * limits.max_bytes:  # percent signs make three characters of a byte
        raise PictureError(f"The picture has more than {limits.max_bytes} bytes, which is the most allowed.")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    return from_base64(unquote_to_bytes(body) if "%" in body else body)


def from_base64(text: str | bytes) -> bytes:
    """Raises PictureError. Lines may be broken, and the padding may be missing."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    joined = b"".join(raw.split()).rstrip(b"=")
    try:
        return base64.b64decode(joined + b"=" * (-len(joined) % 4), validate=True)
    except binascii.Error:
        raise PictureError("The picture's data is not valid base64.") from None


def content_key(image: Image.Image) -> bytes:
    """SHA-256 of an RGB picture's size and pixels: equal keys mean equal pictures, whatever file they came in."""
    digest = hashlib.sha256(f"picture {image.width} {image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.digest()


def check_size(size: tuple[int, int], limits: PictureLimits) -> None:
    """Raises PictureError."""
    width, height = size
    given = f"The picture is {width} x {height} pixels"
    if min(size) < 1:
        raise PictureError(f"{given}; it must have some.")
    if max(size) > limits.max_side:
        raise PictureError(f"{given}; allowed: sides of up to {limits.max_side}.")
    if width * height > limits.max_pixels:
        raise PictureError(f"{given}, {width * height} in all; allowed: up to {limits.max_pixels}.")
    if max(size) > limits.max_ratio * min(size):
        raise PictureError(f"{given}; allowed: one side up to {limits.max_ratio:g} times the other.")


def _opened(data: bytes) -> Image.Image:
    """By its header only. The decoder is called itself, for Pillow's own way in warns of large sizes before ours are
    checked.
    """
    for name, begins, decoder in FORMATS:
        if begins(data[:16]):
            try:
                opened: Image.Image = decoder(BytesIO(data))
            except Exception:
                raise PictureError(f"The picture begins like a {name} file and is none; it is damaged.") from None
            return opened
    raise PictureError(f"The picture is in no format that is read; allowed: {NAMES}.")


def _decoded(image: Image.Image) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)
        return _rgb(upright)
    except Exception:
        raise PictureError("The picture is damaged: it cannot be decoded to its end.") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey of 16 bits, of which the upper eight are kept
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", layers.size, (*WHITE, 255))
        return Image.alpha_composite(ground, layers).convert("RGB")
    rgb = image.convert("RGB")
    rgb.load()
    return rgb
