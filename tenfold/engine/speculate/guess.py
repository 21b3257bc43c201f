"""`Guess`: what speculation knows of one sequence."""

from tenfold.engine.speculate.ngram import Lookup
from tenfold.engine.speculate.policy import Rates


class Guess:
    """tokens: a proposal for what follows the first `at` tokens; strength: how good its ground is, a class of `rates`.
    lookup: of n-gram drafts. labelled: leading pages of which a draft model has noted what they hold; barred: it cannot
    read this sequence.
    """

    __slots__ = ("at", "barred", "labelled", "lookup", "rates", "strength", "tokens")

    def __init__(self, classes: int) -> None:
        self.at = -1
        self.tokens: tuple[int, ...] = ()
        self.strength = 0
        self.rates = Rates(classes)
        self.lookup: Lookup | None = None
        self.labelled = 0
        self.barred = False

    def propose(self, at: int, tokens: tuple[int, ...], strength: int = 0) -> None:
        self.at, self.tokens, self.strength = at, tokens, strength
