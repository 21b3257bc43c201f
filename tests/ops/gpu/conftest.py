"""Fixtures of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where emulated kernels are compiled, each of them once."""
    return tmp_path_factory.mktemp("emulated")
