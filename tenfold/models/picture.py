"""`Picture`: a picture as it goes from whoever prepared it to the tower that looks at it. Needs nothing but bytes, so
that a process without PyTorch can hold and send it.
"""

import hashlib
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Picture:
    """pixels: RGB of `tiles` equal tiles of height x width, a byte each, [tiles, height, width, 3]. tokens: it takes in
    a prompt. axes: rows and columns of them where positions of the model have such, else (0, 0). grid: what else the
    family's tower has to know. key: SHA-256 of all that decides what is seen.
    """

    tokens: int
    tiles: int
    height: int
    width: int
    pixels: bytes = field(repr=False)
    axes: tuple[int, int] = (0, 0)
    grid: tuple[int, ...] = ()
    key: bytes = b""

    def keyed(self) -> "Picture":
        """The same with its key."""
        shape = (self.tokens, self.tiles, self.height, self.width, self.axes, self.grid)
        digest = hashlib.sha256(f"seen {shape}\0".encode())
        digest.update(self.pixels)
        return replace(self, key=digest.digest())

    def check(self) -> None:
        """Raises ValueError where the numbers do not belong together."""
        expected = self.tiles * self.height * self.width * 3
        rows, columns = self.axes
        fits = min(self.tokens, self.tiles, self.height, self.width) > 0 and len(self.pixels) == expected
        if not fits or len(self.key) != 32 or ((rows, columns) != (0, 0) and rows * columns != self.tokens):
            raise ValueError(
                f"pictures has one of {self.tiles} x {self.height} x {self.width} pixels and {self.tokens} tokens with "
                f"{len(self.pixels)} bytes; allowed: what the model's own preparation makes."
            )
