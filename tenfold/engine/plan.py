"""`StepPlan`: what one step computes, as frozen host data: printable, and the same whatever device runs it."""

from dataclasses import dataclass
from typing import NamedTuple

from tenfold.engine.sequence import Sequence

PROMPT_LOGPROBS = 128  # tokens of prompts in a step whose logits are wanted: 8,192 by a vocabulary of 150,000 are 5 GB


class Entry(NamedTuple):
    """Tokens start..start+length-1 of a sequence, in the row it owns; `sample`: the last one's logits give the next
    token. drafts: guesses of the tokens after the last known one. They are the last of `length`, and the logits of the
    token before them and of each of them give a token.
    """

    row: int
    sequence: Sequence
    start: int
    length: int
    sample: bool
    drafts: tuple[int, ...] = ()

    def tokens(self) -> list[int]:
        """Its token ids, where all but its drafts have been read."""
        return [*self.sequence.tokens[self.start : self.start + self.length - len(self.drafts)], *self.drafts]

    def undrafted(self) -> "Entry":
        """The same without its drafts."""
        return self._replace(length=self.length - len(self.drafts), drafts=())


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Entries in the order of the step's tokens: first `decodes` entries of one token each, sampled by an earlier step
    and perhaps not read yet; then single tokens with their drafts, all known; then chunks of text that is known.

    admitted: sequences that are in a plan for the first time since they got their row. copies: (source, target) pages
    to copy before anything is written, all at once; rooms: likewise, but one after the other. `plan.tokens` is never
    more than max_step_tokens.
    """

    number: int
    entries: tuple[Entry, ...]
    decodes: int = 0
    admitted: tuple[Sequence, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    rooms: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(e.length for e in self.entries)

    @property
    def drafts(self) -> int:
        """Drafts it verifies."""
        return sum(len(e.drafts) for e in self.entries)

    def __str__(self) -> str:
        rows = ", ".join(
            f"{e.row}:{e.sequence.request.id}/{e.sequence.index}[{e.start}:{e.start + e.length}]{'*' * e.sample}"
            f"{f'?{len(e.drafts)}' if e.drafts else ''}"
            for e in self.entries
        )
        copies = f" copy {' '.join(f'{s}>{t}' for s, t in self.copies)}" if self.copies else ""
        return f"step {self.number}: {rows or 'nothing'}{copies}"
