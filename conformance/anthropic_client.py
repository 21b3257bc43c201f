"""The Anthropic Python client against a running server: `anthropic_client.py URL KEY`."""

import sys
from collections.abc import Callable
from typing import Any

import anthropic
from anthropic import Anthropic
from checks import run

ASK: Any = [{"role": "user", "content": "Say hello to Ann in one short sentence."}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

ONE_CALL: Any = {"type": "any", "disable_parallel_tool_use": True}


def message(client: Anthropic) -> None:
    answer = client.messages.create(model="default", max_tokens=12, system="Be brief.", messages=ASK)
    assert answer.content[0].type == "text"
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.usage.input_tokens > 0


def stream(client: Anthropic) -> None:
    with client.messages.stream(model="default", max_tokens=12, messages=ASK) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert final.content[0].type == "text"
    assert final.content[0].text == text
    assert final.usage.output_tokens > 0


def stop_sequence(client: Anthropic) -> None:
    answer = client.messages.create(
        model="default",
        max_tokens=40,
        stop_sequences=[","],
        messages=[{"role": "user", "content": "List three fruits, separated by commas."}],
    )
    assert answer.stop_reason != "stop_sequence" or answer.stop_sequence == ","


def tools(client: Anthropic) -> None:
    asked = [{"role": "user", "content": "How is the weather in Rome?"}]
    answer = client.messages.create(
        model="default", max_tokens=80, tools=[WEATHER], tool_choice=ONE_CALL, messages=asked
    )
    used = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use"
    assert used.name == "get_weather"
    assert "city" in used.input
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "Sunny, 24 degrees."}
    turns = [*asked, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(model="default", max_tokens=12, tools=[WEATHER], messages=turns).content


def count(client: Anthropic) -> None:
    assert client.messages.count_tokens(model="default", messages=ASK).input_tokens > 5


def errors(client: Anthropic) -> None:
    told: Any = None
    try:
        client.messages.create(model="no-such-model", max_tokens=5, messages=ASK)
    except anthropic.NotFoundError as error:
        told = error.body
    assert told, "an unknown model was accepted"
    assert told["type"] == "error"
    try:
        Anthropic(base_url=str(client.base_url), api_key="wrong", max_retries=0).messages.create(
            model="default", max_tokens=5, messages=ASK
        )
    except anthropic.AuthenticationError:
        return
    raise AssertionError("a wrong key was accepted")


CHECKS: tuple[Callable[[Anthropic], None], ...] = (message, stream, stop_sequence, tools, count, errors)


def main() -> None:
    url, key = sys.argv[1:]
    run(f"anthropic {anthropic.__version__}", CHECKS, Anthropic(base_url=url, api_key=key, max_retries=0, timeout=120))


if __name__ == "__main__":
    main()
