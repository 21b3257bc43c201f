"""A model that calls a function of ours: start `tenfold serve`, then python examples/server_tools.py [URL]"""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=f"{(sys.argv[1:] or ['http://127.0.0.1:8000'])[0]}/v1", api_key="none")

WEATHER = {"Rome": "sunny, 24 degrees", "Oslo": "snow, -3 degrees"}
tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": sorted(WEATHER)}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
messages = [{"role": "user", "content": "How is the weather in Rome?"}]
asked = {"model": "default", "tools": [tool], "max_completion_tokens": 100, "temperature": 0}

# A large model decides by itself (tool_choice "auto"); the small default model is told to call.
first = client.chat.completions.create(messages=messages, tool_choice="required", parallel_tool_calls=False, **asked)
call = first.choices[0].message.tool_calls[0]
city = json.loads(call.function.arguments)["city"]
print(f"{call.function.name}({city!r}) -> {WEATHER[city]}")

messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER[city]}]
print(client.chat.completions.create(messages=messages, tool_choice="none", **asked).choices[0].message.content)
