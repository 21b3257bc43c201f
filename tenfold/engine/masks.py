"""Masks: which tokens the grammars of a step's rows allow, filled on a thread of its own: from the moment the tokens
before are read, while the next step is planned and its model runs.

Invariant: a row of a mask allows at least one token, so that it never leaves nothing to draw from.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenfold.engine.sequence import Sequence

THREADS = max(1, (os.cpu_count() or 1) // 4)  # most of a machine is busy with the model meanwhile
ALL = 0xFFFFFFFF
FEW = 1024  # tokens that are drawn from by themselves rather than among all; looked for in an eighth as many words


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What the next token of some sequences may be. rows: [words] uint32 each, bit i is set where token i is allowed;
    few: the allowed tokens themselves, ascending, of rows that have no more than FEW; errors: of the sequences that
    have no row, why.
    """

    rows: dict[Sequence, np.ndarray] = field(default_factory=dict)
    few: dict[Sequence, np.ndarray] = field(default_factory=dict)
    errors: dict[Sequence, str] = field(default_factory=dict)


class Masks:
    """Fills masks for a vocabulary of `vocab_size` tokens. Matchers of sequences that were started belong to it until
    `result` returns.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._words = -(-(vocab_size + 1) // 32)  # llguidance knows one token more, see grammar.py
        self._thread = ThreadPoolExecutor(1, "tenfold-masks")
        self._executor: Any = None
        self._started: dict[Sequence, Future[Mask]] = {}

    def start(self, sequences: list[Sequence]) -> None:
        """Begin with those that have not been begun with. Their matchers have taken all their tokens."""
        new = [s for s in sequences if s not in self._started]
        if new:
            self._started.update(dict.fromkeys(new, self._thread.submit(self.fill, new)))

    def result(self, sequences: list[Sequence]) -> Mask:
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

    def fill(self, sequences: list[Sequence]) -> Mask:
        """At once."""
        bits = np.zeros((len(sequences), self._words), np.uint32)
        self._compute(sequences, bits)
        bits[:, self._vocab_size // 32] &= np.uint32((1 << self._vocab_size % 32) - 1)
        mask = Mask()
        for row, sequence, words in zip(bits, sequences, np.count_nonzero(bits, axis=1).tolist()):
            error = sequence.matcher.error
            if error or not words:
                mask.errors[sequence] = error or "No token of this model's vocabulary can follow."
                continue
            mask.rows[sequence] = row
            avoid(row, sequence)
            ids = members(row) if words <= FEW // 8 else None
            if ids is not None:
                mask.few[sequence] = ids
        return mask

    def _compute(self, sequences: list[Sequence], bits: np.ndarray) -> None:
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


def members(row: np.ndarray) -> np.ndarray | None:
    """The bits set in a row, ascending, int64; None if they are more than FEW."""
    words = np.flatnonzero(row)
    set_ = np.flatnonzero(np.unpackbits(row[words].view(np.uint8), bitorder="little"))
    return words[set_ >> 5] * 32 + (set_ & 31) if len(set_) <= FEW else None


def avoid(row: np.ndarray, sequence: Sequence) -> None:
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
