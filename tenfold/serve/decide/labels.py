"""The tokens by which a model names an option: a letter, a letter and a digit, or Yes and No.

Invariant: a label is read from whole tokens only; of a label that the vocabulary spells in several ways (with a space
in front, in capitals) the probabilities add up.
"""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenfold.serve.decide.question import NO, YES

LETTERS = string.ascii_uppercase
DIGITS = string.digits
WORDS = {YES: (YES, YES.lower(), YES.upper()), NO: (NO, NO.lower(), NO.upper())}
LOWEST = -60.0  # log-probability below which a label counts as this unlikely, so that infinities never meet


@dataclass(frozen=True, slots=True)
class Labels:
    """Of one vocabulary. ids: every token that says a label. places: label to its tokens' places in `ids`."""

    ids: tuple[int, ...]
    places: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, token_bytes: Callable[[int], bytes], vocab_size: int) -> "Labels":
        """Looks at the whole vocabulary: some tenths of a second for a large one. Raises ValueError where it cannot
        name options."""
        spelt = _spellings()
        found: dict[str, list[int]] = {}
        for token in range(vocab_size):
            label = spelt.get(token_bytes(token))
            if label is not None:
                found.setdefault(label, []).append(token)
        missing = [label for label in LETTERS + DIGITS if label not in found]
        if missing:
            raise ValueError(f"The model's vocabulary has no token {missing[0]!r}, by which an option could be named.")
        ids = tuple(token for tokens in found.values() for token in tokens)
        place = {token: i for i, token in enumerate(ids)}
        return cls(ids, {label: tuple(place[token] for token in tokens) for label, tokens in found.items()})

    @property
    def has_words(self) -> bool:
        return all(word in self.places for word in WORDS)

    def token(self, label: str) -> int:
        """The token that continues a prompt by this label."""
        return self.ids[self.places[label][0]]

    def read(self, asked: Sequence[float], labels: Sequence[str]) -> list[float]:
        """Natural-log probability of each of `labels`, given that it is one of them. asked: that of each of `ids`."""
        return normalised([add([asked[place] for place in self.places[label]]) for label in labels])


def _spellings() -> dict[bytes, str]:
    """What tokens say, and the label they say by it. Digits come after a letter, so no space stands in front."""
    spelt = {digit.encode(): digit for digit in DIGITS}
    for label, texts in {**{letter: (letter,) for letter in LETTERS}, **WORDS}.items():
        for text in texts:
            spelt[text.encode()] = spelt[f" {text}".encode()] = label
    return spelt


def add(logs: Sequence[float]) -> float:
    """The logarithm of a sum of probabilities, never under LOWEST."""
    most = max(logs)
    if most == -math.inf:
        return LOWEST
    return max(LOWEST, most + math.log(sum(math.exp(value - most) for value in logs)))


def normalised(logs: Sequence[float]) -> list[float]:
    """Logarithms of probabilities that sum to 1."""
    total = add(logs)
    return [max(LOWEST, value - total) for value in logs]
