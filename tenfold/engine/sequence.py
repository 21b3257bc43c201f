"""`Sequence`: one answer in the making, the host state of a request (or of one of its `n` answers) from arrival to
finish.

Positions: tokens[0:computed] have their K and V written by steps already planned, tokens[0:done] by steps already read;
`done <= computed <= len(tokens) + pending`. Drafts count only once they turned out right. Only the scheduler moves a
sequence from one status to the next.
"""

from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any

from tenfold.cache.prefix import PageKeys
from tenfold.engine.request import Logprob, Request

if TYPE_CHECKING:  # which speaks of entries of plans, and these of sequences
    from tenfold.engine.sight import Layout

Rank = tuple[int, float, int, int]
Turn = tuple[int, float, Rank]  # priority, when it is due (fair.py)


class Status(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Sequence:
    """`index` of `request.params.n`. `order` numbers arrivals; `limit` is the length in tokens at which it ends."""

    __slots__ = (
        "cached_tokens",
        "charged",
        "children",
        "computed",
        "detokenizer",
        "done",
        "drafted",
        "guess",
        "index",
        "inflight",
        "keys",
        "layout",
        "limit",
        "matcher",
        "order",
        "pages",
        "parent",
        "parted",
        "parts_at",
        "pending",
        "pooled",
        "prompt_length",
        "prompt_logprobs",
        "rank",
        "registered",
        "request",
        "room",
        "row",
        "seed",
        "started",
        "status",
        "stops",
        "synced",
        "tokens",
        "turn",
        "verifying",
        "want_prompt_logprobs",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        order: int,
        limit: int,
        page_size: int,
        seed: int,
        stops: frozenset[int],
        layout: "Layout | None" = None,
    ) -> None:
        self.request = request
        self.index = index
        self.order = order
        self.rank: Rank = (request.priority, request.arrival, order, index)  # the largest is preempted first
        self.turn: Turn = (request.priority, inf, self.rank)  # the smallest is computed first; settled when it waits
        self.tokens = list(request.prompt)  # the prompt, then what was generated
        self.prompt_length = len(self.tokens)
        self.limit = limit
        self.seed = seed
        self.stops = stops  # token ids that end it
        self.status = Status.WAITING
        self.row = -1
        self.room = -1  # of a packed cache
        self.parts_at = 0  # where its text parts from cached pages whose room is not kept; 0: nowhere
        self.parted = -1  # a copy of its room there
        self.pages: list[int] = []
        self.synced = 0  # leading pages that the row's page table already shows
        self.computed = 0
        self.done = 0
        self.pending = 0  # tokens sampled by steps not yet read
        self.inflight = 0  # steps not yet read that touch it
        self.verifying = False  # where it stands is not known: a step not yet read has drafts of it, or is of a lane
        self.drafted = 0  # leading tokens whose K and V the draft model has, since the sequence got its row
        self.guess: Any = None  # what speculation knows of it (speculate.guess.Guess)
        self.charged = 0  # leading tokens its user was charged for; work repeated after preemption is free
        self.registered = 0  # leading full pages offered to the prefix cache
        self.layout = layout  # of its pictures
        self.keys = PageKeys(request.salt, page_size, layout.marks(page_size) if layout else None)
        self.cached_tokens = 0
        self.started = 0.0  # when its first step was planned; 0 before
        self.parent: Sequence | None = None
        self.children: list[Sequence] = []  # answers 1..n-1, waiting until the prompt is computed
        self.want_prompt_logprobs = request.params.prompt_logprobs is not None and index == 0
        self.prompt_logprobs: list[Logprob | None] = []
        self.pooled: Any = None  # sum (or last) of the hidden states so far
        self.detokenizer: Any = None
        self.matcher: Any = None  # of the request's grammar (grammar.Matcher), at the end of `tokens`

    @property
    def generated(self) -> int:
        """Tokens generated and read."""
        return len(self.tokens) - self.prompt_length

    @property
    def reads_cache(self) -> bool:
        """Whether prompt tokens may be skipped: not when each one's logits or hidden state is asked for."""
        return not self.want_prompt_logprobs and self.request.pool != "mean"

    def __repr__(self) -> str:
        progress = f"{self.computed}/{len(self.tokens)}+{self.pending}"
        return f"<{self.request.id}/{self.index} {self.status.value} {progress} row {self.row}>"
