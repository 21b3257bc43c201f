"""SmolLM2 as users meet it: the answer of `tenfold run`, a server under several clients, and Ctrl-C in a chat."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from tenfold.bench.serving import command
from tests.e2e.conftest import environment

pytestmark = pytest.mark.real_model
QUESTION = "What is 2 + 2? Answer with one number."
PATIENCE = 60  # seconds


def test_run(tenfold, smollm2):
    result = tenfold("run", "--model", str(smollm2), "--max-tokens", "40", "--raw", "The capital of France is")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_serve(serve, smollm2):
    with serve("--model", str(smollm2), "--max-model-len", "512") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

            def ask(question, **fields):
                messages = [{"role": "user", "content": question}]
                given = {"model": "default", "messages": messages, "max_tokens": 24, "temperature": 0} | fields
                return client.chat.completions.create(**given)

            whole = ask(QUESTION).choices[0].message.content
            streamed = "".join(e.choices[0].delta.content or "" for e in ask(QUESTION, stream=True))
            assert streamed == whole
            completion = client.completions.create(
                model="default", prompt="1, 2, 3, 4, 5,", max_tokens=4, temperature=0
            )
            assert completion.choices[0].text.startswith(" 6")
            questions = [f"What is {i} + {i}?" for i in range(6)]
            with ThreadPoolExecutor(len(questions)) as pool:
                answers = list(pool.map(ask, questions))
            assert all(a.choices[0].message.content for a in answers)
        examples = sorted((Path(__file__).parents[2] / "examples").glob("server_*.py"))
        said = {path.name: run_example(path, server.url) for path in examples}
        assert re.search(r"\d+ tokens$", said.pop("server_stream.py"))
        assert set(json.loads(said.pop("server_json.py"))) == {"dish", "minutes", "ingredients"}
        assert said.pop("server_tools.py").startswith("get_weather('")
        assert not said
        assert server.stop() == 0


def run_example(path, url):
    done = subprocess.run([sys.executable, path, url], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Terminal:
    """A program that believes to be in a terminal."""

    def __init__(self, *arguments):
        self.fd, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        # A shell starts background jobs with SIGINT ignored, and children would inherit that; a terminal's do not.
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **streams,
        )
        os.close(theirs)
        self.unread = b""

    def until(self, text, patience=PATIENCE):
        return self.until_match(re.escape(text), patience)

    def until_match(self, pattern, patience=PATIENCE):
        """Read on to what fits the pattern. Returns what came before."""
        end = time.monotonic() + patience
        while (found := re.search(pattern, self.unread)) is None:
            assert time.monotonic() < end, self.unread
            if select.select([self.fd], [], [], 0.1)[0]:
                self.unread += os.read(self.fd, 4096)
        seen, self.unread = self.unread[: found.start()], self.unread[found.end() :]
        return seen

    def type(self, text):
        os.write(self.fd, text)

    def interrupt(self):
        """What Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, text):
        """Ctrl-C and a line, again where the signal came before input() was ready for it, as a person would."""
        for _ in range(4):
            self.interrupt()
            self.type(b"\n")
            with suppress(AssertionError):
                return self.until(text, PATIENCE / 4)
        raise AssertionError(self.unread)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def test_ctrl_c_stops_the_answer_and_not_the_chat(smollm2):
    terminal = Terminal("chat", str(smollm2), "--max-tokens", "4000", "--temperature", "1.5")
    try:
        terminal.until(b"> ")
        terminal.interrupt_until(b"Ctrl-D to leave")
        terminal.until(b"> ")
        terminal.type(b"Write a very long story about a dragon.\n")
        terminal.until(b"story about a dragon.\r\n")
        # The answer has begun. Prompts come before it where lines were typed while the signal was awaited.
        terminal.until_match(rb"[A-Za-z]")
        terminal.interrupt()
        terminal.until(b"(stopped)")
        terminal.until(b"> ")
        terminal.type(b"/exit\n")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()
