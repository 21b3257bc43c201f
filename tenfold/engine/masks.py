"""Masks: which tokens the grammars of a step's rows allow, filled on a thread of its own while the model runs.

Invariant: a row of a mask allows at least one token, so that it never leaves nothing to draw from.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.engine.sequence import Sequence


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
        for row, sequence in enumerate(sequences):
            if sequence.matcher.error:
                errors[sequence] = sequence.matcher.error
            elif not bits[row].any():
                errors[sequence] = "No token of this model's vocabulary can follow."
            else:
                rows[sequence] = row
                avoid(bits[row], sequence)
        return Mask(bits, rows, errors)

    def _compute(self, sequences: list[Sequence], bits: np.ndarray) -> None:
        """Both calls release the interpreter lock."""
        width = self._words * bits.itemsize
        if len(sequences) == 1:
            sequences[0].matcher.ll.unsafe_compute_mask_ptr(bits.ctypes.data, width)
            return
        if self._executor is None:
            from llguidance import LLExecutor  # here for the reason given in grammar.py

            self._executor = LLExecutor(max(1, (os.cpu_count() or 1) // 2))
        matchers = [(s.matcher.ll, i) for i, s in enumerate(sequences)]
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, width, len(sequences))


def avoid(row: np.ndarray, sequence: Sequence) -> None:
    """Take from a row of bits the ends a sequence is not to have yet (min_tokens, ignore_eos), if that leaves any."""
    params = sequence.request.params
    early = sequence.generated < params.min_tokens
    if not (early or params.ignore_eos):
        return
    unwanted = sequence.stops if early else sequence.stops.difference(params.stop_token_ids)
    ids = np.array(sorted(unwanted), dtype=np.int64)
    rest = row.copy()
    np.bitwise_and.at(rest, ids >> 5, ~(np.uint32(1) << (ids & 31).astype(np.uint32)))
    if rest.any():
        row[:] = rest
