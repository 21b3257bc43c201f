"""Drafts from the sequence itself (prompt lookup): what followed the last time its latest tokens occurred.

Costs a few microseconds a token and no memory traffic, and is right where an answer repeats its prompt or itself:
summaries with quotes, edits of code, lists, tables. After Saxena, "Prompt Lookup Decoding", 2023; the chains of equal
beginnings are those of LZ77 compressors (Deutsch, RFC 1951, section 4).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from tenfold.engine.sequence import Sequence

if TYPE_CHECKING:  # a guess holds a lookup
    from tenfold.engine.speculate.guess import Guess

LEAST = 2  # tokens that must occur again: of one alone, what follows is chance
MOST = 8  # tokens compared; a longer match says no more than this
TRIED = 16  # latest occurrences looked at; the longest match wins, then the latest


class Lookup:
    """Where each pair of tokens of one growing sequence occurred: 12 bytes a token and one dict entry a distinct
    pair.
    """

    __slots__ = ("_before", "_heads")

    def __init__(self) -> None:
        self._heads: dict[int, int] = {}  # a pair, as one number -> place of its latest second token
        self._before = array("i")  # by place: that of the same pair before it, -1 where it is the first

    def propose(self, tokens: Seq[int], count: int) -> tuple[tuple[int, ...], int]:
        """Up to `count` tokens that may follow `tokens` (which begin as in earlier calls), and how many tokens before
        them are the same as when they followed before: LEAST to MOST, 0 where there is no proposal.
        """
        self._extend(tokens)
        last = len(tokens) - 1
        if last < LEAST or count < 1:
            return (), 0
        place = self._heads.get(tokens[last - 1] << 32 | tokens[last], -1)
        best, length = -1, 0
        for _ in range(TRIED):
            if place < 0:
                break
            same = _matching(tokens, place, last)
            if same > length:
                best, length = place, same
                if same == MOST:
                    break
            place = self._before[place]
        if length < LEAST:
            return (), 0
        found: list[int] = []
        for i in range(best + 1, best + 1 + count):  # past the end it goes on with what it proposes itself
            found.append(tokens[i] if i <= last else found[i - last - 1])
        return tuple(found), length

    def _extend(self, tokens: Seq[int]) -> None:
        """Note the pairs that something follows."""
        heads, before = self._heads, self._before
        for place in range(len(before), len(tokens) - 1):
            key = tokens[place - 1] << 32 | tokens[place] if place else -1
            before.append(heads.get(key, -1))
            heads[key] = place


def _matching(tokens: Seq[int], place: int, last: int) -> int:
    """How many tokens up to `place` equal those up to `last`, at most MOST."""
    count = 0
    while count < MOST and count <= place and tokens[place - count] == tokens[last - count]:
        count += 1
    return count


class NGrams:
    """A drafter. Its proposals cost next to nothing, so they are made at every token, and how often they are right is
    known whether or not they are verified.
    """

    classes = MOST + 1
    watches = True

    def offer(self, sequence: Sequence, guess: Guess, most: int) -> int:
        if guess.at != len(sequence.tokens):
            lookup = guess.lookup = guess.lookup or Lookup()
            guess.propose(len(sequence.tokens), *lookup.propose(sequence.tokens, most))
        return len(guess.tokens)

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        return {sequence: sequence.guess.tokens[:count] for sequence, count in wanted.items()}

    def read(self, sequence: Sequence, guess: Guess, right: int) -> None:
        pass
