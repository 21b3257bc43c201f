"""`Service`: what the routes of one server share, and `answers`, through which every route asks an engine.

Invariant: whatever goes wrong in an engine leaves `answers` as an ApiError, no engine work outlives the iteration, and
every request is observed from its beginning to its one end.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest

import tenfold
from tenfold.engine.llm import AsyncLLM
from tenfold.engine.loop import EngineDead, EngineRestarted
from tenfold.engine.request import FinishReason, Output, Pictured, QueueFull, SamplingParams
from tenfold.serve.errors import ApiError, engine_dead, from_value_error, internal_error, logger, overloaded
from tenfold.serve.lane import Lane
from tenfold.serve.limits import Ticket
from tenfold.serve.logs import note_tokens
from tenfold.serve.metrics import Metrics
from tenfold.serve.observe import Seen
from tenfold.serve.protocol.body import Terms
from tenfold.serve.protocol.models import ModelCard
from tenfold.serve.settings import ServeConfig

if TYPE_CHECKING:  # classifiers are asked through the service, and may ask it in turn
    from tenfold.serve.decide.classify import Classifier

WIDTH = 64  # prompts of one job that the engine has at a time; more would fill its queue for everybody
DEFAULT_NAME = "default"  # always understood, so that a first try needs no look at /v1/models


@dataclass(slots=True)
class Served:
    """One model under its name."""

    name: str
    llm: AsyncLLM
    settings: ServeConfig
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    manner: Any = None  # how its model writes: see `turn.manner_of`, which finds out once

    def __post_init__(self) -> None:
        described = f"{tenfold.__version__} {self.name} {getattr(self.llm, 'config', '')}"
        self.fingerprint = "fp_" + hashlib.sha256(described.encode()).hexdigest()[:12]

    def card(self) -> ModelCard:
        reads = ["text", "image"] if getattr(self.llm, "sees", False) else ["text"]
        return ModelCard(
            id=self.name, created=self.created, max_model_len=self.llm.max_model_len, input_modalities=reads
        )


class Service:
    """The models of one server, the first of which is the default, and what all requests share."""

    def __init__(
        self,
        models: Mapping[str, AsyncLLM],
        settings: ServeConfig,
        classifiers: "Mapping[str, Classifier] | None" = None,
    ) -> None:
        self.settings = settings
        self.models = {name: Served(name, llm, settings) for name, llm in models.items()}
        self.classifiers: dict[str, Classifier] = dict(classifiers or {})  # models made for /v1/classify, by name
        self.open_requests = 0  # let in by the guard and not answered to the end; those that only look are not counted
        self.draining = False  # no new work is taken
        self.stopping = False  # and that is for good
        self.metrics = Metrics(self.models, settings, lambda: self.draining, self.classifiers)

    def served(self, name: str) -> Served:
        """The model of that name. Raises ApiError (404)."""
        if name in self.models:
            return self.models[name]
        if name == DEFAULT_NAME:
            return next(iter(self.models.values()))
        if name in self.classifiers:
            message = f"The model {name!r} is a classifier; it answers /v1/classify and /v1/decisions only."
            raise ApiError(404, message, param="model", code="model_not_found")
        known = ", ".join(repr(known) for known in (*self.models, *self.classifiers))
        message = f"The model {name[:128]!r} is not served here; there is {known}."
        raise ApiError(404, message, param="model", code="model_not_found")

    def cards(self) -> dict[str, ModelCard]:
        """What /v1/models tells of every model and classifier."""
        found = {name: served.card() for name, served in self.models.items()}
        for name, own in self.classifiers.items():
            created, longest = getattr(own, "created", 0), getattr(own, "max_tokens", None)
            reads = [*getattr(own, "modalities", ("text",))]
            found[name] = ModelCard(id=name, created=created, max_model_len=longest, input_modalities=reads)
        return found


def service_of(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


@dataclass(frozen=True, slots=True)
class Job:
    """What a route asks of an engine: `params.n` answers to each prompt. Choice number = prompt * n + answer.

    key: name of the API key it came with. payer: whose share of the machine it counts against. pool: as in Request.
    ticket: by which it counts against the limits of its key. lead: the first prompt is computed before the others,
    which find their common beginning in the prefix cache. lane: the short way for outputs that only have to be written,
    where there is one prompt and an answer that is streamed.
    """

    id: str
    served: Served
    metrics: Metrics
    prompts: tuple[tuple[int, ...] | Pictured, ...]
    params: SamplingParams
    priority: int
    key: str
    payer: str
    salt: str
    deadline: float | None
    endpoint: str
    pool: str | None = None
    ttft: float = 0.0
    tpot: float = 0.0
    seen: Seen = field(default_factory=Seen)
    lead: bool = False
    ticket: Ticket | None = None
    lane: Lane = field(default_factory=Lane)

    @classmethod
    def of(
        cls,
        http: HttpRequest,
        served: Served,
        prefix: str,
        prompts: Sequence[Sequence[int] | Pictured],
        params: SamplingParams,
        terms: Terms | None = None,
        pool: str | None = None,
        lead: bool = False,
    ) -> "Job":
        """prefix: of the id, which is otherwise that of the HTTP request, so that either finds the other in a log."""
        terms = terms or Terms()
        state = http.scope["state"]
        timeout = served.settings.request_timeout
        return cls(
            id=new_id(prefix, http),
            served=served,
            metrics=service_of(http).metrics,
            prompts=tuple(p if isinstance(p, Pictured) else tuple(p) for p in prompts),
            params=params,
            priority=terms.priority,
            key=state["key"],
            payer=state["key"] or terms.user,  # of one key only one share, whatever users it names
            salt=state["salt"] + (f":{terms.cache_salt}" if terms.cache_salt else ""),
            deadline=time.monotonic() + timeout if timeout else None,
            endpoint=http.scope["path"],
            pool=pool,
            ttft=terms.ttft,
            tpot=terms.tpot,
            seen=state.get("seen") or Seen(),
            lead=lead,
            ticket=state.get("ticket"),
        )


def new_id(prefix: str, http: HttpRequest) -> str:
    """An id for an answer; the same as `x-request-id` but for the prefix, so that either finds the other in a log."""
    return f"{prefix}-{http.scope['state']['request_id'].removeprefix('req-')}"


@dataclass(slots=True)
class Counts:
    """Tokens of a job so far."""

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0  # of the completion, told apart by a turn

    def add(self, output: Output) -> None:
        self.completion += len(output.tokens)
        if output.index == 0:  # the other answers share the prompt of the first
            self.cached += output.cached_tokens


async def answers(job: Job, counts: Counts) -> AsyncGenerator[tuple[int, Output], None]:
    """(choice number, output) for all choices as they come, but for those that the job's lane took. Raises ApiError for
    whatever goes wrong.
    """
    n = job.params.n
    watch = job.metrics.watch(job)

    def count(output: Output) -> None:
        counts.add(output)
        watch.output(output)

    job.lane.count = count
    begun = False
    if job.ticket:
        job.ticket.hold()
    try:
        single = len(job.prompts) == 1
        async with aclosing(_generate(job, 0) if single else _merged(job)) as outputs:
            item: Any
            async for item in outputs:
                prompt, output = (0, item) if single else item
                begun = True
                _raise_failed(output, job)
                count(output)
                yield prompt * n + output.index, output
        watch.end("ok", counts)
    except ApiError as error:
        watch.end(error.code or "error", counts)
        raise
    except (GeneratorExit, asyncio.CancelledError):
        watch.end("cancelled", counts)
        raise
    except Exception as error:
        told = translate(error, job.id)
        watch.end(told.code or "error", counts)
        raise told from error
    finally:
        if job.ticket:
            job.ticket.close(counts.prompt + counts.completion if begun else 0)
        note_tokens(counts.prompt, counts.completion, counts.cached)


def translate(error: Exception, request_id: str, fields: dict[str, Any] | None = None) -> ApiError:
    """What a client is told about an exception of the engine."""
    if isinstance(error, EngineDead):
        return engine_dead()
    if isinstance(error, EngineRestarted):
        return ApiError(503, str(error), code="engine_restarted", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, QueueFull):
        return overloaded(str(error), error.retry_after)
    if isinstance(error, ValueError):
        return from_value_error(error, fields or {})
    logger.error("request %s failed", request_id, exc_info=error)
    return internal_error(request_id)


def _raise_failed(output: Output, job: Job) -> None:
    if output.finish is FinishReason.ERROR:
        logger.error("request %s: the engine says: %s", job.id, output.error)
        raise internal_error(job.id)
    if output.finish is FinishReason.ABORT:
        if job.deadline is not None and time.monotonic() >= job.deadline:
            raise ApiError(504, "The request took longer than this server allows (--request-timeout).", code="timeout")
        raise overloaded("The request was cancelled by the server. Send it again.")


async def _merged(job: Job) -> AsyncGenerator[tuple[int, Output], None]:
    """(prompt number, output) of all prompts, computed together."""
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()
    room = asyncio.Semaphore(WIDTH)
    led = asyncio.Event()
    if not job.lead:
        led.set()

    async def follow(prompt: int) -> None:
        try:
            if prompt:
                await led.wait()
            async with room, aclosing(_generate(job, prompt)) as outputs:
                async for output in outputs:
                    queue.put_nowait((prompt, output))
            queue.put_nowait((prompt, None))
            led.set()
        except Exception as error:
            queue.put_nowait((prompt, error))

    tasks = [asyncio.ensure_future(follow(prompt)) for prompt in range(len(job.prompts))]
    try:
        running = len(tasks)
        while running:
            prompt, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield prompt, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _generate(job: Job, prompt: int) -> Any:
    suffix = f"-{prompt}" if len(job.prompts) > 1 else ""
    tap = {} if len(job.prompts) > 1 or job.lane.spell is None else {"tap": job.lane.take}
    return job.served.llm.generate(
        job.prompts[prompt],
        job.params,
        request_id=job.id + suffix,
        priority=job.priority,
        user=job.payer,
        salt=job.salt,
        deadline=job.deadline,
        ttft=job.ttft,
        tpot=job.tpot,
        pool=job.pool,
        **tap,
    )
