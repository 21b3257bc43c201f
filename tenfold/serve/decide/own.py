"""A classifier of our own behind /v1/classify and /v1/decisions: posts of text and picture, read off the event loop and
computed in the batches of a pool.

Invariant: every request is observed once and charged to its key, whatever becomes of it; a client that leaves takes its
posts out of the pool.
"""

import asyncio
import time
from collections.abc import Sequence

from starlette.requests import Request as HttpRequest

from tenfold.base.pictures import PictureError, PictureLimits
from tenfold.engine.classifier import pixels
from tenfold.engine.pool import Entry, Pool, PoolConfig, PoolStats, open_pool
from tenfold.models.sentiment.prepare import Item
from tenfold.serve.decide.classify import Classified
from tenfold.serve.decide.given import Given
from tenfold.serve.errors import ApiError, invalid
from tenfold.serve.fetch import Fetcher
from tenfold.serve.logs import note_tokens
from tenfold.serve.metrics import Metrics
from tenfold.serve.protocol.body import Terms
from tenfold.serve.service import new_id, service_of, translate
from tenfold.serve.settings import ServeConfig

READERS = 2  # pictures decoded at one time: each may take hundreds of megabytes while it is large


class Own:
    """One classifier of a server, under its name."""

    def __init__(self, name: str, pool: Pool, settings: ServeConfig) -> None:
        self.name, self.pool, self.settings = name, pool, settings
        self.fetcher = Fetcher.of(settings)
        self.created = int(time.time())
        self._room = asyncio.Semaphore(READERS)

    @property
    def labels(self) -> Sequence[str]:
        return self.pool.classifier.config.labels

    @property
    def max_tokens(self) -> int:
        return self.pool.classifier.config.max_tokens

    @property
    def modalities(self) -> Sequence[str]:
        """What it looks at, as /v1/models tells it."""
        looks = self.pool.classifier.config.parts.modalities
        return ("text", "image") if looks == "both" else (looks,)

    @property
    def alive(self) -> bool:
        return self.pool.alive

    @property
    def stats(self) -> PoolStats:
        return self.pool.stats

    def close(self, patience: float | None = None) -> None:
        self.pool.close(patience)

    async def classify(self, given: Sequence[Given], http: HttpRequest, terms: Terms) -> Classified:
        """Of each post the probability of every label. Raises ApiError."""
        watch = Watch(self.name, http)
        try:
            items = await self._read(given)
            watch.tokens = sum(len(item.ids) for item in items)
            entries = self.pool.submit_all(items, self._deadline())
            told = await self._results(entries)
            watch.queued(min(entry.began - entry.arrived for entry in entries))
        except ApiError as error:
            watch.end(error.code or "error")
            raise
        except asyncio.CancelledError:
            watch.end("cancelled")
            raise
        except TimeoutError:
            watch.end("timeout")
            raise ApiError(
                504, "The request took longer than this server allows (--request-timeout).", code="timeout"
            ) from None
        except Exception as error:
            answer = translate(error, new_id("classify", http))
            watch.end(answer.code or "error")
            raise answer from error
        watch.end("ok")
        return Classified(told, watch.tokens)

    def _deadline(self) -> float | None:
        seconds = self.settings.request_timeout
        return time.monotonic() + seconds if seconds else None

    async def _read(self, given: Sequence[Given]) -> list[Item]:
        """One after the other, so that a request holds one large picture at a time."""
        items = []
        for post in given:
            data = await self._fetch(post)
            async with self._room:
                items.append(await asyncio.to_thread(self._item, post, data))
        return items

    async def _fetch(self, post: Given) -> bytes | None:
        if not post.pictures:
            return None
        if len(post.pictures) > 1:
            where = post.pictures[1].where
            raise invalid(f"{where} is a second image; this model looks at one image a post.", where)
        picture = post.pictures[0]
        try:
            return await self.fetcher.fetch(picture.url)
        except PictureError as error:
            raise invalid(f"{picture.where}: {error}", picture.where, "invalid_image") from None

    def _item(self, post: Given, data: bytes | None) -> Item:
        """Blocking. Raises ApiError (400)."""
        limits = PictureLimits(max_bytes=self.settings.max_image_bytes, max_pixels=self.settings.max_image_pixels)
        try:
            picture = None if data is None else pixels(data, limits)
        except PictureError as error:
            where = post.pictures[0].where
            raise invalid(f"{where}: {error}", where, "invalid_image") from None
        try:
            return self.pool.classifier.reader.read(post.text, picture)
        except ValueError as error:
            raise invalid(f"{post.where}: {error}", post.where) from None

    async def _results(self, entries: Sequence[Entry]) -> list[list[float]]:
        """Raises what the first that fails raises; the others are taken out of the pool then."""
        futures = [asyncio.wrap_future(entry.future) for entry in entries]
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()


class Watch:
    """What the server counts of one request: as for those of language models, under the same names."""

    def __init__(self, name: str, http: HttpRequest) -> None:
        state = http.scope["state"]
        self.metrics: Metrics = service_of(http).metrics
        self.ticket = state.get("ticket")
        self.endpoint, self.key = http.scope["path"], state["key"]
        self.name, self.tokens = name, 0
        self.seen = state.get("seen")
        self.begun = self.seen.arrival if self.seen is not None else time.monotonic()
        if self.seen is not None:
            self.seen.model = name
        if self.ticket:
            self.ticket.hold()
        self.metrics.open.labels(name).inc()

    def queued(self, seconds: float) -> None:
        self.metrics.histograms["queue"].labels(self.name, self.endpoint).observe(seconds)

    def end(self, outcome: str) -> None:
        """Once."""
        metrics, now = self.metrics, time.monotonic()
        metrics.open.labels(self.name).dec()
        metrics.requests.labels(self.name, self.endpoint, self.key, outcome).inc()
        if outcome == "ok":
            metrics.histograms["e2e"].labels(self.name, self.endpoint).observe(now - self.begun)
        if outcome == "cancelled" and self.seen is not None and self.seen.disconnected:
            metrics.cancels.labels(self.name).observe(now - self.seen.disconnected)
        used = self.tokens if outcome == "ok" else 0
        metrics.counters["prompt"].labels(self.name, self.endpoint, self.key).inc(used)
        if self.ticket:
            self.ticket.close(used)
        note_tokens(used, 0, 0)


def open_own(name: str, path: str, settings: ServeConfig) -> Own:
    """Raises ValueError for a path that holds no classifier."""
    config = PoolConfig(
        device=settings.classifier_device,
        batch=settings.classifier_batch,
        exact=settings.classifier_exact,
        queue=settings.classifier_queue,
        threads=settings.classifier_threads,
    )
    return Own(name, open_pool(path, config), settings)
