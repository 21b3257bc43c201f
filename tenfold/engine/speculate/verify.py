"""Verification: which of the drafts of a step were right.

The token at every position is drawn as it would be without drafts: from the request's own distribution there, with the
random number of its seed and that position. A draft is right where it equals what was drawn. So drafts decide how much
one step brings, never what it brings, and a draft is accepted with just the probability its token has.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from tenfold.engine.plan import Entry
from tenfold.ops.host import sent


def draws(entries: Seq[Entry]) -> tuple[Entry, ...]:
    """One entry for each token that is drawn: an entry with k drafts becomes k + 1, cut after the token itself and
    after each of its drafts, so that the drafts of a draw are the tokens taken for granted before it.
    """
    found: list[Entry] = []
    for entry in entries:
        if entry.drafts:
            first = entry.length - len(entry.drafts)
            found += [entry._replace(length=first + i, drafts=entry.drafts[:i]) for i in range(len(entry.drafts) + 1)]
        else:
            found.append(entry)
    return tuple(found)


def accepted(drafts: Seq[int], drawn: Seq[int]) -> int:
    """How many drafts equal what was drawn in their place, up to the first that does not."""
    count = 0
    for draft, token in zip(drafts, drawn):
        if draft != token:
            break
        count += 1
    return count


class Check:
    """`accepted` for a whole step, on the device: E entries with up to K drafts, D draws in the order of `draws`."""

    def __init__(self, entries: Seq[Entry], device: torch.device) -> None:
        width = max(len(e.drafts) for e in entries) + 1
        places: list[int] = []
        expected: list[int] = []
        owners: list[int] = []
        offsets: list[int] = []
        for number, entry in enumerate(entries):
            start, count = len(owners), len(entry.drafts) + 1
            places += [start + min(i, count - 1) for i in range(width)]
            expected += [*entry.drafts, *[-1] * (width - count)]
            owners += [number] * count
            offsets += range(count)
        # One copy, which the host does not wait for: the model of this step runs meanwhile.
        told = sent([*places, *expected, *owners, *offsets], device)
        parts = told.split([len(places), len(expected), len(owners), len(offsets)])
        self._places = parts[0].view(len(entries), width)  # [E, K + 1] the draws of each entry, the last repeated
        self._expected = parts[1].view(len(entries), width - 1)  # [E, K], -1: no draft
        self._entry, self._offset = parts[2:]

    def accepted(self, tokens: Tensor) -> Tensor:
        """Of the tokens drawn [D] int64 -> how many drafts of each entry are right, [E] int64."""
        right = tokens[self._places[:, :-1]] == self._expected
        return right.to(torch.int64).cumprod(1).sum(1)

    def last(self, tokens: Tensor, accepted: Tensor) -> Tensor:
        """The last token each entry brings, [E] int64."""
        return tokens[self._places.gather(1, accepted[:, None]).squeeze(1)]

    def kept(self, accepted: Tensor) -> Tensor:
        """Which draws belong to the answers, [D] bool."""
        return self._offset <= accepted[self._entry]
