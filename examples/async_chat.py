"""Many conversations side by side in one program; they share every step: python examples/async_chat.py [MODEL]"""

import asyncio
import sys

from tenfold import AsyncLLM, SamplingParams

questions = ["What is a prime number?", "Name three colours.", "What do bees make?"]


async def answer(llm: AsyncLLM, question: str) -> str:
    params = SamplingParams(max_tokens=40, temperature=0.7, seed=1)
    outputs = llm.chat([{"role": "user", "content": question}], params)
    return "".join([output.text async for output in outputs])


async def main() -> None:
    async with await AsyncLLM.load(*sys.argv[1:]) as llm:
        for question, text in zip(questions, await asyncio.gather(*(answer(llm, q) for q in questions))):
            print(f"{question}\n  {text.strip()}")
        print(f"{llm.stats().steps} steps for {llm.stats().generated_tokens} tokens")


asyncio.run(main())
