"""Products that follow each other in a captured graph, where each begins before the one in front has ended."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_replays(product: Callable[[], Tensor], times: int = 5) -> None:
    """Every replay gives the bits of a plain call, whatever lay in the result before."""
    wanted = product()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = product()
    for _ in range(times):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)
