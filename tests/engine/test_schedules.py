"""Random lives of requests against a reference: whatever arrives, is aborted, expires, fails, is preempted or guessed
ahead, each answer is the one its prompt must get, and after every step every page has its owners and no other.
"""

import logging
from typing import Any

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tenfold.engine.phases.lanes import OneStream
from tenfold.engine.phases.loop import Phases
from tenfold.engine.request import FinishReason, Output, Request, SamplingParams
from tests.engine.fake import (
    EOS,
    VOCAB,
    Clock,
    FakeDraft,
    FakeModel,
    Guesses,
    check_pages,
    flipping,
    make_engine,
    reference,
    speculating,
    watch_drafts,
)

BAD = VOCAB - 1  # a step with this token fails
BASE = [(7 * i + i * i) % BAD for i in range(40)]  # many prompts begin alike


class Schedules(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(8, 30),
        page_size=st.sampled_from([1, 2, 4, 5]),
        max_batch=st.integers(1, 6),
        max_step_tokens=st.integers(1, 20),
        lookahead=st.integers(0, 1),
        prefix_cache=st.booleans(),
        overtake=st.sampled_from([0.0, 0.5, 4.0]),
        speculate=st.sampled_from(["", "guesses", "a draft model"]),
        apart=st.booleans(),
        kv_cache=st.sampled_from(["auto", "fp8", "k2v2g16w6s1", "k2v2g16w40s0"]),
        lanes=st.sampled_from(["", "prompts have a lane", "now and then"]),
    )
    def start(self, pages: int, page_size: int, speculate: str, apart: bool, lanes: str, **sizes: Any) -> None:
        speculate = "" if lanes else speculate
        logging.getLogger("tenfold").setLevel(logging.ERROR)  # steps that fail are part of the plan
        self.clock = Clock()
        self.model = FakeModel()
        self.model.fail_on = BAD
        sizes |= {"page_size": page_size, "max_model_len": 48}
        if speculate:
            sizes |= {"speculate": "ngram"}
        if speculate == "a draft model":
            sizes |= {"speculate": "small", "draft": FakeDraft()}
        self.engine = make_engine(self.model, pages, clock=self.clock, **sizes)
        if speculate:
            speculating(self.engine, Guesses() if speculate == "guesses" else None)
            watch_drafts(self.engine)
            self.engine.runner.rows.apart = apart
        if lanes == "now and then":
            flipping(self.engine)
        elif lanes:
            self.engine.phases = Phases(self.engine, OneStream(self.engine.runner), slice=1)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[tuple[str, int], list[Output]] = {}
        self.ended: set[str] = set()  # aborted or late

    @rule(
        shared=st.integers(0, 30),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        max_tokens=st.one_of(st.none(), st.integers(1, 12)),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        user=st.sampled_from(["", "a", "b"]),
        salt=st.sampled_from(["", "", "s"]),
        wait=st.one_of(st.none(), st.integers(1, 20)),
        stop=st.lists(st.integers(0, VOCAB - 1), max_size=4),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        pool=st.sampled_from([None, None, None, None, "mean", "last"]),
    )
    def arrive(
        self, shared: int, own: list[int], wait: int | None, stop: list[int], pool: str | None, **rest: Any
    ) -> None:
        prompt = tuple(BASE[:shared] + own)[: self.engine.max_model_len - 1]
        params = SamplingParams(
            temperature=0.0,
            stop_token_ids=tuple(stop),
            max_tokens=rest["max_tokens"],
            n=1 if pool else rest["n"],
            prompt_logprobs=None if pool else rest["prompt_logprobs"],
        )
        deadline = None if wait is None else self.clock.now + wait
        name = str(len(self.requests))
        request = Request(
            name,
            prompt,
            params,
            rest["priority"],
            rest["user"],
            rest["salt"],
            deadline,
            pool,
            float(len(self.requests)),
        )
        self.engine.add(request)
        self.requests[name] = request

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.now += 1
            for output in self.engine.step():
                self.receive(output)
            check_pages(self.engine)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if self.engine.abort(name):
            self.ended.add(name)

    @invariant()
    def pages_have_their_owners(self) -> None:
        if hasattr(self, "engine"):
            check_pages(self.engine)

    def receive(self, output: Output) -> None:
        sofar = self.outputs.setdefault((output.request_id, output.index), [])
        assert not sofar or sofar[-1].finish is None, "an answer goes on after its end"
        sofar.append(output)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        stats = self.engine.stats()
        note(str(stats))
        assert stats.accepted_tokens <= stats.drafted_tokens
        assert not self.engine.has_work, "not all requests end"
        assert stats.pages_used == 0
        assert stats.pages_free + stats.pages_cached == stats.pages
        assert set(self.outputs) == {(r.id, i) for r in self.requests.values() for i in range(r.params.n)}
        for (name, _), outputs in self.outputs.items():
            self.check_answer(self.requests[name], outputs)

    def check_answer(self, request: Request, outputs: list[Output]) -> None:
        tokens = [t for output in outputs for t in output.tokens]
        last = outputs[-1]
        limit = self.engine.max_model_len
        if request.params.max_tokens is not None:
            limit = min(limit, len(request.prompt) + request.params.max_tokens)
        stops = {EOS, *request.params.stop_token_ids}
        answer = reference(request.prompt, limit, tuple(stops))
        if last.finish is FinishReason.ABORT:
            assert request.id in self.ended or (request.deadline is not None and request.deadline <= self.clock.now)
            assert tokens == answer[: len(tokens)]
        elif last.finish is FinishReason.ERROR:
            assert BAD in [*request.prompt, *tokens]
            assert tokens == answer[: len(tokens)]
            assert "not digestible" in (last.error or "")
        elif request.pool is not None:
            self.check_pooled(request, last)
        else:
            assert tokens == answer
            assert BAD not in [*request.prompt, *tokens[:-1]]
            assert last.finish is (FinishReason.STOP if tokens[-1] in stops else FinishReason.LENGTH)

    def check_pooled(self, request: Request, output: Output) -> None:
        count = len(request.prompt)
        expected = [float(request.prompt[-1]), float(count)]
        if request.pool == "mean":
            expected = [sum(request.prompt) / count, (count + 1) / 2]
        assert output.embedding is not None
        assert all(abs(a - b) < 1e-4 for a, b in zip(output.embedding, expected, strict=True))


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
