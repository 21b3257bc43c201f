"""The runner: a plan in, tokens out, on whatever device the model is on.

`forward` queues a step's model and `sample` its tokens; both return at once where the device works asynchronously, and
what grammars allow is needed only by the second. `Pending.result` waits for the tokens.
Steps run in the order of their launches, and a later one may use tokens of an earlier one that nobody has read yet.
"""

import copy
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tenfold.cache.store import KVStore
from tenfold.engine.masks import Mask
from tenfold.engine.plan import Entry, StepPlan
from tenfold.engine.request import Logprob
from tenfold.engine.rows import Batch, Bucket, Rows, strides
from tenfold.engine.sampler import Sampled, SamplePlan, Sampler, logprobs_of
from tenfold.engine.sequence import Sequence
from tenfold.engine.sight import Sight
from tenfold.engine.speculate.verify import Check, accepted, draws
from tenfold.models.table import Model
from tenfold.ops import sample as ops
from tenfold.ops.host import sent


@dataclass(slots=True)
class Tokens:
    """What one step brought, by place in its plan: tokens (-1 where none was sampled), those after the first where
    drafts were right, and where asked for each token's log-probability, those of the prompt tokens that follow the
    entry's tokens, and the hidden state pooled over the entry; errors: why an entry has no result.
    """

    ids: list[int]
    more: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Logprob]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprob]] = field(default_factory=dict)
    pooled: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    def take(self, place: int, other: "Tokens") -> None:
        """The results of an entry that ran alone."""
        self.ids[place] = other.ids[0]
        self.more.update((place, tokens) for tokens in other.more.values())
        self.logprobs.update((place, records) for records in other.logprobs.values())
        self.prompt_logprobs.update((place, records) for records in other.prompt_logprobs.values())
        self.pooled.update((place, state) for state in other.pooled.values())


class Runner:
    """Owns the model, the KV store and the rows. `max_batch` rows of `max_len` tokens at most; bucket: see `Rows`.
    sight: where the model looks at pictures.
    """

    def __init__(
        self,
        model: Model,
        kv: KVStore,
        max_batch: int,
        max_len: int,
        device: torch.device,
        lookahead: int,
        bucket: Bucket = strides,
        sight: Sight | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.device = device
        self.sight = sight
        turned = sight is not None and bool(model.config.rope_sections)
        pages = -(-max_len // kv.spec.page_size)
        self.rows = Rows(max_batch, pages, kv, device, lookahead, bucket=bucket, turned=turned)
        self.sampler = Sampler(max_batch, model.config.vocab_size, device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sample_plan: SamplePlan | None = None
        self._planned_for: tuple[tuple[Sequence, int], ...] = ()

    def twin(self, model: Model, kv: KVStore | None = None, device: torch.device | None = None) -> "Runner":
        """The same rows and sampler for steps of another lane; model: the same weights, with what is the lane's own.
        kv, device: where the lane has its own.
        """
        other = copy.copy(self)
        other.kv, other.device = kv or self.kv, device or self.device
        other.model, other.rows = model, self.rows.twin(kv, device)
        other._copies = torch.cuda.Stream(other.device) if other.device.type == "cuda" else None
        other._sample_plan, other._planned_for = None, ()
        return other

    def elsewhere(self, model: Model, kv: KVStore, device: torch.device) -> "Runner":
        """The same rows for steps of a model, and over a store, on another device."""
        other = self.twin(model, kv, device)
        other.sampler = Sampler(self.sampler.max_batch, self.sampler.vocab_size, device)
        return other

    def receive(self, sequences: list[Sequence]) -> None:
        """Sequences whose steps ran elsewhere so far go on here, with the tokens that they have."""
        for sequence in sequences:
            self.sampler.admit(sequence)
        if sequences:
            rows, latest = [s.row for s in sequences], [s.tokens[-1] for s in sequences]
            self.rows.keep(sent(rows, self.device), sent(latest, self.device))

    def prepare(self, plan: StepPlan) -> None:
        """What a plan needs before its entries run: rows of new sequences, and page copies. Done once a plan."""
        for source, target in plan.rooms:
            self.kv.copy_room(source, target)
        if not (plan.admitted or plan.copies):
            return
        with torch.inference_mode():
            for sequence in plan.admitted:
                self.sampler.admit(sequence)
            if plan.copies:
                pairs = sent(plan.copies, self.device)
                self.kv.copy_pages(pairs[:, 0], pairs[:, 1])

    def forward(self, entries: tuple[Entry, ...], decodes: int) -> "Forward":
        """Run the model on entries of a prepared plan, the first `decodes` of them decodes. Raises what the model
        raises; then they may be run again, for all they have done is to write K and V where they will again.
        """
        with torch.inference_mode():
            pending = Pending(entries, self._copies)
            pooling = tuple([e for e in entries if e.sequence.request.pool is not None])
            rest = entries
            if pooling:
                rest = tuple([e for e in entries if e.sequence.request.pool is None])
                pending.pooled = self._pool(entries, pooling)
            if not rest:
                return Forward(pending)
            batch = self._gather(rest, decodes)
            return Forward(pending, batch, self.model.forward(batch.step))

    def capture(self, requests: int, pages: int) -> None:
        """Run a step of decodes that are nobody's twice: first plainly, then as kernels that record steps run what they
        have seen before. Waits for both, for the next ones write their inputs where these have theirs on the host.
        """
        with torch.inference_mode():
            for _ in range(2):
                self.model.forward(self.rows.idle(requests, pages))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _gather(self, entries: tuple[Entry, ...], decodes: int) -> Batch:
        """Inputs for these entries, pictures looked at."""
        batch = self.rows.gather(entries, decodes)
        seen = self.sight.seen(entries) if self.sight is not None else None
        return batch if seen is None else replace(batch, step=replace(batch.step, seen=seen))

    def settle(self) -> None:
        """Wait for what was launched here, of a step that failed: its pages may soon be somebody else's."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a device that fails says so in the next step, too
                torch.cuda.current_stream(self.device).synchronize()

    def begin(self, entries: tuple[Entry, ...]) -> "Slices":
        """Chunks of a prepared plan, to be run in slices of a few layers."""
        if any(e.sequence.request.pool is not None for e in entries):
            return Slices(entries, None)
        with torch.inference_mode():
            return Slices(entries, self._gather(entries, 0))

    def advance(self, slices: "Slices", layers: int) -> "Forward | None":
        """Run so many more layers; None where some are left. Chunks that are pooled run at once, and those of which all
        layers are asked for, which may have been recorded as a whole.
        """
        if slices.batch is None:
            return self.forward(slices.entries, 0)
        depth = self.model.config.layers
        with torch.inference_mode():
            end = min(slices.done + layers, depth)
            if slices.done == 0 and end == depth:
                slices.x = self.model.forward(slices.batch.step)
            else:
                slices.x = self.model.part(slices.batch.step, slices.x, range(slices.done, end))
            slices.done = end
        if end < depth:
            return None
        return Forward(Pending(slices.entries, self._copies), slices.batch, slices.x)

    def sample(self, forward: "Forward", mask: Mask | None = None) -> "Pending":
        """The tokens of a step whose model has run; mask: for its rows with a grammar. Changes what the next step
        starts from, the rows' last tokens and penalty counts, so it comes last and once.
        """
        pending, batch, logits = forward.pending, forward.batch, forward.logits
        if batch is not None and logits is not None:
            with torch.inference_mode():
                self._sample(pending, batch, logits, mask)
        pending.launched()
        return pending

    def _sample(self, pending: "Pending", batch: Batch, logits: Tensor, mask: Mask | None) -> None:
        drafted = any(e.drafts for e in batch.sampled)
        drawn = draws(batch.sampled) if drafted else batch.sampled
        if batch.picks is not None:
            pending.prompt_logs = self._prompt_logs(batch, logits)
            logits = logits[batch.picks]
        else:
            logits = logits[: len(drawn)]  # a padded step has more
        if batch.sampled:
            check = Check(batch.sampled, self.device) if drafted else None
            plan = self._plan_sampling(drawn)
            sampled = self.sampler.run(logits, plan, drawn, mask, check)
            self.rows.keep(batch.rows, sampled.last)
            pending.take(batch.sampled, drawn, plan, sampled)

    def _plan_sampling(self, entries: tuple[Entry, ...]) -> SamplePlan:
        """The sampler's plan for these sequences, in this order and these rows, kept until they change."""
        places = tuple([(e.sequence, e.row) for e in entries])
        if self._sample_plan is None or places != self._planned_for:
            self._sample_plan = self.sampler.plan([e.sequence for e in entries])
            self._planned_for = places
        return self._sample_plan

    def _prompt_logs(
        self, batch: Batch, logits: Tensor
    ) -> list[tuple[Entry, tuple[Tensor, Tensor, Tensor], list[int]]]:
        """Log-probabilities of the prompt tokens after each token of the entries that want them."""
        found, start = [], 0
        for entry in batch.entries:
            sequence = entry.sequence
            if not sequence.want_prompt_logprobs:
                start += 1 + len(entry.drafts) if entry.sample else 0
                continue
            following = sequence.tokens[entry.start + 1 : min(entry.start + entry.length + 1, sequence.prompt_length)]
            ids = sent(following, self.device, torch.int64)
            best = sequence.request.params.prompt_logprobs or 0
            found.append((entry, ops.log_probabilities(logits[start : start + len(following)], ids, best), following))
            start += entry.length
        return found

    def _pool(self, plan_entries: tuple[Entry, ...], entries: tuple[Entry, ...]) -> dict[int, Tensor]:
        """Sum of the hidden states over each entry, or the last one, as its request asks; float32 [hidden_size]
        each.
        """
        hidden = self.model.hidden(self._gather(entries, 0).step).float()
        parts = hidden.split([e.length for e in entries])
        pooled = {
            id(e): part.sum(0) if e.sequence.request.pool == "mean" else part[-1].clone()
            for e, part in zip(entries, parts)
        }
        return {i: pooled[id(e)] for i, e in enumerate(plan_entries) if id(e) in pooled}


@dataclass(slots=True, eq=False)
class Slices:
    """A forward of chunks of which the first `done` layers have run; x: what they gave."""

    entries: tuple[Entry, ...]
    batch: Batch | None
    x: Tensor | None = None
    done: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A step whose model was launched. batch and logits: of its entries that do not pool, None where all do."""

    pending: "Pending"
    batch: Batch | None = None
    logits: Tensor | None = None


class Pending:
    """A launched step. `result()` waits for the device, once."""

    def __init__(self, entries: tuple[Entry, ...], copies: "torch.cuda.Stream | None") -> None:
        """copies: the stream on which tokens go to the host, None on a CPU."""
        self.entries = entries
        self.pooled: dict[int, Tensor] = {}
        self.prompt_logs: list[tuple[Entry, tuple[Tensor, Tensor, Tensor], list[int]]] = []
        self._copies = copies
        self._sampled: tuple[Entry, ...] = ()
        self._drawn: tuple[Entry, ...] = ()
        self._plan: SamplePlan | None = None
        self._result: Sampled | None = None
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def take(self, sampled: tuple[Entry, ...], drawn: tuple[Entry, ...], plan: SamplePlan, result: Sampled) -> None:
        """Start the way of the tokens to the host."""
        self._sampled, self._drawn, self._plan, self._result = sampled, drawn, plan, result
        self._host = result.tokens
        if self._copies is not None:
            self._host = torch.empty(result.tokens.shape, dtype=torch.int64, pin_memory=True)
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):  # the next step does not wait for this copy
                self._host.copy_(result.tokens, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
            result.tokens.record_stream(self._copies)

    def launched(self) -> None:
        """All of the step is: `result` waits for it though it may bring no token, for steps on other streams may go on
        from its keys and values, and what was asked of its prompts is on the device still.
        """
        if self._copies is not None and self._event is None:
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """For the device. Raises what went wrong there."""
        if self._event is not None:
            self._event.synchronize()

    def result(self) -> Tokens:
        self.wait()
        ids = self._host.tolist() if self._host is not None else []
        if self._drawn is self.entries and self._plan is not None and not self._plan.logprobs:
            return Tokens(ids)
        return self._spread(ids)

    def _spread(self, ids: list[int]) -> Tokens:
        """Results by place in the plan, where not every entry has one token or something else was asked for."""
        place = {e.sequence: i for i, e in enumerate(self.entries)}
        tokens = Tokens([-1] * len(self.entries), pooled=self.pooled)
        records = self._records(ids)
        start = 0
        for entry in self._sampled:
            own, first = place[entry.sequence], start
            tokens.ids[own] = ids[first]
            end = first + 1 + accepted(entry.drafts, ids[first : first + len(entry.drafts)])
            if entry.drafts:
                tokens.more[own] = ids[first + 1 : end]
            if first in records:
                tokens.logprobs[own] = [records[i] for i in range(first, end)]
            start += 1 + len(entry.drafts)
        for entry, logs, following in self.prompt_logs:
            best = entry.sequence.request.params.prompt_logprobs or 0
            tokens.prompt_logprobs[place[entry.sequence]] = logprobs_of(logs, following, [best] * len(following))
        return tokens

    def _records(self, ids: list[int]) -> dict[int, Logprob]:
        """Log-probabilities by place among the draws."""
        if self._plan is None or self._result is None or self._result.logs is None:
            return {}
        places = self._plan.logprobs
        params = [self._drawn[i].sequence.request.params for i in places]
        asked = None if self._result.asked is None else self._result.asked.tolist()
        if asked is not None:
            asked = [row[: len(p.logprob_token_ids)] for row, p in zip(asked, params)]
        own = [ids[i] for i in places]
        return dict(zip(places, logprobs_of(self._result.logs, own, [p.logprobs or 0 for p in params], asked)))
