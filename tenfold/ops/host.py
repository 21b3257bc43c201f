"""Numbers of the host on their way to a device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sent(values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the numbers on a device, of their own type where none is named. On a GPU they travel while the host
    goes on: a copy out of memory that may be swapped would wait for all that the stream has been given before.
    """
    found = torch.from_numpy(values).to(dtype) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
