"""Seconds from process start to the first token on standard output, ours and llama.cpp's, as whole processes."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

PEER = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[2]), verbose=False)
messages = [{"role": "user", "content": sys.argv[3]}]
for piece in model.create_chat_completion(messages, stream=True, max_tokens=4, temperature=0):
    text = piece["choices"][0]["delta"].get("content")
    if text:
        print(text, flush=True)
"""
QUESTION = "What is the capital of France?"


def command(engine: str, model: str, threads: int) -> list[str]:
    if engine == "tenfold":
        options = ["--model", model, "--threads", str(threads), "--max-tokens", "4"]
        return [sys.executable, "-m", "tenfold.serve.cli", "run", *options, QUESTION]
    return [sys.executable, "-c", PEER, model, str(threads), QUESTION]


def first_output(arguments: Sequence[str]) -> float:
    """Seconds until the process writes its first byte to standard output. Raises RuntimeError when it fails."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        error = process.stderr.read().decode(errors="replace")
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{arguments[:4]} failed: {error[-1000:]}")
    return seconds


def measure(engines: Sequence[str], model: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Samples by engine, in turn, after one warm-up each (files in the page cache)."""
    for engine in engines:
        first_output(command(engine, model, threads))
    samples: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            samples[engine].append(first_output(command(engine, model, threads)))
    return samples
