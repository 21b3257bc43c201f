"""A server whose model is a table of answers, for `canitoolcall probe`.

    python conformance/puppet.py PORT

The probe asks a model to call tools and looks at how the server tells it. The bundled model is too small to decide on
a call by itself, so here the decisions are written down, in the words of a model that thinks first and writes Hermes
calls; all the rest is Tenfold's own: the request, the parser and the answer, whole and streamed.
"""

import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import uvicorn

from tenfold.engine.request import FinishReason, Grammar, Output, SamplingParams
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig

Call = tuple[str, Mapping[str, Any]]
MEETING = {
    "title": "Design review",
    "start": "2026-10-01T15:00:00Z",
    "attendees": [{"name": "Ana", "email": "ana@example.com"}, {"name": "Bo", "email": "bo@example.com"}],
    "location": {"city": "Berlin", "room": "4.12"},
}
NOTE = {"title": "Grüße aus Zürich", "body": "Café ☕ in 東京 — naïve résumé 🚀"}
# What is asked last, and the calls or the text it is answered with.
ANSWERS: tuple[tuple[str, list[Call] | str], ...] = (
    ("<tool>", "It is 18 °C in Paris and the sky is clear."),
    ("in Paris and in Tokyo", [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Tokyo"})]),
    ("weather in Paris", [("get_weather", {"city": "Paris"})]),
    ("17 + 25", "42"),
    ("Create an event", [("create_event", MEETING)]),
    ("Save a note", [("save_note", NOTE)]),
    ("What time is it", [("get_server_time", {})]),
    ("Lisbon", [("get_weather", {"city": "Lisbon"})]),
    ("9.11 or 9.9", [("record_answer", {"answer": "9.9"})]),
)


def written(question: str) -> str:
    """The model's words. A result in the prompt is answered before the question it belongs to."""
    answer = next((answer for asked, answer in ANSWERS if asked in question), "I do not know.")
    if isinstance(answer, str):
        text = answer
    else:
        calls = [json.dumps({"name": name, "arguments": given}, ensure_ascii=False) for name, given in answer]
        text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    return f"<think>\nLet me see.\n</think>\n\n{text}"


class Puppet:
    """What the server needs of an AsyncLLM. A token is a character."""

    vocab_size = 0x110000
    max_model_len = 1 << 16
    alive = ready = True
    state = "ready"
    restarts = 0
    text = SimpleNamespace(template="{{ tools }}<tool_call></think>", tokenizer=None)

    def default_params(self, chat: bool = False) -> SamplingParams:
        return SamplingParams()

    def stats(self) -> None:
        return None

    def check_grammar(self, grammar: Grammar) -> None:
        pass

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
        return [ord(c) for c in "".join(f"<{m['role']}>{m['content']}" for m in messages)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode()

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, **rest: Any
    ) -> AsyncIterator[Output]:
        answer = written(self.decode(prompt))
        if params.grammar is not None and not answer.partition("</think>")[2].strip().startswith("<tool_call>"):
            raise ValueError("The puppet has no call to answer this with.")
        for i, c in enumerate(answer):
            finish = FinishReason.STOP if i == len(answer) - 1 else None
            yield Output(request_id, 0, (ord(c),), c, finish=finish)


if __name__ == "__main__":
    puppet: Any = Puppet()
    uvicorn.run(
        create_app({"puppet": puppet}, ServeConfig()), host="127.0.0.1", port=int(sys.argv[1]), log_level="error"
    )
