"""`tenfold chat`: a conversation in the terminal. Ctrl-C stops an answer, never the program."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.engine.llm import LLM
from tenfold.engine.request import Pictured, SamplingParams
from tenfold.serve.cli.load import load
from tenfold.serve.cli.run import answer, content, with_defaults

HELP = """\
/clear         forget the conversation
/system TEXT   set the system message (nothing: remove it) and forget the conversation
/image FILE    show a picture with the next question
/exit          leave; so does Ctrl-D
Ctrl-C stops an answer."""


@dataclass(slots=True)
class Conversation:
    """What was said so far."""

    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # files of pictures to show with the next question

    def messages(self) -> list[dict[str, Any]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": content(text, self.images)})
        self.images = []

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def drop_oldest(self) -> bool:
        """Forget the first question and its answer. False: only the last question is left."""
        if len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True


def chat(config: EngineConfig, *, system: str, images: list[str], sampling: dict[str, Any], quiet: bool) -> None:
    """Read lines, print answers, until the end of input or /exit. images: files of pictures to show with the first
    question.
    """
    talk = Conversation(system, images=images)
    with load(LLM, config, quiet) as llm:
        params = with_defaults(llm, sampling, chat=True)
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  input() edits lines and keeps a history once this is imported; absent on Windows
            print("/help lists the commands", file=sys.stderr)
        while (line := read_line(interactive)) is not None:
            if line.startswith("/"):
                if not command(line, talk):
                    break
            elif line.strip():
                reply(llm, params, talk, line, quiet)


def read_line(interactive: bool) -> str | None:
    """The next line; None at the end of input."""
    while True:
        try:
            return input("> ") if interactive else input()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D to leave", file=sys.stderr)


def command(line: str, talk: Conversation) -> bool:
    """Do what a line that begins with / asks. False: leave."""
    name, _, rest = line.strip().partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/image" and rest.strip():
        talk.images.append(rest.strip())
        print(f"the next question shows {len(talk.images)} picture(s)", file=sys.stderr)
    elif name in ("/clear", "/system"):
        talk.turns.clear()
        talk.images.clear()
        if name == "/system":
            talk.system = rest.strip()
        print("the conversation starts anew", file=sys.stderr)
    else:
        print(HELP if name == "/help" else f"{name} is no command.\n{HELP}", file=sys.stderr)
    return True


def reply(llm: LLM, params: SamplingParams, talk: Conversation, line: str, quiet: bool) -> None:
    """Answer one line. What goes wrong is told, and the question forgotten; the conversation goes on."""
    talk.ask(line)
    said: list[str] = []
    try:
        watch = answer(llm, prompt_that_fits(llm, talk), params, said)
        if not quiet:
            print(watch, file=sys.stderr)
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        talk.turns.pop()
        return
    talk.add("assistant", "".join(said))


def prompt_that_fits(llm: LLM, talk: Conversation) -> list[int] | Pictured:
    """The conversation as a prompt. Beyond three quarters of the context its oldest turns are forgotten."""
    asked = llm.prompt_for(talk.messages())
    while len(asked) > llm.max_model_len * 3 // 4 and talk.drop_oldest():
        print("(the oldest turn is forgotten: the context is full)", file=sys.stderr)
        asked = llm.prompt_for(talk.messages())
    return asked
