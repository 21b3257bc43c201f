"""Several prompts at once: python examples/offline.py [MODEL]"""

import sys

from tenfold import LLM, SamplingParams

prompts = ["The capital of France is", "The sun rises in the", "One, two, three,"]

with LLM(*sys.argv[1:]) as llm:
    for done in llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0)):
        print(done.prompt + done.text)
        print(f"  [{done.usage.completion_tokens} tokens, the first after {done.timing.ttft:.2f} s]")
