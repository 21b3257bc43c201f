"""Masks: which tokens the grammars of a step's rows allow, filled on a thread of its own while the model runs.

Invariant: a row of a mask allows at least one token, so that it never leaves nothing to draw from.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.engine.sequence import Sequence

THREADS = max(1, (os.cpu_count() or 1) // 4)  # most of a machine is busy with the model meanwhile
ALL = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What the next token of some sequences may be. bits [C, words] uint32: bit i of row rows[sequence] is set where
    token i is allowed; errors: of the sequences that have no row, why.
    """

    bits: np.ndarray
    rows: dict[Sequence, int]
    errors: dict[Sequence, str]


class Masks:
    """Fills masks for a vocabulary of `vocab_size` tokens."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._words = -(-(vocab_size + 1) // 32)  # llguidance knows one token more, see grammar.py
        self._thread = ThreadPoolExecutor(1, "tenfold-masks")
        self._executor: Any = None

    def start(self, sequences: list[Sequence]) -> "Future[Mask]":
        """`fill`, in the background."""
        return self._thread.submit(self.fill, sequences)

    def fill(self, sequences: list[Sequence]) -> Mask:
        """For sequences whose matchers have taken all their tokens."""
        bits = np.zeros((len(sequences), self._words), np.uint32)
        self._compute(sequences, bits)
        bits[:, self._vocab_size // 32] &= np.uint32((1 << self._vocab_size % 32) - 1)
        rows, errors = {}, {}
        for row, (sequence, some) in enumerate(zip(sequences, np.any(bits, axis=1))):
            error = sequence.matcher.error
            if error or not some:
                errors[sequence] = error or "No token of this model's vocabulary can follow."
            else:
                rows[sequence] = row
                avoid(bits[row], sequence)
        return Mask(bits, rows, errors)

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
