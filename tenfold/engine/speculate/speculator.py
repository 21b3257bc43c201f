"""`Speculator`: between the engine and a drafter. It asks what can be drafted, has the policy decide how much of it
pays, and tells both what came of it.

Drafts follow the last token of a sequence, so they need the steps before to have been read. Where the engine runs one
step ahead it reads first only while drafts pay (`worthwhile`); otherwise it stays ahead as without speculation.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from tenfold.engine.scheduler import Scheduler
from tenfold.engine.sequence import Sequence
from tenfold.engine.speculate.guess import Guess
from tenfold.engine.speculate.policy import MEMORY_OF_ALL, MEMORY_OF_ONE, Load, Offer, Policy, Rates
from tenfold.engine.speculate.verify import accepted

FIRST = 0.5  # odds of drafts before any was checked
PATIENCE = 64  # steps without drafts after which some are tried again; each vain try doubles it
LONGEST = 2048  # steps it is doubled to
HOPELESS = 0.2  # odds below which drafts are not tried again where they are known without trying
FADE = 0.98  # what one sequence's record keeps when it gets no drafts and so learns nothing: it is tried again


class Drafter(Protocol):
    """Where drafts come from. classes: of the strengths it gives its proposals. watches: proposals are made at every
    token, so that they are judged without being verified.
    """

    classes: int
    watches: bool

    def offer(self, sequence: Sequence, guess: Guess, most: int) -> int:
        """How many drafts it could give now, at most `most`."""
        ...

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """Up to so many drafts of each, noted as its guess's proposal."""
        ...

    def read(self, sequence: Sequence, guess: Guess, right: int) -> None:
        """The proposal's first `right` tokens came true."""
        ...


class Speculator:
    """most: drafts of a sequence in one step. drafted, accepted: tokens so far."""

    def __init__(self, drafter: Drafter, most: int, policy: Policy) -> None:
        self.drafter = drafter
        self.most = most
        self.policy = policy
        self.rates = Rates(drafter.classes)
        self.drafted = 0
        self.accepted = 0
        self._idle = 0
        self._patience = PATIENCE

    def worthwhile(self, scheduler: Scheduler) -> bool:
        """Whether to read the step in flight before the next is planned, so that it can verify drafts."""
        offers = self._offers(scheduler)
        if not offers:
            return False
        if any(self._choose(offers, scheduler, behind=True)):
            return True
        self._idle += 1
        return self._idle >= self._patience and any(self._tries(offers))

    def draft(self, scheduler: Scheduler, settle: Callable[[], None]) -> dict[Sequence, tuple[int, ...]]:
        """Drafts for the next plan, whose pages the scheduler has reserved. No step is in flight. settle: returns when
        matchers may be asked what grammars allow.
        """
        offers = self._offers(scheduler)
        if not offers:
            return {}
        counts = self._choose(offers, scheduler, behind=False)
        if any(counts):
            self._idle, self._patience = 0, PATIENCE
        else:
            self._idle += 1
            if self._idle < self._patience:
                return {}
            self._idle, self._patience = 0, min(2 * self._patience, LONGEST)
            counts = self._tries(offers)
        if not self.drafter.watches:
            for sequence, count in zip(offers, counts):
                if not count:
                    sequence.guess.rates.fade(FADE)
        wanted = scheduler.reserve({s: count for s, count in zip(offers, counts) if count})
        if not wanted:
            return {}
        drafts = self.drafter.draft(wanted)
        if any(sequence.matcher is not None for sequence in drafts):
            settle()
            drafts = fitting(drafts)
        self.policy.promise((offers[sequence].odds, len(own)) for sequence, own in drafts.items())
        return drafts

    def read(self, sequence: Sequence, before: int, drafts: int, right: int) -> None:
        """A step brought tokens[before:] of a sequence. drafts: how many it verified; right: of these, perhaps past the
        end of the answer.
        """
        guess: Guess | None = sequence.guess
        brought = len(sequence.tokens) - before
        self.drafted += drafts
        if drafts:
            self.accepted += min(right, brought)
            self.policy.keep(right)
        if guess is None or guess.at != before or not guess.tokens:
            return
        right = accepted(guess.tokens, sequence.tokens[before:])
        tried = right + (right < min(len(guess.tokens), brought))
        guess.rates.add(guess.strength, tried, right, MEMORY_OF_ONE)
        self.rates.add(guess.strength, tried, right, MEMORY_OF_ALL)
        self.drafter.read(sequence, guess, right)
        guess.tokens = ()

    def took(self, tokens: int, seconds: float, waited: bool) -> None:
        """A step of so many tokens took so long, drafting left out; waited: the host read it before it did anything
        else.
        """
        (self.policy.steps if waited else self.policy.ahead).add(tokens, seconds)

    def _offers(self, scheduler: Scheduler) -> dict[Sequence, Offer]:
        found: dict[Sequence, Offer] = {}
        for sequence in scheduler.decoding if scheduler.draft_room > 0 else ():
            if sequence.verifying or sequence.generated == 0:
                continue
            guess = sequence.guess
            if guess is None:
                guess = sequence.guess = Guess(self.drafter.classes)
            length = self.drafter.offer(sequence, guess, self.most)
            if length:
                prior = self.rates.odds(guess.strength, FIRST)
                found[sequence] = Offer(length, guess.rates.odds(guess.strength, prior))
        return found

    def _choose(self, offers: Mapping[Sequence, Offer], scheduler: Scheduler, behind: bool) -> list[int]:
        rows = len(scheduler.decoding)
        tokens = min(rows + scheduler.backlog, scheduler.limits.max_step_tokens)
        return self.policy.choose(list(offers.values()), Load(rows, tokens, behind), scheduler.draft_room)

    def _tries(self, offers: Mapping[Sequence, Offer]) -> list[int]:
        """To learn anew what drafts bring and cost."""
        return [0 if self.drafter.watches and o.odds < HOPELESS else o.length for o in offers.values()]


def fitting(drafts: Mapping[Sequence, tuple[int, ...]]) -> dict[Sequence, tuple[int, ...]]:
    """The drafts up to the first that a sequence's grammar does not allow."""
    found = {}
    for sequence, own in drafts.items():
        fit = own if sequence.matcher is None else own[: sequence.matcher.fits(own)]
        if fit:
            found[sequence] = fit
    return found
