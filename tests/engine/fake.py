"""A model whose next token is a hash of everything before it, read back through the KV cache.

Wrong pages, leaks, a bad copy-on-write or a page shared too early change what it reads, and so its tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, pairwise, zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.phases.controller import Decision, Observed, Split, Targets
from tenfold.engine.phases.lanes import OneStream
from tenfold.engine.phases.loop import Phases
from tenfold.engine.plan import StepPlan
from tenfold.engine.request import Output, Request
from tenfold.engine.sequence import Sequence as Answer
from tenfold.engine.speculate.draft import DraftModel
from tenfold.engine.speculate.guess import Guess
from tenfold.engine.speculate.policy import Load, Offer, Policy
from tenfold.engine.speculate.speculator import Speculator
from tenfold.nn.step import Step
from tenfold.ops.kernels import Separate
from tenfold.ops.kv.layer import PackedLayer, ring_pages, room_page, room_pages

VOCAB = 97
EOS = 3
POISON = -1.0


def next_token(history: Sequence[int]) -> int:
    value = 17
    for position, token in enumerate(history):
        value = (value * 48271 + token * (position + 7) * 7919 + 11) % 2147483647
    return value % VOCAB


def reference(prompt: Sequence[int], limit: int, stops: Sequence[int] = (EOS,)) -> list[int]:
    """What a request for `prompt` must be answered with, up to a sequence of `limit` tokens."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class FakeModel:
    """Writes each token at its slot; answers from what the page table leads to. Checks every field of the step it is
    given.
    """

    def __init__(self, max_positions: int = 4096) -> None:
        """Of two layers, the second of which is packed where the cache packs."""
        self.config: Any = SimpleNamespace(
            layers=2, kv_heads=1, head_dim=16, vocab_size=VOCAB, max_positions=max_positions, hidden_size=2,
            windows=(1, 0),
            experts=None,
            latent=None,
        )  # fmt: skip
        self.fail_on: int | None = None  # a token that makes the whole step fail
        self.steps: list[list[int]] = []  # tokens of each request of each step

    def forward(self, step: Step) -> Tensor:
        histories = self._run(step)
        logits = torch.zeros(len(step.logits_rows), VOCAB)
        for i, row in enumerate(step.logits_rows.tolist()):
            logits[i, next_token(histories[row])] = 9.0
        return logits

    def part(self, step: Step, x: Tensor | None, layers: range) -> Tensor:
        """Computes with the last layer, so that whoever overwrites its inputs or pages before is found out."""
        assert (x is None) == (layers.start == 0)
        return self.forward(step) if layers.stop == self.config.layers else torch.zeros(1)

    def hidden(self, step: Step) -> Tensor:
        """[own token, length of the history]."""
        return torch.tensor([[float(h[-1]), float(len(h))] for h in self._run(step)])

    def _run(self, step: Step) -> list[list[int]]:
        """The history of each token, itself included."""
        self._check(step)
        if self.fail_on is not None and self.fail_on in step.token_ids.tolist():
            raise RuntimeError(f"token {self.fail_on} is not digestible")
        keys, size = step.kv.keys[0], step.kv.spec.page_size
        own = step.slots >= 0  # others are of idle requests
        slots = step.slots[own].long()
        keys[slots // size, 0, slots % size, 0] = step.token_ids[own].float()
        histories = []
        starts = step.query_start.tolist()
        self.steps.append([b - a for a, b in pairwise(starts)])
        for r, length in enumerate(step.kv_lengths.tolist()):
            pages = step.page_table[r, : -(-length // size)].long()
            history = keys[pages, 0, :, 0].reshape(-1)[:length].to(torch.int64).tolist()
            for i in range(starts[r + 1] - starts[r]):
                histories.append(history[: length - (starts[r + 1] - starts[r]) + i + 1])
        if step.rooms is not None:
            self._enter_rooms(step, histories)
        return histories

    def _enter_rooms(self, step: Step, histories: list[list[int]]) -> None:
        """New tokens go to their rooms; what a query sees exact must be there already, or come with it."""
        layer, size = step.kv.layers[1], step.kv.spec.page_size
        assert isinstance(layer, PackedLayer)
        assert layer.exact_keys is not None
        assert step.rooms is not None
        spec, starts = layer.spec, step.query_start.tolist()
        pages = room_pages(spec, size)
        room_tokens = layer.exact_keys[:, 0, :, 0].view(-1, pages * size)
        last: dict[int, list[int]] = {}
        for r, room in enumerate(step.rooms.tolist()):
            if not histories[starts[r]]:
                continue  # nobody's
            begin = starts[r + 1] - starts[r]
            history = max(last.get(room, []), histories[starts[r + 1] - 1], key=len)
            length = len(histories[starts[r + 1] - 1])
            places = torch.arange(length)
            at = room_page(spec, size, places) * size + places % size
            old = length - begin if room not in last else 0
            seen = [p for p in range(old) if p < spec.sinks or p > old - spec.window]
            assert room_tokens[room, at[seen]].tolist() == [history[p] for p in seen], "a room lacks what it must show"
            ring = ring_pages(spec, size) * size
            new = [p for p in range(old, length) if p < spec.sinks or p >= length - ring]
            room_tokens[room, at[new]] = torch.tensor([float(history[p]) for p in new])
            last[room] = history

    def _check(self, step: Step) -> None:
        starts, size = step.query_start.tolist(), step.kv.spec.page_size
        assert starts[0] == 0
        assert starts[-1] == len(step.token_ids) == len(step.positions) == len(step.slots)
        written = [slot for slot in step.slots.tolist() if slot >= 0]
        assert len(set(written)) == len(written), "two tokens of a step go to one slot"
        counts = [b - a for a, b in pairwise(starts)]
        assert min(counts) > 0
        assert step.max_query == max(counts)
        assert step.max_kv == int(step.kv_lengths.max())
        tensors = (
            step.token_ids,
            step.positions,
            step.slots,
            step.page_table,
            step.query_start,
            step.kv_lengths,
            step.logits_rows,
        )
        assert (step.rooms is not None) == bool(step.kv.rooms)
        assert [t.dtype for t in tensors] == [torch.int64] + [torch.int32] * 5 + [torch.int64]
        assert all(t.is_contiguous() for t in tensors)
        for r, length in enumerate(step.kv_lengths.tolist()):
            positions = step.positions[starts[r] : starts[r + 1]].tolist()
            if not length:  # idle
                assert (positions, step.slots[starts[r]].item()) == ([0], -1)
                continue
            assert positions == list(range(length - counts[r], length))
            pages = step.page_table[r].tolist()
            assert step.slots[starts[r] : starts[r + 1]].tolist() == [
                pages[p // size] * size + p % size for p in positions
            ]


def near_miss(history: Sequence[int]) -> int:
    """Mostly `next_token`, after one history in four another."""
    token = next_token(history)
    return token if sum(history) % 4 else (token + 1) % VOCAB


class FakeDraft(FakeModel):
    """A draft model that is mostly right; says what it says by what it reads in its own store."""

    def forward(self, step: Step) -> Tensor:
        histories = self._run(step)
        logits = torch.zeros(len(step.logits_rows), VOCAB)
        for i, row in enumerate(step.logits_rows.tolist()):
            logits[i, near_miss(histories[row])] = 9.0
        return logits


class Guesses:
    """A drafter that asks `next` for the token after a history, as often as it likes."""

    classes = 1
    watches = False

    def __init__(self, next: Callable[[list[int]], int] = near_miss) -> None:
        self.next = next
        self.right: list[int] = []

    def offer(self, sequence: Answer, guess: Guess, most: int) -> int:
        return most

    def draft(self, wanted: Mapping[Answer, int]) -> dict[Answer, tuple[int, ...]]:
        for sequence, count in wanted.items():
            history = list(sequence.tokens)
            for _ in range(count):
                history.append(self.next(history))
            sequence.guess.propose(len(sequence.tokens), tuple(history[len(sequence.tokens) :]))
        return {sequence: sequence.guess.tokens for sequence in wanted}

    def read(self, sequence: Answer, guess: Guess, right: int) -> None:
        self.right.append(right)


class Whim(Policy):
    """Any number of drafts, zero and all included, the same in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def choose(self, offers: Sequence[Offer], load: Load, most: int) -> list[int]:
        self.turn += 1
        counts = []
        for i, offer in enumerate(offers):
            counts.append(min((self.turn * 7 + i * 3) % (offer.length + 2) % (offer.length + 1), most - sum(counts)))
        return counts


class All(Policy):
    """As many drafts as there are."""

    def choose(self, offers: Sequence[Offer], load: Load, most: int) -> list[int]:
        return [offer.length for offer in offers]


def speculating(engine: Engine, drafter: Any = None, policy: Policy | None = None, most: int = 4) -> Engine:
    """The same engine with this drafter, or with its own under another policy."""
    if drafter is not None:
        engine.speculator = Speculator(drafter, most, policy or Whim())
    else:
        assert engine.speculator is not None
        engine.speculator.policy = policy or Whim()
    return engine


def watch_drafts(engine: Engine, says: Callable[[list[int]], int] = near_miss) -> None:
    """From now on check that every draft is what the drafter `says` to the true history, so that a draft model reads
    nothing else in its store, and that no plan is larger or earlier than it may be.
    """
    plan = engine.scheduler.plan
    if isinstance(engine.speculator and engine.speculator.drafter, DraftModel):
        for tensor in (*engine.speculator.drafter.kv.keys, *engine.speculator.drafter.kv.values):  # type: ignore
            tensor.fill_(POISON)

    def watched(drafts: Mapping[Answer, tuple[int, ...]] | None = None) -> StepPlan:
        made = plan(drafts)
        for entry in made.entries:
            history = list(entry.sequence.tokens)
            for draft in entry.drafts:
                assert draft == says(history)
                history.append(draft)
        assert made.tokens <= engine.config.max_step_tokens
        assert not made.drafts or not engine._inflight
        return made

    engine.scheduler.plan = watched  # type: ignore[method-assign]


class FakeText:
    """A text layer: token t is the character chr(t + 32); stop strings of one character."""

    def detokenizer(self, request: Request) -> "FakeDetokenizer":
        return FakeDetokenizer(request)


class FakeDetokenizer:
    def __init__(self, request: Request) -> None:
        self.stop = request.params.stop
        self.held = ""

    def feed(self, token: int) -> tuple[str, str | None]:
        """Each character comes one token late."""
        text, self.held = self.held, chr(token + 32)
        if self.held in self.stop:
            found, self.held = self.held, ""
            return text, found
        return text, None

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def settings(**changes: Any) -> EngineConfig:
    """Resolved settings of a small engine."""
    values: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "kv_dtype": "float32",
        "page_size": 4,
        "max_batch": 4,
        "max_step_tokens": 16,
        "lookahead": 0,
        "max_model_len": 64,
    }
    return EngineConfig(**(values | changes))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(
    model: Any = None,
    pages: int = 64,
    text: Any = None,
    clock: Clock | None = None,
    draft: Any = None,
    **changes: Any,
) -> Engine:
    """An engine over the fake model, its KV cache full of POISON."""
    kernels: Any = Separate()
    engine = Engine(
        model or FakeModel(),
        kernels,
        settings(**changes),
        text,
        pages=pages,
        eos_ids=(EOS,),
        clock=clock or Clock(),
        draft=draft,
    )
    for tensor in (*engine.kv.keys, *engine.kv.values):
        tensor.fill_(POISON)
    for layer in engine.kv.layers:
        if isinstance(layer, PackedLayer) and layer.exact_keys is not None:
            layer.exact_keys.fill_(POISON)
    prepare = engine.runner.prepare

    def checked(plan: StepPlan) -> None:
        sources, targets = {s for s, _ in plan.copies}, [t for _, t in plan.copies]
        assert not sources & set(targets), "a page is copied that is itself being made"
        assert len(set(targets)) == len(targets)
        prepare(plan)

    engine.runner.prepare = checked  # type: ignore[method-assign]
    return engine


def check_pages(engine: Engine) -> None:
    """Every reference is held by a sequence, and what may be written belongs to one sequence alone."""
    scheduler, pool = engine.scheduler, engine.pool
    held: dict[int, int] = {}
    for pages in scheduler.held_pages():
        assert len(set(pages)) == len(pages)
        for page in pages:
            held[page] = held.get(page, 0) + 1
    pool.check(held)
    for sequence in [*scheduler.decoding, *scheduler.prefilling]:
        index = sequence.computed // engine.config.page_size
        assert all(pool.references[p] == 1 for p in sequence.pages[index:]), "a page to be written has another owner"
    flying = [plan for plan, _ in engine._inflight]
    if engine.phases is not None and engine.phases.underway is not None:
        flying.append(engine.phases.underway.plan)
        beside = {id(e.sequence) for plan in flying[:-1] for e in plan.entries}
        assert not beside & {id(e.sequence) for e in flying[-1].entries}, "a sequence is in both lanes"
    for plan in flying:
        for entry in plan.entries:
            assert entry.sequence.row == entry.row, "a row was given away though a step in flight uses it"
            assert len(entry.sequence.pages) * engine.config.page_size >= entry.start + entry.length
    assert pool.free + pool.used + pool.idle == pool.total
    rows = [s.row for s in [*scheduler.decoding, *scheduler.prefilling, *scheduler._leaving]]
    assert len(set(rows)) == len(rows)
    assert not set(rows) & set(scheduler._free_rows)
    assert len(rows) + len(scheduler._free_rows) == scheduler.limits.rows
    if scheduler.rooms is not None:
        scheduler.rooms.check(scheduler.held_rooms())


def drain(engine: Engine, most: int = 10_000) -> list[Output]:
    """Step until nothing is left to do, checking the pages after every step."""
    outputs: list[Output] = []
    for _ in range(most):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
        check_pages(engine)
    raise AssertionError(f"still at work after {most} steps: {engine.stats()}")


def check_lives(
    engine: Engine,
    requests: Sequence[Request],
    wanted: Sequence[list[int]],
    pauses: Sequence[int] = (),
    aborts: Sequence[int | None] = (),
) -> None:
    """Requests come one after the other, and each gets the answer that is wanted, or its beginning where it is aborted.
    pauses: steps after each; aborts: which request is aborted then, if it has come and has not ended.
    """
    outputs: list[Output] = []
    aborted = set()
    for request, steps, victim in zip_longest(requests, pauses[: len(requests)], aborts[: len(requests)]):
        engine.add(request)
        for _ in range(steps or 0):
            outputs += engine.step()
        if victim is not None and engine.abort(requests[victim % len(requests)].id):
            aborted.add(requests[victim % len(requests)].id)
    got = answers(outputs + drain(engine))
    whole = {(r.id, k): tokens for r, tokens in zip(requests, wanted) for k in range(r.params.n)}
    assert got == {key: tokens[: len(got[key])] if key[0] in aborted else tokens for key, tokens in whole.items()}
    assert engine.pool.used == 0


class Flips:
    """A controller that changes its mind at every decision: prompts have a lane, or ride in steps of decodes."""

    targets = Targets(1.0, 0.1)

    def __init__(self, chunks: Iterable[int] = (0, 5, 0, 0, 16, 1, 1)) -> None:
        self.chunks = cycle(chunks)

    def decide(self, seen: Observed, now: Split) -> Decision:
        return Decision(now, "a whim", next(self.chunks))


def flipping(engine: Engine) -> Engine:
    engine.phases = Phases(engine, OneStream(engine.runner), Flips(), slice=1, tick=0.0)
    return engine


def answers(outputs: Sequence[Output]) -> dict[tuple[str, int], list[int]]:
    """Tokens of each sequence; each must have come to an end exactly once."""
    tokens: dict[tuple[str, int], list[int]] = {}
    ended = set()
    for output in outputs:
        key = (output.request_id, output.index)
        assert key not in ended, f"{key} goes on after its end"
        tokens.setdefault(key, []).extend(output.tokens)
        if output.finish is not None:
            ended.add(key)
    assert ended == set(tokens)
    return tokens
