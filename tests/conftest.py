"""Fixtures shared by all tests: tiny random checkpoints, made on first use and kept for the session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import TINY, make_checkpoint


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
