from collections.abc import Iterator

import numpy as np
import pytest

from tests import interpreter


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> None:
    interpreter.mend()


@pytest.fixture(autouse=True)
def floating_point_as_on_a_gpu() -> Iterator[None]:
    """An overflow is an infinity, not a warning."""
    with np.errstate(all="ignore"):
        yield
