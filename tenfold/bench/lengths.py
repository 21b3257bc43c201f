"""Lengths of prompts and answers as people state them: `512`, `128-1024` (uniform) or `lognormal:220:0.9`."""

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of whole numbers. kind "uniform": low to high; "lognormal": median low, spread of the logarithm
    `sigma`, cut at high.
    """

    kind: str
    low: int
    high: int
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> int:
        if self.kind == "uniform":
            return rng.randint(self.low, self.high)
        return max(1, min(self.high, round(self.low * math.exp(rng.gauss(0.0, self.sigma)))))


MOST_OVER_MEDIAN = 8  # a lognormal length is cut at this many times its median


def parse(text: str) -> Lengths:
    """Raises ValueError with what is allowed."""
    parts = text.split(":")
    try:
        if parts[0] == "lognormal" and len(parts) == 3:
            median, sigma = int(parts[1]), float(parts[2])
            if median >= 1 and 0 < sigma <= 4:
                return Lengths("lognormal", median, MOST_OVER_MEDIAN * median, sigma)
        elif len(parts) == 1:
            low, _, high = text.partition("-")
            found = Lengths("uniform", int(low), int(high or low))
            if 1 <= found.low <= found.high:
                return found
    except ValueError:
        pass
    raise ValueError(f"{text!r} is no length; allowed: 512, 128-1024 (uniform), or lognormal:MEDIAN:SIGMA.")
