"""A streamed chat over HTTP, with OpenAI's client: tenfold serve, then python examples/server_stream.py [URL]"""

import sys

from openai import OpenAI

client = OpenAI(base_url=f"{(sys.argv[1:] or ['http://127.0.0.1:8000'])[0]}/v1", api_key="none")

stream = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Why do cats purr? Answer in one sentence."}],
    max_completion_tokens=60,
    stream=True,
    stream_options={"include_usage": True},
)
for event in stream:
    if event.choices:
        print(event.choices[0].delta.content or "", end="", flush=True)
    if event.usage:
        print(f"\n{event.usage.completion_tokens} tokens")
