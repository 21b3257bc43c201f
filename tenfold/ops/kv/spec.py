"""`PackedSpec`: one way to store keys and values in few bits, with a name that reads both ways.

SKVQ's formats are most of them; "fp8" and "int4" of the engine are others, without window and sinks.
"""

import math
import re
from dataclasses import dataclass

from tenfold.ops.kv.packing import FLOAT8_BITS, packed_bytes

BITS = (1.5, 2, 3, 4, 8)
GROUPS = (16, 32, 48, 64, 80, 96, 112, 128, 256)
ROTARY = ("pre", "post")
PARAMETERS = {"e4m3": 1, "fp16": 2}  # bytes of a scale or a zero
LARGEST_WINDOW = 1 << 20  # tokens
NAME = re.compile(r"k([\d.]+)v([\d.]+)g(\d+)(?:h(\d+))?(?:w(\d+))?(?:s(\d+))?(-post)?(-fp16)?(-turned)?")


@dataclass(frozen=True, slots=True)
class PackedSpec:
    """What is stored of a token that is older than the window and no sink.

    key_bits, value_bits: 1.5 (three levels, five codes a byte), 2, 3 or 4, or 8 (float8 e4m3, without zeros); group:
    channels that share a scale and a zero; span: neighbouring kv heads that the channels of a group may come from;
    window: the most recent tokens, and sinks: the first ones, that stay as computed; rotary: keys are stored "pre" or
    "post" rotary embedding; parameters: type of scales and zeros; turned: each group of neighbouring channels is
    multiplied by a Hadamard matrix before it is rounded. Raises ValueError.
    """

    key_bits: float
    value_bits: float
    group: int = 64
    span: int = 1
    window: int = 128
    sinks: int = 5
    rotary: str = "pre"
    parameters: str = "e4m3"
    turned: bool = False

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            _allowed(name, getattr(self, name), BITS)
        _allowed("group", self.group, GROUPS)
        _allowed("rotary", self.rotary, ROTARY)
        _allowed("parameters", self.parameters, tuple(PARAMETERS))
        for name, least in (("span", 1), ("window", 0), ("sinks", 0)):
            if not least <= getattr(self, name) <= LARGEST_WINDOW:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; allowed: whole numbers from {least} to {LARGEST_WINDOW}."
                )
        if self.turned and (self.group & (self.group - 1) or self.rotary == "pre" or self.span > 1):
            raise ValueError(
                f"turned needs groups of a power of two channels of one head, and keys after rotary embedding; "
                f"group is {self.group}, span {self.span}, rotary {self.rotary}."
            )

    @classmethod
    def parse(cls, name: str) -> "PackedSpec":
        """`k2v1.5g64` with, each where it is not the default, `h` span, `w` window, `s` sinks, `-post`, `-fp16`,
        `-turned`. Raises ValueError.
        """
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"The KV format is {name!r}; a name such as k2v2g64 or k2v1.5g64w128s5-post is expected.")
        key, value, group, span, window, sinks, post, fp16, turned = match.groups()
        try:
            bits = float(key), float(value)
        except ValueError as error:
            raise ValueError(f"The KV format is {name!r}, whose bits are no numbers; write k2v1.5g64.") from error
        return cls(
            *bits,
            int(group),
            span=int(span or 1),
            window=128 if window is None else int(window),
            sinks=5 if sinks is None else int(sinks),
            rotary="post" if post else "pre",
            parameters="fp16" if fp16 else "e4m3",
            turned=bool(turned),
        )

    def __str__(self) -> str:
        parts = [f"k{self.key_bits:g}v{self.value_bits:g}g{self.group}"]
        parts += [f"h{self.span}"] if self.span != 1 else []
        parts += [f"w{self.window}"] if self.window != 128 else []
        parts += [f"s{self.sinks}"] if self.sinks != 5 else []
        parts += ["-post"] if self.rotary == "post" else []
        parts += ["-fp16"] if self.parameters == "fp16" else []
        parts += ["-turned"] if self.turned else []
        return "".join(parts)

    def check(self, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError where heads of this shape cannot be cut into such groups."""
        if kv_heads % self.span:
            spans = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
            raise ValueError(
                f"The KV format {self} shares groups between {self.span} heads, the model has {kv_heads} kv heads; "
                f"allowed: {', '.join(map(str, spans))}."
            )
        if self.span * head_dim % self.group:
            raise ValueError(
                f"The KV format {self} has groups of {self.group} channels; {self.span} heads of {head_dim} channels "
                "cannot be cut into them. Take a smaller group, or more heads a group (h2)."
            )

    def groups(self, kv_heads: int, head_dim: int) -> int:
        """Groups of one token's keys, or values, in one layer. Raises ValueError."""
        self.check(kv_heads, head_dim)
        return kv_heads * head_dim // self.group

    def bytes_per_token(self, kv_heads: int, head_dim: int) -> int:
        """Of one packed token in one layer: codes and parameters of keys and values, exactly. Raises ValueError."""
        sides = (self.key_bits, self.value_bits)
        codes = sum(packed_bytes(head_dim, bits) for bits in sides)
        numbers = sum(map(parameters_of, sides)) * self.groups(kv_heads, head_dim)
        return kv_heads * codes + numbers * PARAMETERS[self.parameters]

    def bits(self, kv_heads: int, head_dim: int) -> float:
        """Average bits of a number in a packed token, parameters and padding included."""
        return self.bytes_per_token(kv_heads, head_dim) * 8 / (2 * kv_heads * head_dim)


def parameters_of(bits: float) -> int:
    """Numbers that a group's codes come with: a scale and a zero, or a scale."""
    return 1 if bits == FLOAT8_BITS else 2


def _allowed(name: str, value: float | str, allowed: tuple[float | str, ...]) -> None:
    if value not in allowed or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{name} is {value}; allowed: {', '.join(map(str, allowed))}.")
