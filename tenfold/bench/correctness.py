"""Correctness claims: greedy tokens against transformers on the real model (A5), and counted tests."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

from tenfold.base.config import EngineConfig
from tenfold.bench.claims import Claim, called, claim
from tenfold.bench.engines import Setup
from tenfold.bench.hardware import ROOT
from tenfold.bench.peers.hugging_face import Loop
from tenfold.engine.core import Engine
from tenfold.engine.request import Request, SamplingParams
from tenfold.engine.text import Text
from tenfold.weights.default_model import NAMES

TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "Dear Sir or Madam,",
    "In 1969, the first humans",
    "To make bread you need flour,",
    "The opposite of hot is",
    "1, 2, 3, 4, 5,",
    "Photosynthesis is the process by which",
    "The quick brown fox",
    "import numpy as np",
    "A triangle has three sides, a square has",
    "She opened the door and saw",
    "The largest planet of the solar system",
    "Thank you very much for",
    "SELECT name FROM users WHERE",
    "The meaning of life",
    "Yesterday it rained, so today",
)
# id, what the tests show, and how pytest selects them.
TESTS = (
    (
        "A5",
        "greedy tokens equal transformers float32: 64 tokens, 20 prompts, tiny random checkpoint of each family",
        ("tests/models/test_parity.py", "-k", "greedy"),
    ),
    (
        "A6",
        "greedy output equal alone, in any batch, chunk, after prefix hit, preemption, any schedule",
        ("tests/engine/test_invariance.py",),
    ),
    (
        "S6",
        "wrong or missing keys, oversized, deep, broken, negative, NaN and huge requests get a 4xx in the API's shape",
        tuple(
            f"tests/serve/test_{name}.py" for name in ("bad_requests", "malformed", "guard_socket", "nesting", "caps")
        ),
    ),
)


def continuations(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of every prompt, all of them served together."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), params))
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].extend(output.tokens)
    return list(found.values())


def real_model(model: str, command: str, say: Callable[[str], None]) -> list[Claim]:
    """Prompts whose greedy continuation in float32 equals transformers' to the last token, for both kernel sets."""
    reference = Loop(Setup(model, 2, 1, 1024))
    prompts: list[list[int]] = []
    expected: list[list[int]] = []
    claims, name = [], "SmolLM2" if model in NAMES else called(model)
    for kernels in ("torch", "native"):
        engine = Engine.load(
            EngineConfig(model=model, kernels=kernels, weights="dense", dtype="float32", max_model_len=1024)
        )
        if not prompts:
            assert isinstance(engine.text, Text)
            prompts = [engine.text.encode(prompt) for prompt in PROMPTS]
            expected = [reference.generate([prompt], TOKENS).tokens[0] for prompt in prompts]
        equal = sum(a == b for a, b in zip(continuations(engine, prompts), expected))
        what = f"greedy tokens equal transformers float32: {TOKENS} tokens, {name} real weights, {kernels} kernels"
        say(f"{what}: {equal} of {len(prompts)} prompts")
        count = len(prompts)
        claims.append(claim("A5", what, equal, "prompts", command, at_least=count, kind="correctness"))
    return claims


def counted(command: str, say: Callable[[str], None], only: Sequence[str] = ()) -> list[Claim]:
    """Runs the tests that prove claims, `only` some where given; the value is how many passed, the target how many
    there are.
    """
    claims = []
    for id, what, selection in [row for row in TESTS if not only or row[0] in only]:
        passed, total = run_tests(selection)
        say(f"{what}: {passed} of {total} tests")
        note = f"pytest {' '.join(selection)}"
        claims.append(claim(id, what, passed, "tests", command, at_least=total, kind="correctness", note=note))
    return claims


def run_tests(selection: Sequence[str]) -> tuple[int, int]:
    """Tests passed (skipped ones are not) and tests selected. Raises RuntimeError when none was."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *selection]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest could not run: {result.stdout[-1000:]}{result.stderr[-1000:]}")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    total = int(suite.attrib["tests"])
    if total == 0:
        raise RuntimeError(f"pytest {' '.join(selection)} selected no test.")
    return total - sum(int(suite.attrib[name]) for name in ("failures", "errors", "skipped")), total
