"""Chat templates: a conversation becomes the text a model was trained on.

Invariant: whatever a template does, `apply` returns or raises TemplateError within the time limit, and this process
neither hangs nor grows. Templates are programs from model files, so they run in Jinja's sandbox inside a child process
(`sandbox.py`) with limits on time, memory and output. A tracer in this process could not do it: one `'a' * 10**10` or
`10**10**8` is a single C call. One child serves all threads; it compiles each template once, and a rendering costs
about 0.1 ms more than it would here.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tenfold.engine import sandbox

MAX_SOURCE = 1 << 18  # characters of a template; the longest in use have about 3e4
MAX_INPUT = 1 << 25  # bytes of a conversation as JSON
READS = ("text", "parts", "either")  # content as text, as a list of parts, or a list where there are pictures
IMAGES = ("image", "image_url")  # types of parts
PROBE = "what does this template read?"
ROLES = ("system", "developer", "user", "assistant", "tool")

# What a caller may set beside messages and tools; names that templates of the served families read.
SETTINGS = frozenset(
    {"enable_thinking", "thinking", "reasoning_effort", "preserve_thinking", "clear_thinking", "model_identity"}
    | {"custom_instructions", "documents", "date_string", "builtin_tools", "custom_tools", "tools_in_user_message"}
    | {"xml_tools", "python_tools"}
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message.role in ('system', 'developer') %}{{ message.content + '\\n\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PLAIN_STOP = ("\nUser:",)  # where an answer ends that was asked for with PLAIN

ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL", "LC_TIME")


TIMED_OUT = (1, -getattr(signal, "SIGALRM", 0))  # how the child ends when a rendering takes too long


class TemplateError(ValueError):
    """A conversation that cannot be rendered: bad messages, or a template that fails or goes beyond its limits."""


def default(chatml: bool) -> str:
    """The template for a checkpoint without one: ChatML where the vocabulary has its `<|im_start|>`, else a plain
    "User: ... Assistant:" dialogue.
    """
    return CHATML if chatml else PLAIN


def apply(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special: Mapping[str, str] | None = None,
    pictures: list[Any] | None = None,
    reads: str = "text",
    mark: str = "",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **settings: Any,
) -> str:
    """The prompt that a template makes of a conversation.

    messages: dicts with "role" (one of ROLES) and "content" (text, or a list of text parts, which are joined by
    newlines). special: names such as "bos_token" to strings. pictures: receives the pictures of messages, in their
    order; without it there must be none. reads: what the template reads, one of READS. mark: what stands for a picture
    in text. add_generation_prompt: open the assistant's turn at the end. continue_final_message: leave the last message
    open instead, to be continued. settings: any of SETTINGS, for templates that know them. Raises TemplateError.
    """
    unknown = sorted(settings.keys() - SETTINGS)
    if unknown:
        raise TemplateError(f"{unknown[0]} is not a setting of chat templates; allowed: {', '.join(sorted(SETTINGS))}.")
    if not isinstance(source, str) or len(source) > MAX_SOURCE:
        raise TemplateError(f"The chat template has {len(source)} characters; allowed: up to {MAX_SOURCE}.")
    checked = check_messages(messages, pictures)
    end = _mark_end(checked) if continue_final_message else ""
    for message in checked:
        message["content"] = _as_read(message["content"], reads, mark)
    variables = {
        **(special or {}),
        "documents": None,
        **settings,
        "messages": checked,
        "tools": list(tools) if tools else None,
        "add_generation_prompt": add_generation_prompt and not continue_final_message,
    }
    text = _renderer.render(source, variables)
    return _cut_at(end, text) if continue_final_message else text


def reads_of(source: str, special: Mapping[str, str], mark: str) -> str:
    """What a template of a model that sees pictures reads, found out by trying: one of READS."""
    parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
    answers = []
    for content in (parts, PROBE):
        variables = {**special, "messages": [{"role": "user", "content": content}], "add_generation_prompt": False}
        try:
            answers.append(_renderer.render(source, variables))
        except TemplateError:
            answers.append("")
    if mark not in answers[0] or PROBE not in answers[0]:
        return "text"
    return "either" if PROBE in answers[1] else "parts"


def _as_read(content: str | list[dict[str, Any]], reads: str, mark: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if reads == "parts" else content
    if reads == "text":
        return "".join(part["text"] if part["type"] == "text" else f"{mark}\n" for part in content)
    return content


def check_messages(messages: Sequence[Mapping[str, Any]], pictures: list[Any] | None = None) -> list[dict[str, Any]]:
    """Copies of messages as templates read them: content a string, or a list of parts where some are pictures, which
    `pictures` receives; the arguments of tool calls a dict. Raises TemplateError.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(
            f'messages is a {type(messages).__name__}; allowed: a list such as [{{"role": "user", "content": "Hi"}}].'
        )
    if not messages:
        raise TemplateError("messages is empty; give at least one message.")
    return [_check_message(message, f"messages[{i}]", pictures) for i, message in enumerate(messages)]


def _check_message(message: Any, where: str, pictures: list[Any] | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f'{where} is a {type(message).__name__}; allowed: a dict with "role" and "content".')
    if message.get("role") not in ROLES:
        raise TemplateError(f"{where}.role is {message.get('role')!r}; allowed: {', '.join(ROLES)}.")
    checked = dict(message)
    checked["content"] = _content(message, where, pictures)
    if message.get("tool_calls"):
        checked["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])
        ]
    return checked


def _content(message: Mapping[str, Any], where: str, pictures: list[Any] | None) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return ""
    if not isinstance(content, list) or not content:
        raise TemplateError(f"{where}.content is {_short(content)}; allowed: text, or a list of text parts.")
    if pictures is not None and any(isinstance(part, Mapping) and part.get("type") in IMAGES for part in content):
        return [_part(part, f"{where}.content[{i}]", pictures) for i, part in enumerate(content)]
    return "\n".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str, pictures: list[Any]) -> dict[str, Any]:
    """A part beside pictures, as templates read it."""
    if not isinstance(part, Mapping) or part.get("type") not in IMAGES:
        return {"type": "text", "text": _text_part(part, where)}
    source = part.get("image", part.get("image_url"))
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise TemplateError(f'{where} has no picture; allowed: {{"type": "image", "image": a picture}}.')
    pictures.append(source)
    return {"type": "image"}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is not None and kind != "text":
        raise TemplateError(
            f'{where} is a part of type {kind!r}, and this model reads only text; send parts of type "text".'
        )
    if kind is None or not isinstance(part.get("text"), str):
        raise TemplateError(f'{where} is {_short(part)}; allowed: {{"type": "text", "text": "..."}}.')
    text: str = part["text"]
    return text


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Clients send arguments as a string of JSON, templates read them as a dict."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(
            f"{where} is {_short(call)}; "
            'allowed: {"type": "function", "function": {"name": ..., "arguments": ...}}.'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise TemplateError(
                f"{where}.function.arguments is not JSON ({error}); send the object the tool was called with."
            ) from None
        except RecursionError:
            raise TemplateError(
                f"{where}.function.arguments is nested too deeply to be read; send an object that is nested less."
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# The space tells whether the template trims messages: then what is before the mark has to be trimmed, too.
_MARK = "\u27e6the answer goes on here\u27e7 "


def _mark_end(messages: list[dict[str, Any]]) -> str:
    last = messages[-1]
    if last["role"] != "assistant" or not last["content"] or not isinstance(last["content"], str):
        raise TemplateError("continue_final_message needs a last message of role assistant with some text to continue.")
    last["content"] += _MARK
    return _MARK


def _cut_at(mark: str, text: str) -> str:
    at = text.rfind(mark.rstrip())
    if at == -1:
        raise TemplateError(
            "continue_final_message: the chat template leaves the last message out, so it cannot be continued."
        )
    return text[:at] if text.startswith(mark, at) else text[:at].rstrip()


class Renderer:
    """A child process that renders templates, one at a time; started on first use (or by `start`), and again after one
    had to be ended.

    seconds, memory (bytes) and max_output (characters) bound one rendering.
    """

    def __init__(self, seconds: float = 2.0, memory: int = 1 << 28, max_output: int = 1 << 23) -> None:
        self._limits = {"seconds": seconds, "memory": memory, "max_output": max_output}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started the child; a fork of it must not talk on the same pipes
        self._ready = False
        self._known: set[str] = set()
        self._stop: weakref.finalize[Any, Any] | None = None

    def start(self) -> None:
        """Starts the child without waiting for it, so that the first rendering need not."""
        with self._lock:
            self._running()

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template with variables of JSON's types. Raises TemplateError."""
        key = hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()
        with self._lock:
            child = self._running()
            request = {"key": key, "variables": variables} | ({} if key in self._known else {"source": source})
            answer = self._exchange(child, _pack(request))
            if "error" in answer:
                self._known.discard(key)
                raise TemplateError(f"The chat template cannot be used: {answer['error'].rstrip('.')}.")
            self._known.add(key)
            return answer["text"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid() and self._stop is not None:
            self._stop.detach()
            self._child = self._stop = None
        if self._child is None or self._child.poll() is not None:
            self._end()
            settings = {**self._limits, "path": [os.path.abspath(p) for p in sys.path]}
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(sandbox.__file__).resolve()), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            )
            self._stop = weakref.finalize(self, _end_child, self._child)
            self._owner = os.getpid()
            self._ready = False
            self._known.clear()
        return self._child

    def _exchange(self, child: subprocess.Popen[bytes], request: bytes) -> dict[str, str]:
        assert child.stdin is not None
        assert child.stdout is not None
        if not self._ready:
            if sandbox.receive(child.stdout) is None:
                self._end()
                raise TemplateError(
                    f"The process that renders chat templates did not start; try: {sys.executable} -c 'import jinja2'."
                )
            self._ready = True
        try:
            child.stdin.write(request)
            child.stdin.flush()
            answer = sandbox.receive(child.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = child.wait()
            self._end()
            if code in TIMED_OUT:
                return {"error": f"it takes longer than {self._limits['seconds']:g} s"}
            return {"error": f"its process ended with code {code}"}
        return answer

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._child = self._stop = None


def _pack(request: dict[str, Any]) -> bytes:
    try:
        return sandbox.pack(request, MAX_INPUT)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"The conversation cannot be given to the chat template: {error}.") from None


def _end_child(child: subprocess.Popen[bytes]) -> None:
    """It has nothing to save, so it need not be asked."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with suppress(OSError):  # what was not yet written has no reader any more
            pipe.close()


_renderer = Renderer()
start = _renderer.start
