"""Sizes in bytes as people write them."""

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes: "4096", "512M", "1.5GiB". Raises ValueError."""
    number = str(text).strip().lower().removesuffix("ib").removesuffix("b") or "0"
    unit = number[-1] if number[-1] in UNITS else ""
    try:
        size = int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise ValueError(f"{text!r} is not a size; allowed: a number of bytes from 0, also with K, M, G or T.")
    return size


def format_size(count: int) -> str:
    """The shortest text that `parse_size` reads as `count`."""
    for unit in "tgmk":
        if count and count % UNITS[unit] == 0:
            return f"{count // UNITS[unit]}{unit.upper()}"
    return str(count)
