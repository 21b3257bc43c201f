"""Drafts from a smaller model of the same vocabulary.

It has a KV store of its own with the same page numbers, so the target's page tables are its own and pages need no
second owner. It reads a sequence when drafts of it are wanted, in chunks, and never where nobody asks. What a page of
its store holds is noted by the page's key (a hash of all tokens up to its end), so a prompt that shares pages with
another is read once, and a page that came to another owner is never taken for what it was.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from tenfold.cache.store import KVSpec, KVStore
from tenfold.engine.plan import Entry
from tenfold.engine.rows import Rows
from tenfold.engine.sequence import Sequence
from tenfold.engine.speculate.guess import Guess
from tenfold.engine.speculate.policy import Costs
from tenfold.models.table import Model
from tenfold.ops import sample as ops


class DraftModel:
    """A drafter. Drafts are the model's best tokens, each pass for all sequences together; the host waits once, after
    the last.

    vocab_size: of the target; beside: its rows. chunk: tokens of a pass at most. most: drafts of a sequence at a time.
    max_len: longest sequence it can read. costs: receives what a pass over some rows took.
    """

    classes = 1
    watches = False

    def __init__(
        self,
        model: Model,
        spec: KVSpec,
        pages: int,
        vocab_size: int,
        beside: Rows,
        chunk: int,
        most: int,
        max_len: int,
        costs: Costs,
    ) -> None:
        device = beside.last_token.device
        self.model = model
        self.kv = KVStore(spec, pages, device)
        # As many steps ahead as there are passes between two waits.
        self.rows = Rows(len(beside.tables), beside.max_pages, self.kv, device, most, beside, beside.bucket)
        self.vocab_size = min(vocab_size, model.config.vocab_size)
        self.chunk = chunk
        self.max_len = max_len
        self.costs = costs
        self._holds: list[bytes | None] = [None] * pages  # key of the full page there, None: something else

    def offer(self, sequence: Sequence, guess: Guess, most: int) -> int:
        return 0 if guess.barred else max(0, min(most, self.max_len - len(sequence.tokens) + 1))

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """None for those it has not read to the end yet. Raises what the model raises."""
        entries = self._unread(wanted)
        if not entries:
            return {}
        begin = time.perf_counter()
        for entry in entries:
            self._will_write(entry.sequence, entry.start, len(entry.sequence.tokens) + wanted[entry.sequence] - 1)
        with torch.inference_mode():
            passes = [self._pass(entries, 0)]
            ready = [e for e in entries if e.sample]
            depth = 1
            while going := [e for e in ready if wanted[e.sequence] > depth]:
                following = tuple(e._replace(start=len(e.sequence.tokens) - 1 + depth, length=1) for e in going)
                passes.append(self._pass(following, len(following)))
                depth += 1
            ids = torch.cat(passes).tolist()
        if ready and sum(e.length for e in entries) <= 2 * len(ready):
            self.costs.add(len(ready), (time.perf_counter() - begin) / depth)
        return self._take(entries, ready, wanted, ids)

    def read(self, sequence: Sequence, guess: Guess, right: int) -> None:
        """The first `right` drafts became the sequence's own; all but the last draft have been read."""
        if sequence.drafted == guess.at:  # else it lost its row, and its pages, in between
            sequence.drafted += max(0, min(right, len(guess.tokens) - 1))

    def _pass(self, entries: tuple[Entry, ...], decodes: int) -> Tensor:
        """The best next token of each entry read to its end, [S] int64."""
        batch = self.rows.gather(entries, decodes)
        logits = self.model.forward(batch.step)[: len(batch.sampled)]  # a padded step has more
        tokens = ops.argmax(logits[:, : self.vocab_size])
        self.rows.keep(batch.rows, tokens)
        return tokens

    def _unread(self, wanted: Mapping[Sequence, int]) -> tuple[Entry, ...]:
        """What is to be read before these sequences can be drafted for, as far as one pass goes. No two write to one
        page: of sequences that share one, the first reads it for all.
        """
        size, left = self.kv.spec.page_size, self.chunk
        claimed: set[int] = set()
        entries = []
        for sequence in wanted:
            start = self._known(sequence)
            length = min(len(sequence.tokens) - start, left)
            ours = sequence.pages[start // size : -(-(start + length) // size)]
            for i, page in enumerate(ours):
                if page in claimed:
                    length = max(0, (start // size + i) * size - start)
                    break
            vocab = self.model.config.vocab_size
            if length > 0 and max(sequence.tokens[start : start + length]) >= vocab:
                sequence.guess.barred = True
            elif length > 0:
                left -= length
                claimed.update(ours)
                entries.append(Entry(sequence.row, sequence, start, length, start + length == len(sequence.tokens)))
        return tuple(entries)

    def _known(self, sequence: Sequence) -> int:
        """Leading tokens whose K and V are in the store, at least one less than there are."""
        size, guess = self.kv.spec.page_size, sequence.guess
        if sequence.drafted == 0:
            guess.labelled = 0
        page = sequence.drafted // size
        full = (len(sequence.tokens) - 1) // size
        if sequence.drafted % size == 0 and page < full:
            keys = sequence.keys.extend(sequence.tokens, full)
            while page < full and self._holds[sequence.pages[page]] == keys[page]:
                page += 1
            sequence.drafted = page * size
            guess.labelled = max(guess.labelled, page)
        return sequence.drafted

    def _will_write(self, sequence: Sequence, start: int, end: int) -> None:
        """Forget what the pages of positions start to end - 1 hold."""
        size = self.kv.spec.page_size
        for page in sequence.pages[start // size : -(-end // size)]:
            self._holds[page] = None

    def _take(
        self, entries: tuple[Entry, ...], ready: list[Entry], wanted: Mapping[Sequence, int], ids: list[int]
    ) -> dict[Sequence, tuple[int, ...]]:
        """Note what was read, and sort the tokens by sequence: pass by pass they are those still going."""
        for entry in entries:
            entry.sequence.drafted = entry.start + entry.length
            self._label(entry.sequence)
        drafts: dict[Sequence, list[int]] = {e.sequence: [] for e in ready}
        tokens = iter(ids)
        for depth in range(max((wanted[s] for s in drafts), default=0)):
            for sequence, own in drafts.items():
                if wanted[sequence] > depth:
                    own.append(next(tokens))
        for sequence, own in drafts.items():
            sequence.guess.propose(len(sequence.tokens), tuple(own))
        return {sequence: tuple(own) for sequence, own in drafts.items()}

    def _label(self, sequence: Sequence) -> None:
        """Note the keys of pages that are full of tokens it has read."""
        guess, full = sequence.guess, sequence.drafted // self.kv.spec.page_size
        keys = sequence.keys.extend(sequence.tokens, full)
        for page in range(guess.labelled, full):
            self._holds[sequence.pages[page]] = keys[page]
        guess.labelled = max(guess.labelled, full)
