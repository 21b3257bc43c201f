"""A chat whose answer appears as it is made: python examples/stream.py [MODEL]"""

import sys

from tenfold import LLM, SamplingParams

messages = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Why do cats purr?"},
]

with LLM(*sys.argv[1:]) as llm, llm.chat_stream(messages, SamplingParams(max_tokens=60, temperature=0)) as outputs:
    for output in outputs:
        print(output.text, end="", flush=True)
    print()
