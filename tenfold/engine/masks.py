"""Masks: which tokens the grammars of a step's rows allow, filled on a thread of its own: from the moment the tokens
before are read, while the next step is planned and its model runs.

Invariant: a row of a mask allows at least one token, so that it never leaves nothing to draw from.
"""

import os
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenfold.engine.plan import Entry
from tenfold.engine.sequence import Sequence

THREADS = max(1, (os.cpu_count() or 1) // 4)  # most of a machine is busy with the model meanwhile
ALL = 0xFFFFFFFF
FEW = 1024  # tokens that are drawn from by themselves rather than among all; looked for in an eighth as many words


class Ahead:
    """A sequence some drafts further on, as far as a mask depends on it."""

    __slots__ = ("generated", "matcher", "request", "sequence", "stops")

    def __init__(self, sequence: Sequence, matcher: Any, drafts: int) -> None:
        self.sequence = sequence
        self.matcher = matcher
        self.generated = sequence.generated + drafts
        self.request = sequence.request
        self.stops = sequence.stops


def ahead(entry: Entry) -> list[Ahead]:
    """An entry's sequence after each of its drafts, which its grammar allows, until the grammar ends."""
    found: list[Ahead] = []
    matcher = entry.sequence.matcher
    for count, token in enumerate(entry.drafts, 1):
        matcher = matcher.copy()
        if not matcher.advance(token) or matcher.stopped:
            break
        found.append(Ahead(entry.sequence, matcher, count))
    return found


Held = Sequence | Ahead
Place = tuple[Sequence, int]


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What the next token of some sequences may be, after none or some drafts: by (sequence, drafts). rows: [words]
    uint32 each, bit i is set where token i is allowed; few: the allowed tokens themselves, ascending, of rows that have
    no more than FEW; errors: of those that have no row, why.
    """

    rows: dict[Place, np.ndarray] = field(default_factory=dict)
    few: dict[Place, np.ndarray] = field(default_factory=dict)
    errors: dict[Place, str] = field(default_factory=dict)


class Masks:
    """Fills masks for a vocabulary of `vocab_size` tokens. Matchers of sequences that were started belong to it until
    `result` returns.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._words = -(-(vocab_size + 1) // 32)  # llguidance knows one token more, see grammar.py
        self._thread = ThreadPoolExecutor(1, "tenfold-masks")
        self._executor: Any = None
        self._started: dict[Held, Future[Mask]] = {}

    def start(self, sequences: Seq[Held]) -> None:
        """Begin with those that have not been begun with. Their matchers have taken all their tokens."""
        new = [s for s in sequences if s not in self._started]
        if new:
            self._started.update(dict.fromkeys(new, self._thread.submit(self.fill, new)))

    def settle(self) -> None:
        """Wait until nothing is being filled, so that matchers may be asked; what was filled stays."""
        wait(set(self._started.values()))

    def result(self, sequences: Seq[Held]) -> Mask:
        """Of these, and of all that were started; raises what filling them raised."""
        self.start(sequences)
        futures = set(self._started.values())
        self._started = {}
        wait(futures)
        whole = Mask()
        for future in futures:
            part = future.result()
            whole.rows.update(part.rows)
            whole.few.update(part.few)
            whole.errors.update(part.errors)
        return whole

    def fill(self, sequences: Seq[Held]) -> Mask:
        """At once."""
        bits = np.zeros((len(sequences), self._words), np.uint32)
        self._compute(sequences, bits)
        bits[:, self._vocab_size // 32] &= np.uint32((1 << self._vocab_size % 32) - 1)
        mask = Mask()
        for row, sequence, words in zip(bits, sequences, np.count_nonzero(bits, axis=1).tolist()):
            error = sequence.matcher.error
            place = _place(sequence)
            if error or not words:
                mask.errors[place] = error or "No token of this model's vocabulary can follow."
                continue
            mask.rows[place] = row
            avoid(row, sequence)
            ids = members(row) if words <= FEW // 8 else None
            if ids is not None:
                mask.few[place] = ids
        return mask

    def _compute(self, sequences: Seq[Held], bits: np.ndarray) -> None:
        """llguidance releases the interpreter lock."""
        width = self._words * bits.itemsize
        address = bits.ctypes.data
        if THREADS == 1 or len(sequences) == 1:
            for i, sequence in enumerate(sequences):
                sequence.matcher.ll.unsafe_compute_mask_ptr(address + i * width, width)
            return
        if self._executor is None:
            from llguidance import LLExecutor  # here for the reason given in grammar.py

            self._executor = LLExecutor(THREADS)
        matchers = [(s.matcher.ll, i) for i, s in enumerate(sequences)]
        self._executor.unsafe_compute_mask_ptr(matchers, address, width, len(sequences))


def _place(held: Held) -> Place:
    if isinstance(held, Ahead):
        return held.sequence, held.generated - held.sequence.generated
    return held, 0


def members(row: np.ndarray) -> np.ndarray | None:
    """The bits set in a row, ascending, int64; None if they are more than FEW."""
    words = np.flatnonzero(row)
    set_ = np.flatnonzero(np.unpackbits(row[words].view(np.uint8), bitorder="little"))
    return words[set_ >> 5] * 32 + (set_ & 31) if len(set_) <= FEW else None


def avoid(row: np.ndarray, sequence: Held) -> None:
    """Take from a row of bits the ends a sequence is not to have yet (min_tokens, ignore_eos), if that leaves any."""
    params = sequence.request.params
    early = sequence.generated < params.min_tokens
    if not (early or params.ignore_eos):
        return
    unwanted = sequence.stops if early else sequence.stops.difference(params.stop_token_ids)
    before = {token >> 5: row[token >> 5] for token in unwanted}
    for token in unwanted:
        row[token >> 5] &= ALL ^ (1 << (token & 31))
    if not row.any():
        for word, value in before.items():
            row[word] = value
