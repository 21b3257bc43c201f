"""Random weights in every storage, as bytes of a file would hold them."""

import torch
from torch import Tensor

from tenfold.ops.blocks import BLOCKS, dequantize, row_bytes
from tenfold.ops.matrix import RawTensor

SCALES = {  # byte offsets of a block's float16 scales: random bytes there would be infinities and NaNs
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = (*SCALES, *DENSE)


def width(storage: str, blocks: int) -> int:
    """Columns of `blocks` blocks; dense storages get an odd number."""
    return blocks * 32 + 5 if storage in DENSE else blocks * (256 if storage.endswith("_K") else 32)


def random_weight(storage: str, rows: int, cols: int, seed: int = 0) -> RawTensor:
    """Any codes and group scales; float16 scales of both signs that make weights of about 1."""
    make = torch.Generator().manual_seed(seed)
    if storage in DENSE:
        data = torch.randn(rows, cols, generator=make).to(DENSE[storage])
    else:
        size = BLOCKS[storage].nbytes
        blocks = row_bytes(storage, cols) // size
        data = torch.randint(0, 256, (rows, blocks, size), dtype=torch.uint8, generator=make)
        for at in SCALES[storage]:
            scale = torch.randn(rows, blocks, 1, generator=make) * 0.05
            data[:, :, at : at + 2] = scale.half().view(torch.uint8)
        data = data.view(rows, blocks * size)
    return RawTensor(f"random.{storage}", storage, (rows, cols), data)


def numbers(*parts: RawTensor) -> Tensor:
    """The stacked values in float64."""
    return torch.cat([dequantize(part) for part in parts]).double()
