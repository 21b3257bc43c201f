"""`Service`: what the routes of one server share, and `answers`, through which every route asks the engine.

Invariant: whatever goes wrong in the engine leaves `answers` as an ApiError, and no engine work outlives the iteration.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

import tenfold
from tenfold.engine.core import QueueFull
from tenfold.engine.llm import AsyncLLM
from tenfold.engine.loop import EngineDead
from tenfold.engine.request import FinishReason, Output, SamplingParams
from tenfold.serve.errors import ApiError, engine_dead, from_value_error, overloaded
from tenfold.serve.guard import internal_error, logger
from tenfold.serve.protocol import ModelCard, Sampling
from tenfold.serve.settings import ServeConfig

DEFAULT_NAME = "default"  # always understood, so that a first try needs no look at /v1/models


@dataclass(slots=True)
class Service:
    """One engine under one name, with the server's settings."""

    llm: AsyncLLM
    name: str
    settings: ServeConfig
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""

    def __post_init__(self) -> None:
        described = f"{tenfold.__version__} {self.name} {getattr(self.llm, 'config', '')}"
        self.fingerprint = "fp_" + hashlib.sha256(described.encode()).hexdigest()[:12]

    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.llm.max_model_len)

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) unless `name` is served."""
        if name not in (self.name, DEFAULT_NAME):
            message = f"The model {name[:128]!r} is not served here; there is {self.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")


def service_of(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


@dataclass(frozen=True, slots=True)
class Job:
    """What a route asks of the engine: `params.n` answers to each prompt. Choice number = prompt * n + answer."""

    id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    priority: int
    user: str
    salt: str
    deadline: float | None

    @classmethod
    def of(
        cls,
        id: str,
        body: Sampling,
        payer: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        http: HttpRequest,
    ) -> "Job":
        timeout = service_of(http).settings.request_timeout
        salt = http.scope["state"]["salt"] + (f":{body.cache_salt}" if body.cache_salt else "")
        deadline = time.monotonic() + timeout if timeout else None
        ids = tuple(tuple(p) for p in prompts)
        return cls(id, ids, params, body.priority or 0, payer, salt, deadline)


@dataclass(slots=True)
class Counts:
    """Tokens of a job so far."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def add(self, output: Output) -> None:
        self.completion += len(output.tokens)
        if output.index == 0:  # the other answers share the prompt of the first
            self.cached += output.cached_tokens


async def answers(service: Service, job: Job, counts: Counts) -> AsyncGenerator[tuple[int, Output], None]:
    """(choice number, output) for all choices as they come. Raises ApiError for whatever goes wrong."""
    n = job.params.n
    try:
        async with aclosing(_merged(service, job)) as outputs:
            async for prompt, output in outputs:
                _raise_failed(output, job)
                counts.add(output)
                yield prompt * n + output.index, output
    except (ApiError, GeneratorExit, asyncio.CancelledError):
        raise
    except Exception as error:
        raise translate(error, job.id) from error


def translate(error: Exception, request_id: str, fields: dict[str, Any] | None = None) -> ApiError:
    """What a client is told about an exception of the engine."""
    if isinstance(error, EngineDead):
        return engine_dead()
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


async def _merged(service: Service, job: Job) -> AsyncGenerator[tuple[int, Output], None]:
    """(prompt number, output) of all prompts, computed together."""
    if len(job.prompts) == 1:
        async with aclosing(_generate(service, job, 0)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()

    async def follow(prompt: int) -> None:
        try:
            async with aclosing(_generate(service, job, prompt)) as outputs:
                async for output in outputs:
                    queue.put_nowait((prompt, output))
            queue.put_nowait((prompt, None))
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


def _generate(service: Service, job: Job, prompt: int) -> Any:
    suffix = f"-{prompt}" if len(job.prompts) > 1 else ""
    return service.llm.generate(
        job.prompts[prompt],
        job.params,
        request_id=job.id + suffix,
        priority=job.priority,
        user=job.user,
        salt=job.salt,
        deadline=job.deadline,
    )
