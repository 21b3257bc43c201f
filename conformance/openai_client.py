"""The OpenAI Python client, whatever its major version, against a running server: `openai_client.py URL KEY`."""

import json
import sys
from collections.abc import Callable
from typing import Any

import openai
from checks import run
from openai import OpenAI

ASK: Any = [{"role": "user", "content": "Say hello to Ann in one short sentence."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert listed
    assert client.models.retrieve(listed[0].id).id == listed[0].id


def chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=ASK, max_completion_tokens=12, n=2, temperature=0)
    assert len(answer.choices) == 2
    assert answer.choices[0].message.content == answer.choices[1].message.content
    assert answer.usage
    assert answer.usage.completion_tokens > 0
    assert answer.system_fingerprint


def chat_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=ASK, max_completion_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model="default",
        messages=ASK,
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage
    assert whole.usage
    assert usage.completion_tokens == whole.usage.completion_tokens


def chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=ASK, max_completion_tokens=3, logprobs=True, top_logprobs=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert all(len(place.top_logprobs) == 4 and place.logprob <= 0 for place in logprobs.content)


def chat_json(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Invent a person."}],
        max_completion_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}


def chat_tools(client: OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "How is the weather in Rome?"}],
            tools=[WEATHER],
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=False,
            max_completion_tokens=60,
        )
        calls = answer.choices[0].message.tool_calls
        assert calls
        assert answer.choices[0].finish_reason in ("tool_calls", "stop")
        assert calls[0].function.name == "get_weather"  # type: ignore[union-attr]
        assert "city" in json.loads(calls[0].function.arguments)  # type: ignore[union-attr]


def chat_tools_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_completion_tokens=60,
        stream=True,
    )
    name, arguments = "", ""
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            assert call.function
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "get_weather"
    assert "city" in json.loads(arguments)


def completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt=["The capital of France is", "One, two,"], max_tokens=4, echo=True, logprobs=2
    )
    assert [choice.text[:4] for choice in answer.choices] == ["The ", "One,"]
    assert answer.choices[0].logprobs
    assert answer.choices[0].logprobs.tokens


def embeddings(client: OpenAI) -> None:
    by_default = client.embeddings.create(model="default", input=["a cat", "a dog"])
    floats = client.embeddings.create(model="default", input=["a cat", "a dog"], encoding_format="float")
    assert len(by_default.data) == 2
    for one, other in zip(by_default.data, floats.data):
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding)) < 1e-6


def responses(client: OpenAI) -> None:
    first = client.responses.create(model="default", input="Say hello.", max_output_tokens=12)
    assert first.output_text
    assert client.responses.retrieve(first.id).id == first.id
    second = client.responses.create(
        model="default", input="And again.", previous_response_id=first.id, max_output_tokens=12
    )
    assert second.previous_response_id == first.id
    client.responses.delete(first.id)


def responses_stream(client: OpenAI) -> None:
    text, kinds = "", []
    for event in client.responses.create(model="default", input="Say hello.", max_output_tokens=8, stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert text


def responses_tools(client: OpenAI) -> None:
    answer = client.responses.create(
        model="default",
        input="How is the weather in Rome?",
        tools=[{"type": "function", "strict": True, **WEATHER["function"]}],
        tool_choice="required",
        max_output_tokens=60,
    )
    call = next(item for item in answer.output if item.type == "function_call")
    assert "city" in json.loads(call.arguments)


def decisions(client: OpenAI) -> None:
    if not hasattr(client, "decisions"):
        return  # came with 3.x
    answer = client.decisions.create(
        model="default",
        input="What a lovely day!",
        questions=[
            {"type": "predicate", "instructions": "The text is cheerful."},
            {"type": "choice", "instructions": "Mood", "choices": [{"value": "good"}, {"value": "bad"}]},
        ],
    )
    assert answer


def errors(client: OpenAI) -> None:
    for wrong, kind in (
        ({"model": "no-such-model"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"n": 10**6}, openai.BadRequestError),
    ):
        told: Any = None
        try:
            client.chat.completions.create(**{"model": "default", "messages": ASK} | wrong)  # type: ignore[call-overload]
        except kind as error:
            told = error.body
        assert told, f"{wrong} was accepted"
    try:
        OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was accepted")


CHECKS: tuple[Callable[[OpenAI], None], ...] = (
    *(models, chat, chat_stream, chat_logprobs, chat_json, chat_tools, chat_tools_stream, completions, embeddings),
    *(responses, responses_stream, responses_tools, decisions, errors),
)


def main() -> None:
    url, key = sys.argv[1:]
    run(f"openai {openai.__version__}", CHECKS, OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120))


if __name__ == "__main__":
    main()
