"""What tests of emulated kernels share."""

import shutil

import pytest
import torch
from torch import Tensor

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
MARKS = [NEEDS_COMPILER, pytest.mark.timeout(300)]
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
