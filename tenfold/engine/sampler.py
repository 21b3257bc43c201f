"""The sampler: for each row what its request asks for, in batches of rows that ask for the same kind of thing.

Order of the transforms, per row: penalties (repetition, then frequency and presence), logit bias, tokens not allowed
now (by the row's grammar, whose mask leaves out ends before min_tokens where it can; else end tokens before
min_tokens), temperature, top-k, top-p, min-p. Whatever is lifted or lowered, a token that is not allowed stays out.
Log-probabilities are the model's own, taken before all of these. What a batch needs is worked out when its rows change
(`SamplePlan`), not every step.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.engine.masks import Mask
from tenfold.engine.plan import Entry
from tenfold.engine.request import Logprob, SamplingParams
from tenfold.engine.sequence import Sequence
from tenfold.engine.speculate.verify import Check
from tenfold.ops import sample as ops
from tenfold.ops.host import sent

COLDEST = 1e-30  # temperature: logits over a lower one are no numbers in float32


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rows drawn together. index [R] int64: their places in the batch; temperature and the cuts [R, 1]; truncated:
    whether any cut is on; width: candidates known to suffice, 0 where that depends on the logits.
    """

    places: tuple[int, ...]
    index: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    truncated: bool
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """Rows with penalties: places in the batch, rows of the count tables, and [R, 1] factors, None where all are
    neutral.
    """

    places: tuple[int, ...]
    index: Tensor
    rows: Tensor
    repetition: Tensor | None
    presence: Tensor
    frequency: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class SamplePlan:
    """What a batch of rows needs beyond the best token. All empty: greedy, nothing else."""

    groups: tuple[Group, ...]
    penalties: tuple[Penalties, ...]
    biased: tuple[tuple[int, Tensor, Tensor], ...]  # place, token ids, values
    held: tuple[tuple[int, int, Tensor], ...]  # place, min_tokens, token ids not allowed before
    masked: tuple[int, ...]  # places whose answers follow a grammar
    logprobs: tuple[int, ...]  # places
    rows: Tensor | None  # the same on the device, where there are any
    best: int  # how many best tokens the most curious of those wants
    asked: Tensor | None  # [len(logprobs), A] token ids whose log-probabilities are wanted, padded with 0

    @property
    def plain(self) -> bool:
        return not (self.groups or self.logprobs or self.edits)

    @property
    def edits(self) -> bool:
        return bool(self.penalties or self.biased or self.held or self.masked)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """tokens [R] int64; last [S] int64: the latest of each sequence; logs: of the rows in `SamplePlan.logprobs`, the
    token's, the best ones' and their ids; asked: of the same rows, those of the ids in `SamplePlan.asked`.
    """

    tokens: Tensor
    last: Tensor
    logs: tuple[Tensor, Tensor, Tensor] | None = None
    asked: Tensor | None = None


class Sampler:
    """Sampling for up to `max_batch` rows. Count tables of penalties are made when a request first asks for one."""

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device) -> None:
        self.max_batch = max_batch
        self.vocab_size = vocab_size
        self.device = device
        self._counts: Tensor | None = None
        self._seen: Tensor | None = None

    def admit(self, sequence: Sequence) -> None:
        """A sequence took over a row: start its penalty counts from what it has so far."""
        if not penalised(sequence.request.params):
            return
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros(self.max_batch, self.vocab_size, device=self.device)
            self._seen = torch.zeros(self.max_batch, self.vocab_size, dtype=torch.bool, device=self.device)
        answer = sequence.tokens[sequence.prompt_length :]
        counts = np.bincount(np.array(answer, dtype=np.int64), minlength=self.vocab_size)
        self._counts[sequence.row] = sent(counts, self.device, torch.float32)
        self._seen[sequence.row] = False
        self._seen[sequence.row].index_fill_(0, self._tensor(sequence.tokens), True)

    def plan(self, sequences: Seq[Sequence]) -> SamplePlan:
        """The needs of a batch, in its order."""
        params = [s.request.params for s in sequences]
        bent = [i for i, p in enumerate(params) if penalised(p)]
        wanted = tuple(i for i, p in enumerate(params) if p.wants_logprobs)
        return SamplePlan(
            groups=self._groups(params),
            penalties=tuple(self._penalties(sequences, b) for b in self._batches(bent)),
            biased=tuple(
                (i, self._tensor(list(p.logit_bias)), self._tensor(list(p.logit_bias.values()), torch.float32))
                for i, p in enumerate(params)
                if p.logit_bias
            ),
            held=tuple(
                (i, p.min_tokens, self._tensor(sorted(sequences[i].stops)))
                for i, p in enumerate(params)
                if p.min_tokens and sequences[i].stops and p.grammar is None
            ),
            masked=tuple(i for i, p in enumerate(params) if p.grammar is not None),
            logprobs=wanted,
            rows=self._tensor(list(wanted)) if wanted else None,
            best=max((params[i].logprobs or 0 for i in wanted), default=0),
            asked=self._asked([params[i].logprob_token_ids for i in wanted]),
        )

    def _asked(self, ids: list[tuple[int, ...]]) -> Tensor | None:
        width = max(map(len, ids), default=0)
        return self._tensor([[*own, *[0] * (width - len(own))] for own in ids]) if width else None

    def run(
        self,
        logits: Tensor,
        plan: SamplePlan,
        entries: Seq[Entry],
        mask: Mask | None = None,
        check: Check | None = None,
    ) -> Sampled:
        """One token for each row of logits [R, V] (whose contents may be overwritten); entries in the same order.
        mask: what the rows with a grammar may sample; one that is not in it has ended, and its token is not read.
        check: of a step with drafts, whose entries are `verify.draws`.
        """
        if plan.plain:
            tokens = ops.argmax(logits)
            return Sampled(tokens, tokens if check is None else check.last(tokens, check.accepted(tokens)))
        raw = None if plan.rows is None else logits[plan.rows]
        few = self._few(plan, entries, mask)
        free = self._free(plan, entries, mask, few)
        if plan.edits:
            self._edit(logits, plan, entries, mask, few, free)
        tokens = ops.argmax(logits)
        for group in plan.groups:
            tokens[group.index] = self._draw(logits, group, entries, few)
        if free:
            self._correct(logits, tokens, plan, entries, free)
        logs = None if raw is None else ops.log_probabilities(raw, tokens[plan.rows], plan.best)
        asked = None if raw is None or plan.asked is None else ops.asked_probabilities(raw, plan.asked)
        right = None if check is None else check.accepted(tokens)
        kept = None if check is None or right is None else check.kept(right)
        for p in plan.penalties:
            self._count(p, tokens, kept)
        return Sampled(tokens, tokens if check is None or right is None else check.last(tokens, right), logs, asked)

    def _count(self, p: Penalties, tokens: Tensor, kept: Tensor | None) -> None:
        """Penalties know the tokens that were drawn. kept: which of them belong to the answers, None for all."""
        if self._counts is None or self._seen is None:
            return
        rows, drawn = p.rows, tokens[p.index]
        if kept is not None:
            rows, drawn = rows[kept[p.index]], drawn[kept[p.index]]
        self._counts.index_put_((rows, drawn), torch.ones_like(drawn, dtype=torch.float32), accumulate=True)
        self._seen.index_put_((rows, drawn), torch.ones_like(drawn, dtype=torch.bool))

    def _few(self, plan: SamplePlan, entries: Seq[Entry], mask: Mask | None) -> dict[int, np.ndarray]:
        """On a CPU, the tokens allowed at the places where these are few: work on them alone is a tenth."""
        if mask is None or self.device.type != "cpu":
            return {}
        found = ((i, mask.few.get(_place(entries[i]))) for i in plan.masked)
        return {i: ids for i, ids in found if ids is not None}

    def _free(
        self, plan: SamplePlan, entries: Seq[Entry], mask: Mask | None, few: dict[int, np.ndarray]
    ) -> dict[int, np.ndarray]:
        """On a CPU, masks of the places that are sampled without them first. Inside a string nearly every token is
        allowed; one that was drawn among all and happens to be allowed is as likely as had it been drawn among the
        allowed. Not so where the best tokens are cut off, for which ones these are depends on the mask.
        """
        if mask is None or self.device.type != "cpu":
            return {}
        cut = {group.places[0] for group in plan.groups if group.truncated}
        found = ((i, mask.rows.get(_place(entries[i]))) for i in plan.masked if i not in few and i not in cut)
        return {i: row for i, row in found if row is not None}

    def _correct(
        self, logits: Tensor, tokens: Tensor, plan: SamplePlan, entries: Seq[Entry], free: dict[int, np.ndarray]
    ) -> None:
        """Draw anew, among the allowed and with another random number, where a token is not."""
        groups = {group.places[0]: group for group in plan.groups}
        for place, row in free.items():
            token = int(tokens[place])
            if row[token >> 5] >> (token & 31) & 1:
                continue
            ops.allow_only(logits, [place], [row])
            again = logits[place : place + 1]
            drawn = self._draw(logits, groups[place], entries, {}, True) if place in groups else ops.argmax(again)
            tokens[place] = drawn[0]

    def _edit(
        self,
        logits: Tensor,
        plan: SamplePlan,
        entries: Seq[Entry],
        mask: Mask | None,
        few: dict[int, np.ndarray],
        free: dict[int, np.ndarray],
    ) -> None:
        """Change logits in place, row by row as each request asks."""
        if self._counts is not None and self._seen is not None:
            for p in plan.penalties:
                rows = logits[p.index]
                drafts = [(i, entries[place].drafts) for i, place in enumerate(p.places) if entries[place].drafts]
                if p.repetition is not None:
                    seen = _with_drafts(self._seen[p.rows], drafts)
                    rows = ops.penalise_repetition(rows, seen, p.repetition)
                if p.frequency is not None:
                    counts = _with_drafts(self._counts[p.rows], drafts)
                    rows = ops.penalise_use(rows, counts, p.presence, p.frequency)
                logits[p.index] = rows
        for place, ids, values in plan.biased:
            logits[place, ids] += values
        for place, least, ids in plan.held:
            if _position(entries[place]) < least:
                logits[place].index_fill_(0, ids, -torch.inf)
        if mask is not None:
            for place, allowed in few.items():
                ops.allow_few(logits, place, allowed)
            left = (i for i in plan.masked if i not in few and i not in free)
            places = [i for i in left if _place(entries[i]) in mask.rows]
            ops.allow_only(logits, places, [mask.rows[_place(entries[i])] for i in places])

    def _draw(
        self, logits: Tensor, group: Group, entries: Seq[Entry], few: dict[int, np.ndarray], again: bool = False
    ) -> Tensor:
        drawn = [entries[i] for i in group.places]
        counts = [-1 - _position(e) if again else _position(e) for e in drawn]
        u = sent(ops.uniforms([e.sequence.seed for e in drawn], counts), self.device)
        place = group.places[0]
        rows = logits[place : place + 1] if len(drawn) == 1 else logits[group.index]
        ids = few.get(place) if len(drawn) == 1 else None
        if ids is not None:
            rows = torch.from_numpy(logits.numpy()[place, ids])[None]
        if not group.truncated:
            tokens = ops.draw(rows, group.temperature, u)
        else:
            width = min(group.width, rows.shape[1])
            tokens = ops.draw_truncated(rows, group.temperature, group.top_k, group.top_p, group.min_p, u, width)
        return tokens if ids is None else torch.from_numpy(ids[tokens.numpy()])

    def _batches(self, places: list[int]) -> list[list[int]]:
        """How rows go through an operation: all together, on a CPU one by one, since one row of a large vocabulary
        stays in the cache there and several do not.
        """
        return [[i] for i in places] if self.device.type == "cpu" else [places] * bool(places)

    def _groups(self, params: Seq[SamplingParams]) -> tuple[Group, ...]:
        kinds: dict[tuple[bool, int], list[int]] = {}
        for i, p in enumerate(params):
            if p.temperature > 0:
                truncated = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
                kinds.setdefault((truncated, self._width(p)), []).append(i)
        return tuple(
            self._group(batch, params, *kind) for kind, places in kinds.items() for batch in self._batches(places)
        )

    def _width(self, p: SamplingParams) -> int:
        """Candidates to look at: the narrow set where top_k promises that it suffices; on a GPU else all, rather
        than wait for a flag.
        """
        narrow = min(ops.WIDTHS[0], self.vocab_size)
        if 0 < p.top_k <= narrow:
            return narrow
        return 0 if self.device.type == "cpu" else self.vocab_size

    def _group(self, places: list[int], params: Seq[SamplingParams], truncated: bool, width: int) -> Group:
        chosen = [params[i] for i in places]
        return Group(
            places=tuple(places),
            index=self._tensor(places),
            temperature=self._column([max(p.temperature, COLDEST) for p in chosen], torch.float32),
            top_k=self._column([min(p.top_k, self.vocab_size) for p in chosen], torch.int64),
            top_p=self._column([p.top_p for p in chosen], torch.float64),
            min_p=self._column([p.min_p for p in chosen], torch.float32),
            truncated=truncated,
            width=width,
        )

    def _penalties(self, sequences: Seq[Sequence], places: list[int]) -> Penalties:
        params = [sequences[i].request.params for i in places]
        repeats = any(p.repetition_penalty != 1 for p in params)
        uses = any(p.presence_penalty != 0 or p.frequency_penalty != 0 for p in params)
        return Penalties(
            places=tuple(places),
            index=self._tensor(places),
            rows=self._tensor([sequences[i].row for i in places]),
            repetition=self._column([p.repetition_penalty for p in params], torch.float32) if repeats else None,
            presence=self._column([p.presence_penalty for p in params], torch.float32),
            frequency=self._column([p.frequency_penalty for p in params], torch.float32) if uses else None,
        )

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return sent(values, self.device, dtype)

    def _column(self, values: list, dtype: torch.dtype) -> Tensor:
        return self._tensor(values, dtype)[:, None]


def penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _with_drafts(table: Tensor, drafts: Seq[tuple[int, Seq[int]]]) -> Tensor:
    """In place: rows of counts, or of what was seen, with the drafts that each of some rows takes for granted."""
    if drafts:
        rows = sent([i for i, own in drafts for _ in own], table.device)
        tokens = sent([t for _, own in drafts for t in own], table.device)
        ones = torch.ones_like(tokens, dtype=table.dtype)
        table.index_put_((rows, tokens), ones, accumulate=table.dtype != torch.bool)
    return table


def _place(entry: Entry) -> tuple[Sequence, int]:
    """How masks name it."""
    return entry.sequence, len(entry.drafts)


def _position(entry: Entry) -> int:
    """How many tokens the answer has before the one sampled by this entry, read or not."""
    return entry.start + entry.length - entry.sequence.prompt_length


def logprobs_of(
    logs: tuple[Tensor, Tensor, Tensor], tokens: Seq[int], wanted: Seq[int], asked: Seq[Seq[float]] | None = None
) -> list[Logprob]:
    """Host records; row i shows its wanted[i] best tokens, and asked[i]."""
    own, values, ids = (t.tolist() for t in logs)
    return [
        Logprob(t, o, tuple(zip(i[:k], v[:k])), tuple(a))
        for t, o, v, i, k, a in zip(tokens, own, values, ids, wanted, asked or [()] * len(own))
    ]
