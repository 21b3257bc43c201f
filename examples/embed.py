"""Which sentence is closest in meaning? python examples/embed.py [MODEL]

Pooled hidden states of a language model are a rough measure; a model trained for embeddings is better.
"""

import sys

from tenfold import LLM

sentences = ["A cat sleeps on the sofa.", "The stock market fell today.", "My kitten is napping."]

with LLM(*sys.argv[1:]) as llm:
    vectors = llm.embed(sentences)
    for sentence, likeness in zip(sentences, vectors @ vectors[0]):
        print(f"{likeness:.3f}  {sentence}")
