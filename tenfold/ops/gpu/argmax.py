"""The best token of each row of logits in one launch: csrc/argmax.cu. PyTorch's takes 28 us for one row of 128k
(H100, 2026-11-28), this a few.
"""

from functools import cache

import torch
from torch import Tensor

from tenfold.ops.gpu import nvrtc

MOST_ROWS = 4096
BLOCKS = 264  # of all rows together: two a multiprocessor of an H100


@cache
def available(device: int) -> bool:
    """Whether the kernel can run on a CUDA device."""
    if torch.cuda.get_device_capability(device) != nvrtc.CAPABILITY:
        return False
    try:
        nvrtc.check_available()
    except nvrtc.CompileError:
        return False
    return True


def can_run(logits: Tensor) -> bool:
    """Whether `argmax` takes these logits, which lie on a CUDA device."""
    return logits.dtype == torch.float32 and logits.stride(-1) == 1 and available(logits.device.index)


@cache
def _meeting(device: int, stream: int) -> tuple[Tensor, Tensor]:
    """Best key and arrivals of each row, zero between launches; each stream has its own."""
    where = torch.device("cuda", device)
    return torch.zeros(MOST_ROWS, dtype=torch.int64, device=where), torch.zeros(
        MOST_ROWS, dtype=torch.int32, device=where
    )


def argmax(logits: Tensor) -> Tensor:
    """As `ops.sample.argmax` for logits [R, V] float32 on a GPU, rows contiguous."""
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best, arrived = _meeting(logits.device.index, torch.cuda.current_stream().cuda_stream)
    blocks = max(1, min(BLOCKS // max(1, rows), -(-width // 2048)))
    kernel = nvrtc.load("argmax.cu", "argmax", ())
    for start in range(0, rows, MOST_ROWS):
        part = logits[start : start + MOST_ROWS]
        arguments: list[nvrtc.Argument] = [part, tokens[start:], best, arrived, width, part.stride(0)]
        kernel((blocks, len(part), 1), 256, 0, arguments, dependent=True)
    return tokens
