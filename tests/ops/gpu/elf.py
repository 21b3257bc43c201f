"""What the ELF file of a compiled kernel says."""

import struct
from collections.abc import Iterator


def sections(image: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of each."""
    (headers,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    found = [struct.unpack_from("<IIQQQQ", image, headers + i * size) for i in range(count)]
    strings = image[found[names][4] :]
    for name, _, _, _, offset, length in found:
        yield strings[name : strings.index(b"\0", name)].decode(), offset, length


def static_bytes(image: bytes, entry: str) -> int:
    """Shared memory that a kernel has by itself."""
    return next((length for name, _, length in sections(image) if name == f".nv.shared.{entry}"), 0)


def registers(image: bytes) -> int:
    """Of a thread that the only kernel begins with: an attribute of the section .nv.info. Raises ValueError."""
    at, end = next((offset, offset + length) for name, offset, length in sections(image) if name == ".nv.info")
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", image, at)
        if attribute == 0x2F:  # EIATTR_REGCOUNT: the kernel's symbol and the number
            return int(struct.unpack_from("<II", image, at + 4)[1])
        at += 4 + (length if form == 4 else 0)
    raise ValueError("no kernel tells its registers")
