"""The Python API: `LLM` for scripts, `AsyncLLM` for servers. Both put requests to an engine on a thread of its own.

Invariant: a request whose iterator is closed, dropped or cancelled is aborted; Ctrl-C interrupts the caller, never a
step.

Where no parameters are given, the model's generation_config.json counts, as in vLLM: `default_params` says what that
is.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tenfold.base.config import EngineConfig
from tenfold.base.log import Timeline
from tenfold.base.table import entry
from tenfold.engine import defaults, template
from tenfold.engine.completion import Collector, Completion
from tenfold.engine.facts import Facts, Stats
from tenfold.engine.grammar import Grammars
from tenfold.engine.loop import Batch, EngineDead, EngineLoop, EngineRestarted, Loop
from tenfold.engine.remote import RemoteLoop
from tenfold.engine.request import FinishReason, Grammar, Output, Pictured, QueueFull, Request, SamplingParams
from tenfold.engine.stream import Bar, Job, RequestFailed, Run, Stream

if TYPE_CHECKING:  # PyTorch comes with these
    from tenfold.engine.classifier import Classifier, Feeling, Post
    from tenfold.engine.core import Engine
    from tenfold.engine.text import Text

__all__ = ["LLM", "AsyncLLM", "Completion", "EngineDead", "EngineRestarted", "Pictured", "QueueFull"]
__all__ += ["RequestFailed", "Stream"]

Prompt = str | Sequence[int] | Pictured
Message = Mapping[str, Any]
Front = TypeVar("Front", bound="_Front")

# Imported when a model is loaded, which takes PyTorch a second or two: an engine process imports it meanwhile, too.
HEAVY = {"engine": "tenfold.engine.core:Engine", "text": "tenfold.engine.opened:open_text"}
PICTURES = {"load": "tenfold.base.pictures:load_picture"}  # comes with Pillow
BESIDE = {"classifier": "tenfold.engine.classifier:Classifier"}  # imported when a first post is classified

PATIENCE = 10.0  # seconds that the end of the program waits for a step under way
LONG_TEXT = 4096  # characters from which a text is encoded off the event loop; shorter takes well under a millisecond


class _Front:
    """What `LLM` and `AsyncLLM` share: the engine's loop, its text layer, and how requests are made.

    model and settings: fields of EngineConfig; or give all of them as `config`; or a ready `engine`, which then
    belongs to this object. timeline receives the phases of loading, `loading(done, total)` is called while weights
    load into this process. isolate: run the engine in a process of its own, which is started again when it ends or
    hangs. watchdog: seconds without progress after which an engine is dumped into the log and, if isolated, restarted
    (0: never). Raises ValueError for unknown settings and for whatever `Engine.load` refuses.
    """

    def __init__(
        self,
        model: str = "default",
        *,
        config: EngineConfig | None = None,
        engine: Engine | None = None,
        timeline: Timeline | None = None,
        loading: Callable[[int, int], None] | None = None,
        isolate: bool = False,
        watchdog: float = 60.0,
        **settings: Any,
    ) -> None:
        asked = _config(model, config, settings)
        self._loop: Loop
        if isolate:
            if engine is not None:
                raise ValueError("engine is in this process already; isolate=True needs a model or a config.")
            self._loop, self.text, self.timeline = _isolated(asked, watchdog, timeline)
        else:
            loop = EngineLoop(lambda: engine or _load(asked, timeline, loading), watchdog=watchdog)
            loaded: Any = loop.engine
            self._loop, self.text, self.timeline = loop, loaded.text, loaded.timeline
        self._finalizer = weakref.finalize(self, self._loop.close, PATIENCE)
        self._ids = itertools.count(1)
        self._grammars: Grammars | None = None  # made when the first is checked
        self._classifiers: dict[str, Classifier] = {}  # by what they are called
        self._opening = threading.Lock()

    @property
    def facts(self) -> Facts:
        """What does not change while the engine runs; an isolated one may come back from a restart with others."""
        assert self._loop.facts is not None
        return self._loop.facts

    @property
    def config(self) -> EngineConfig:
        """The settings, every size filled in."""
        return self.facts.config

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        return self.facts.max_model_len

    @property
    def state(self) -> str:
        """ "loading", "ready", "restarting", "failed" or "closed"."""
        return self._loop.state

    @property
    def ready(self) -> bool:
        """Whether a request would be computed now; while an isolated engine restarts, requests wait for it."""
        return self._loop.ready

    @property
    def alive(self) -> bool:
        """False once the engine failed for good or was closed."""
        return self._loop.alive

    @property
    def restarts(self) -> int:
        """Times an isolated engine was started again."""
        return self._loop.restarts

    @property
    def open_requests(self) -> int:
        """Requests that were given to the engine and have not ended."""
        return self._loop.open_requests

    def stats(self) -> Stats | None:
        """The engine's numbers after its latest step; None while there is no engine."""
        stats: Stats | None = self._loop.stats()
        return stats

    def dump(self) -> None:
        """Write what all threads of the engine do, and its scheduler's state, to the log."""
        self._loop.dump()

    def restart(self) -> None:
        """End an isolated engine at once and start another; requests it had begun end with EngineRestarted. Raises
        ValueError for an engine inside this process, EngineDead.
        """
        self._loop.restart()

    def close(self, patience: float | None = None) -> None:
        """Stops the engine after the step under way, or after `patience` seconds; open requests end with reason
        "abort". Idempotent.
        """
        self._finalizer.detach()
        self._loop.close(patience)
        with self._opening:
            opened = [*self._classifiers.values()]
        for classifier in opened:
            classifier.close(patience)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the model expects around it."""
        return self.text.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.text.decode(ids, skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one token stands for."""
        return self.text.token_bytes(token)

    def chat_prompt(self, messages: Sequence[Message], **settings: Any) -> list[int]:
        """Token ids of a conversation by the model's chat template. settings: as in `template.apply`."""
        return self.text.encode_chat(messages, **settings)

    @property
    def sees(self) -> bool:
        """Whether the model looks at pictures."""
        return getattr(self.text, "processor", None) is not None

    def pictured(self, text: str, pictures: Sequence[Any]) -> Pictured:
        """A prompt in which the model's own mark, such as <image>, stands for each of the pictures in turn: paths, data
        URLs, bytes, or PIL images. Raises ValueError.
        """
        return self.text.encode_pictured(text, [_loaded(picture) for picture in pictures])

    def pictured_chat(self, messages: Sequence[Message], **settings: Any) -> Pictured:
        """As `chat_prompt`, for a conversation with pictures: parts of content of type "image" with the bytes of a file
        or a PIL image as "image".
        """
        return self.text.encode_chat_pictured(messages, **settings)

    def prompt_for(self, messages: Sequence[Message], **settings: Any) -> list[int] | Pictured:
        """A conversation as a prompt. Its pictures may be named by path or data URL, so it must not be a stranger's.
        Raises TemplateError, and PictureError for a picture that cannot be used.
        """
        if not self.sees:
            return self.chat_prompt(messages, **settings)
        return self.pictured_chat(_with_loaded(messages), **settings)

    def default_params(self, chat: bool = False) -> SamplingParams:
        """The parameters of requests that come without: what generation_config.json recommends, others at their
        defaults. An answer in a chat goes on until the model ends it, a completion for 16 tokens, unless the model says
        otherwise.
        """
        recommended = self.text.recommended
        return replace(recommended, stop=self.text.chat_stop) if chat else defaults.completion(recommended)

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises ValueError with the reason for a grammar that answers cannot be held to. Blocks while it compiles."""
        if self._grammars is None:
            self._grammars = Grammars(self.text, self.vocab_size, self.text.eos_ids)
        self._grammars.check(grammar)

    def _request(self, prompt: Prompt, params: SamplingParams | None, **rest: Any) -> Request:
        params = self.default_params() if params is None else checked_params(params)
        id = rest.pop("request_id", None) or f"request-{next(self._ids)}"
        if isinstance(prompt, Pictured):
            return Request(id, prompt.tokens, params, pictures=prompt.pictures, **rest)
        return Request(id, self._tokens(prompt), params, **rest)

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.text.encode(prompt))
        ids = _plain(prompt)
        if not _is_tokens(ids):
            raise ValueError(f"prompt is a {type(prompt).__name__}; allowed: a text or a list of token ids.")
        return tuple(ids)

    def _embed_requests(self, texts: str | Sequence[Prompt], pool: str) -> list[Request]:
        return [self._request(text, None, pool=pool) for text in _prompts(texts)]


def _load(config: EngineConfig, timeline: Timeline | None, loading: Callable[[int, int], None] | None) -> Engine:
    engine: Engine = entry(HEAVY, "engine", "part").load(config, timeline=timeline, progress=loading)
    return engine


def _isolated(config: EngineConfig, watchdog: float, timeline: Timeline | None) -> tuple[Loop, Text, Timeline]:
    """An engine process, and what this process needs of its model: headers and tokenizer, read while it loads."""
    loop = RemoteLoop(config, watchdog=watchdog)
    atexit.register(loop.close, 0)  # this may be a thread that the end of the program does not wait for
    try:
        text: Text = entry(HEAVY, "text", "part")(config.model, loop.wait)
        loop.wait()
    except BaseException:
        loop.close(0)
        raise
    finally:
        atexit.unregister(loop.close)
    assert loop.facts is not None
    timeline = timeline or Timeline()
    timeline.phases += loop.facts.timeline
    return loop, text, timeline


def _config(model: str, config: EngineConfig | None, settings: Mapping[str, Any]) -> EngineConfig:
    if config is not None:
        if settings or model != "default":
            raise ValueError("Give either config or single settings, not both.")
        return config
    known = {f.name for f in fields(EngineConfig)}
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is not a setting of the engine; allowed: {', '.join(sorted(known))}.")
    return EngineConfig(model=model, **settings)


def checked_params(params: Any) -> SamplingParams:
    """Sampling parameters with the sequences they may hold as tuples. Raises ValueError for anything else."""
    if not isinstance(params, SamplingParams):
        raise ValueError(
            f"params is a {type(params).__name__}; allowed: SamplingParams, a list of one per prompt, or None."
        )
    stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)
    return replace(params, stop=stop, stop_token_ids=tuple(params.stop_token_ids))


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and all(isinstance(t, int) for t in prompt)


def _loaded(picture: Any) -> Any:
    return entry(PICTURES, "load", "part")(picture)


def _with_loaded(messages: Any) -> Any:
    """The messages, their pictures loaded; what is no conversation is left to the template's checks."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        return messages
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _part(part: Any) -> Any:
    """A part of a message, its picture loaded."""
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return part
    source = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None)
    source = source.get("url") if isinstance(source, Mapping) else source
    return {"type": "image", "image": None if source is None else _loaded(source)}


def _prompts(prompts: str | Sequence[Any]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, (str, Pictured)):
        return [prompts]
    prompts = _plain(prompts)
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise ValueError(
            f"prompts is a {type(prompts).__name__}; allowed: a text, a list of texts, or lists of token ids."
        )
    return [prompts] if prompts and _is_tokens(prompts) else list(prompts)


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams | None]:
    """Parameters for each of `count` prompts."""
    if params is None or not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"params has {len(params)} entries for {count} prompts; give one for each, or one for all.")
    return list(params)


def _vectors(embeddings: Sequence[Sequence[float]], normalize: bool) -> np.ndarray:
    vectors = np.asarray(embeddings, dtype=np.float32)
    if normalize and len(vectors):
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


class LLM(_Front):
    """A model to call from a script or a notebook; may be used from several threads.

    >>> with LLM() as llm:
    ...     print(llm.generate("The capital of France is")[0].text)
    """

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        priority: int = 0,
        user: str = "",
        salt: str = "",
        deadline: float | None = None,
        ttft: float = 0.0,
        tpot: float = 0.0,
    ) -> list[Completion]:
        """Continue one prompt or many, each a text or a list of token ids; one Completion for each, in their order.

        params: for all, or one for each. progress: show a bar. Other arguments as in Request.
        Raises ValueError for what the engine refuses, RequestFailed and EngineDead.
        """
        given = _prompts(prompts)
        rest = {"priority": priority, "user": user, "salt": salt, "deadline": deadline, "ttft": ttft, "tpot": tpot}
        each = _each(params, len(given))
        jobs = (self._job(p, own, rest) for p, own in zip(given, each))
        return [c.completion() for c in self._collect(jobs, len(given), progress)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **settings: Any,
    ) -> list[Completion]:
        """Answer one conversation or many: lists of {"role", "content"}; one Completion for each. To a model that sees,
        content may be a list of parts {"type": "text", "text": ...} and {"type": "image", "image": a path, a data URL,
        bytes, or PIL's Image}.

        settings: as in `template.apply`, such as tools or enable_thinking. Raises TemplateError, and what `generate`
        raises.
        """
        conversations = [messages] if _is_conversation(messages) else list(messages)
        prompts = [self.prompt_for(c, **settings) for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, self.default_params(chat=True) if params is None else params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **rest: Any) -> Stream:
        """Outputs of one request as they come; `rest` as in Request. What the engine refuses is raised by the first
        `next`.
        """
        return Stream(self._loop, self._request(prompt, params, **rest))

    def chat_stream(self, messages: Sequence[Message], params: SamplingParams | None = None, **settings: Any) -> Stream:
        """Outputs of the answer to one conversation as they come."""
        prompt = self.prompt_for(messages, **settings)
        return self.stream(prompt, self.default_params(chat=True) if params is None else params)

    def embed(self, texts: str | Sequence[Prompt], pool: str = "mean", normalize: bool = True) -> np.ndarray:
        """Float32 [texts, hidden size]: the final hidden states of each text, pooled ("mean" or "last"), of length 1 if
        `normalize`."""
        requests = self._embed_requests(texts, pool)
        collected = self._collect(((None, request) for request in requests), len(requests), False)
        return _vectors([c.embedding or () for c in collected], normalize)

    def classify(self, posts: str | Post | Sequence[str | Post], classifier: str = "default") -> list[Feeling]:
        """What posts of text and picture feel like, by a classifier beside the model, which is opened at its first use
        and stays. classifier: "default" or a folder. Raises what `Classifier` and its `classify` do.
        """
        with self._opening:
            if classifier not in self._classifiers:
                opened = entry(BESIDE, "classifier", "kind")(classifier)
                self._classifiers[classifier] = opened
                weakref.finalize(self, opened.close, 0.0)
        found: list[Feeling] = self._classifiers[classifier].classify(posts)
        return found

    def _job(self, prompt: Prompt, params: SamplingParams | None, rest: dict[str, Any]) -> Job:
        return prompt if isinstance(prompt, str) else None, self._request(prompt, params, **rest)

    def _collect(self, jobs: Iterator[Job], count: int, progress: bool) -> list[Collector]:
        """Run requests, never more at a time than may wait, and give their outputs in order."""
        run = Run(self._loop, max(1, self.config.max_queue))
        bar = Bar(count) if progress else None
        try:
            return run.all(jobs, count, bar.advance if bar else None)
        finally:
            run.close()
            if bar:
                bar.close()


def _is_conversation(messages: Any) -> bool:
    """One conversation rather than several; what is neither is left to the template's checks."""
    return (
        not isinstance(messages, Sequence)
        or isinstance(messages, str)
        or not messages
        or isinstance(messages[0], Mapping)
    )


Tap = Callable[[Output], bool]


class _Inbox:
    """Outputs of one request that its consumer has not taken yet. Lives on the event loop. tap: as in
    `AsyncLLM.generate`.
    """

    __slots__ = ("_items", "_tap", "_waiter")

    def __init__(self, tap: Tap | None = None) -> None:
        self._items: deque[Output | Exception] = deque()
        self._tap = tap
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Output | Exception) -> None:
        self._items.append(item)

    def deliver(self) -> None:
        """What was put in goes to the tap, or the consumer wakes up."""
        if self._waiter is None or self._waiter.done():
            return
        while self._tap is not None and self._items:
            item = self._take()
            if isinstance(item, Output) and item.finish is None:
                try:
                    if self._tap(item):
                        continue
                except Exception as error:  # a fault of its own, which is the consumer's to see
                    item = error
            self._items.appendleft(item)
            break
        if self._items:
            self._waiter.set_result(None)

    async def get(self) -> Output | Exception:
        """The next output, with those that came after it while nobody asked: who reads late gets more at once."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._take()

    def _take(self) -> Output | Exception:
        item = self._items.popleft()
        while self._items and isinstance(item, Output):
            following = self._items[0]
            if not isinstance(following, Output) or not item.joins(following):
                break
            item = item.joined(self._items.popleft())  # type: ignore[arg-type]
        return item


class _Port:
    """The receiver of all requests of one event loop: a step's outputs cross over in one call, and those of steps that
    crossed together are delivered together.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.get_ident()
        self.inboxes: dict[str, _Inbox] = {}
        self._filled: dict[_Inbox, None] = {}  # in the order of their first item

    def send(self, batch: Batch) -> bool:
        if threading.get_ident() == self.thread:  # of a pump
            self._dispatch(batch)
            return True
        try:
            self.loop.call_soon_threadsafe(self._dispatch, batch)
        except RuntimeError:  # the event loop is closed
            return False
        return True

    def _dispatch(self, batch: Batch) -> None:
        if not self._filled:
            self.loop.call_soon(self._deliver)
        for id, item in batch:
            inbox = self.inboxes.get(id)
            if inbox is not None:
                inbox.put(item)
                self._filled[inbox] = None

    def _deliver(self) -> None:
        filled, self._filled = self._filled, {}
        for inbox in filled:
            inbox.deliver()


class AsyncLLM(_Front):
    """A model for an asyncio program. The constructor blocks while the model loads; `await AsyncLLM.load(...)` does
    not.

    An iterator that is closed, or whose task is cancelled, aborts its request in whatever phase that is.
    """

    def __init__(self, model: str = "default", **settings: Any) -> None:
        super().__init__(model, **settings)
        self._port: _Port | None = None
        if getattr(self.text, "template", None):
            template.start()

    @classmethod
    async def load(cls, model: str = "default", **settings: Any) -> AsyncLLM:
        """The constructor, off the event loop."""
        return await asyncio.to_thread(cls, model, **settings)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        user: str = "",
        salt: str = "",
        deadline: float | None = None,
        ttft: float = 0.0,
        tpot: float = 0.0,
        pool: str | None = None,
        tap: Tap | None = None,
    ) -> AsyncGenerator[Output, None]:
        """Outputs of one request as they come, of all n answers mixed; each answer's last has a finish reason.

        prompt: text or token ids. tap: offered each output, but the last of an answer, that comes while the consumer
        waits for one; where it returns True it has used it, and the iterator does not give it: so tokens that need no
        thought wake up no task. Other arguments as in Request. Raises ValueError for what the engine refuses,
        EngineDead, and EngineRestarted. When an engine in this process fails under way, the last outputs have reason
        "error".
        """
        rest = {"priority": priority, "user": user, "salt": salt, "deadline": deadline, "pool": pool}
        rest |= {"ttft": ttft, "tpot": tpot}
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            return self._generate_long(prompt, params, tap, request_id=request_id, **rest)
        return self._run(self._request(prompt, params, request_id=request_id, **rest), tap)

    async def _generate_long(
        self, prompt: str, params: SamplingParams | None, tap: Tap | None, **rest: Any
    ) -> AsyncGenerator[Output, None]:
        """Encodes off the event loop first."""
        ids = await asyncio.to_thread(self._tokens, prompt)
        async with aclosing(self._run(self._request(ids, params, **rest), tap)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_settings: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> AsyncGenerator[Output, None]:
        """Outputs of the answer to a conversation. template_settings: as in `template.apply`; rest: as in
        `generate`.
        """
        prompt = await asyncio.to_thread(self.prompt_for, messages, **(template_settings or {}))
        params = self.default_params(chat=True) if params is None else params
        async with aclosing(self.generate(prompt, params, **rest)) as outputs:
            async for output in outputs:
                yield output

    async def embed(self, texts: str | Sequence[Prompt], pool: str = "mean", normalize: bool = True) -> np.ndarray:
        """As `LLM.embed`."""
        requests = await asyncio.to_thread(self._embed_requests, texts, pool)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._embedding(request)) for request in requests]
        return _vectors([task.result() for task in tasks], normalize)

    def abort(self, request_id: str) -> None:
        """End a request; its iterator gets outputs with reason "abort". Nothing happens if there is no such request."""
        self._loop.abort(request_id)

    async def _embedding(self, request: Request) -> tuple[float, ...]:
        async with aclosing(self._run(request)) as outputs:
            async for output in outputs:
                if output.embedding is not None:
                    return output.embedding
                if output.finish is FinishReason.ERROR:
                    raise RequestFailed(str(output.error))
        raise RequestFailed("The request was aborted.")

    async def _run(self, request: Request, tap: Tap | None = None) -> AsyncGenerator[Output, None]:
        port = self._open_port()
        if request.id in port.inboxes:
            raise ValueError(f"request_id is {request.id!r}; a request with this id is under way, choose another.")
        inbox = port.inboxes[request.id] = _Inbox(tap)
        missing = 0
        try:
            self._loop.submit(request, port)
            missing = 1 if request.pool is not None else request.params.n
            while missing:
                item = await inbox.get()
                if isinstance(item, Exception):
                    missing = 0
                    raise item
                missing -= item.finish is not None
                yield item
        finally:
            del port.inboxes[request.id]
            if missing:
                self._loop.abort(request.id)

    def _open_port(self) -> _Port:
        loop = asyncio.get_running_loop()
        if self._port is None or self._port.loop is not loop:
            self._port = _Port(loop)  # requests of another loop keep theirs
            if isinstance(self._loop, RemoteLoop):
                self._loop.attach(loop)
        return self._port
