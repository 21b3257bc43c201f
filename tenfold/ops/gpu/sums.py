"""Memory where blocks that share a tile of a product meet."""

import torch

WORKSPACE = 64 << 20  # bytes for partial sums
MOST_TILES = 1 << 16


class Workspace:
    """Memory for partial sums and arrival counters of one stream of launches, kept at one place for graphs."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.empty(WORKSPACE // 4, dtype=torch.float32, device=device)
        self.counters = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
