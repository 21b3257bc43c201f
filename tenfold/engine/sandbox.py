"""Renders chat templates in a process of its own: a script that reads requests from its standard input until that ends.

A template is a program from a model file. Jinja's sandbox keeps it from Python's objects, but not from looping for ever
or from asking for all memory, and much of that happens inside single C calls that no tracer in the same process can
end. So the process limits its own memory, and a timer that needs no interpreter lock ends it when a rendering takes too
long. `template.Renderer` starts it. It imports nothing of the package, so that it starts in about 0.1 s.

Messages both ways: 4 bytes of length, big-endian, and that much JSON. Request: {"key", "source" (once for each key),
"variables"}. Answer: {"text"} or {"error"}; before the first request one empty answer, when ready. The process ends by
SIGALRM, or with exit code 1 where there are no such signals, when out of time.
"""

import faulthandler
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import IO, Any, NoReturn


def limit_memory(size: int) -> None:
    """At most `size` more bytes of address space than the process has now. Where the system has no such limit, the time
    limit remains.
    """
    try:
        import resource  # not on Windows
    except ImportError:
        return
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        used = 1 << 30
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError):
        pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the process when the body takes longer; no part of the interpreter has to cooperate."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, whose default action is to end the process
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        return
    with open(os.devnull, "w") as nowhere:  # Windows: a thread of C code that ends with exit code 1
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        yield
        faulthandler.cancel_dump_traceback_later()


class Raised(Exception):
    """What a template says with `raise_exception`."""


def environment() -> Any:
    """Jinja as Hugging Face sets it up for chat templates: same trimming, filters, globals and tags.

    Imports stand inside, for they work only once `main` has set the path.
    """
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's part for training; here its body is simply text."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        """A namespace without names that begin with an underscore, which mean something to Python."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            given = dict(*args, **kwargs)
            for name in given:
                check_name(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            Namespace.__setitem__(self, name, value)

    def check_name(name: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace must not have a name like {name!r}")

    def raise_exception(message: str) -> NoReturn:
        raise Raised(str(message)[:1000])

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    env.globals["namespace"] = PublicNamespace
    return env


class Templates:
    """Compiled templates by key."""

    def __init__(self, max_output: int) -> None:
        self._environment = environment()
        self._compiled: dict[str, Any] = {}
        self._max_output = max_output

    def answer(self, request: dict[str, Any]) -> dict[str, str]:
        try:
            key = request["key"]
            if "source" in request:
                self._compiled[key] = self._environment.from_string(request["source"])
            return {"text": self._render(self._compiled[key], request["variables"])}
        except Raised as error:
            return {"error": f"it says: {error}"}
        except MemoryError:
            return {"error": "it needs more memory than a chat template may have"}
        except RecursionError:
            return {"error": "it calls itself without end"}
        except Exception as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            return {"error": f"{type(error).__name__}: {str(error)[:1000]}{where}"}

    def _render(self, template: Any, variables: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in template.generate(variables):
            size += len(part)
            if size > self._max_output:
                raise ValueError(f"its output is longer than {self._max_output} characters")
            parts.append(part)
        return "".join(parts)


def receive(file: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at the end of the input."""
    head = file.read(4)
    if len(head) < 4:
        return None
    message: dict[str, Any] = json.loads(file.read(struct.unpack(">I", head)[0]))
    return message


def pack(message: dict[str, Any], limit: int = (1 << 32) - 1) -> bytes:
    """A message as it is sent. Raises ValueError beyond `limit` bytes, TypeError for what JSON does not have."""
    body = json.dumps(message).encode()
    if len(body) > limit:
        raise ValueError(f"it has {len(body)} bytes, allowed are {limit}")
    return struct.pack(">I", len(body)) + body


def main(settings: dict[str, Any]) -> None:
    """settings: path (where to import from), seconds (for one rendering), memory (bytes), max_output (characters)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes our input
    sys.path[:] = settings["path"]
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    templates = Templates(settings["max_output"])
    limit_memory(settings["memory"])
    answers.write(pack({}))
    answers.flush()
    while (request := receive(requests)) is not None:
        with time_limit(settings["seconds"]):
            answer = templates.answer(request)
        answers.write(pack(answer))
        answers.flush()


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except BaseException:
        os._exit(3)
