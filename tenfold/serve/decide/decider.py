"""`Decider`: cases in, probabilities out, by one language model; all prompts of a request run as one job.

Invariant: priors are shared only between requests that may share cached prefixes (the same salt).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from tenfold.engine.request import SamplingParams
from tenfold.serve.decide import calibrate
from tenfold.serve.decide.ask import Sheet, reads
from tenfold.serve.decide.labels import Labels
from tenfold.serve.decide.question import Manner, Order, Question, orders
from tenfold.serve.errors import invalid
from tenfold.serve.protocol.body import Terms
from tenfold.serve.reply import check_prompt
from tenfold.serve.service import Counts, Job, Served, answers

PRIORS_KEPT = 2048
LEAD = 64  # tokens from which a first prompt runs ahead, so that the others find its beginning in the cache

Key = tuple[str, Question, Order]  # salt, and what was asked
Logs = list[float]


@dataclass(frozen=True, slots=True)
class Case:
    """One question about one input."""

    given: str
    question: Question


@dataclass(slots=True)
class Plan:
    """Prompts, and which of them belong to what. seen: a case's sheets in its orders; free: those of priors to
    learn; known: priors that need none."""

    prompts: list[list[int]]
    seen: list[list[tuple[Sheet, slice]]]
    free: dict[Key, list[tuple[Sheet, slice]]]
    known: dict[Key, Logs]


class Decider:
    """Of one model. temperature: what all its answers are scaled by, fitted on labelled examples."""

    def __init__(self, served: Served, temperature: float = 1.0) -> None:
        self.served = served
        self.temperature = temperature
        self._labels: Labels | None = None
        self._priors: OrderedDict[Key, Logs] = OrderedDict()

    async def decide(
        self, http: HttpRequest, cases: Sequence[Case], manner: Manner, terms: Terms, prefix: str
    ) -> tuple[list[list[float]], Counts]:
        """Of each case the probability of every option, in their order. Raises ApiError."""
        self._check_reads(cases, manner)
        salt = f"{http.scope['state']['salt']}:{terms.cache_salt}"
        labels, plan = await asyncio.to_thread(self._plan, cases, manner, salt)
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=labels.ids)
        lead = len(plan.prompts[0]) >= LEAD
        job = Job.of(http, self.served, prefix, plan.prompts, params, terms, lead=lead)
        counts = Counts(sum(map(len, job.prompts)))
        asked: list[Sequence[float]] = [()] * len(job.prompts)
        async with aclosing(answers(job, counts)) as outputs:
            async for i, output in outputs:
                asked[i] = output.logprobs[0].asked
        return self._answers(labels, plan, asked, cases, manner, salt), counts

    def _check_reads(self, cases: Sequence[Case], manner: Manner) -> None:
        needed = sum(len(orders(case.question, manner.orders)) * reads(case.question) for case in cases)
        most = self.served.settings.max_decision_reads
        if needed > most:
            raise invalid(
                f"These questions take {needed} prompts; allowed: up to {most} in one request (--max-decision-reads). "
                "Ask fewer questions, give fewer options, or set orders to 1."
            )

    def _plan(self, cases: Sequence[Case], manner: Manner, salt: str) -> tuple[Labels, Plan]:
        """Blocking: renders and encodes. Raises ApiError (400)."""
        labels = self._labels
        try:
            if labels is None:
                labels = self._labels = Labels.of(self.served.llm.token_bytes, self.served.llm.vocab_size)
        except ValueError as error:
            raise invalid(str(error), "model") from None
        plan = Plan([], [], {}, {})
        for case in cases:
            sheets = [Sheet.of(case.question, order, labels) for order in orders(case.question, manner.orders)]
            plan.seen.append([(sheet, self._add(plan, sheet, case.given, labels)) for sheet in sheets])
        if manner.prior:
            self._plan_priors(plan, salt, labels)
        return labels, plan

    def _plan_priors(self, plan: Plan, salt: str, labels: Labels) -> None:
        for sheets in plan.seen:
            for sheet, _ in sheets:
                key = (salt, sheet.question, sheet.order)
                known = self._priors.get(key)
                if known is not None:
                    plan.known[key] = known
                elif key not in plan.free:
                    free = calibrate.CONTENT_FREE
                    plan.free[key] = [(sheet, self._add(plan, sheet, text, labels)) for text in free]

    def _add(self, plan: Plan, sheet: Sheet, given: str, labels: Labels) -> slice:
        start = len(plan.prompts)
        plan.prompts += sheet.prompts(given, self._render, labels)
        for prompt in plan.prompts[start:]:
            check_prompt(prompt, self.served, "input")
        return slice(start, len(plan.prompts))

    def _render(self, text: str) -> list[int]:
        try:
            return self.served.llm.chat_prompt([{"role": "user", "content": text}], enable_thinking=False)
        except ValueError as error:
            raise invalid(str(error), "input") from None

    def _answers(
        self,
        labels: Labels,
        plan: Plan,
        asked: Sequence[Sequence[float]],
        cases: Sequence[Case],
        manner: Manner,
        salt: str,
    ) -> list[list[float]]:
        learnt = {
            key: calibrate.prior([sheet.read(asked[span], labels) for sheet, span in sheets])
            for key, sheets in plan.free.items()
        }
        priors_of = plan.known | learnt
        temperature = self.temperature if manner.temperature is None else manner.temperature
        told = []
        for sheets in plan.seen:
            seen = [sheet.read(asked[span], labels) for sheet, span in sheets]
            keys = [(salt, sheet.question, sheet.order) for sheet, _ in sheets]
            priors = [priors_of[key] for key in keys] if manner.prior else None
            told.append(calibrate.probabilities(seen, priors, temperature))
        self._keep(learnt)
        return told

    def _keep(self, learnt: dict[Key, Logs]) -> None:
        self._priors.update(learnt)
        while len(self._priors) > PRIORS_KEPT:
            self._priors.popitem(last=False)
