"""Fixtures of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where emulated kernels are compiled, each of them once."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not written holds no numbers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
