"""Which kernels a decode step or a prefill runs on a GPU, and for how long, as PyTorch's profiler sees them:

    python -m tenfold.bench.profile --model shape:llama-3-8b --batch 1 --context 1024 [--set weights=int4] [--prefill]

Kernels that begin before the one in front has ended wait inside their own time, so the sum is more than a step takes:
what that takes by the clock, without the profiler, stands behind it. What a kernel adds to a step is from the end of
the one in front to its own.
"""

import argparse
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.bench.command import settings
from tenfold.bench.engines import Engine, Setup, make_engine

TOKENS = 33  # of the answers whose steps are counted
SHOWN = 20


@dataclass(slots=True)
class Kernel:
    """launches, microseconds, and those that it adds, of all steps together or of one."""

    launches: float = 0.0
    microseconds: float = 0.0
    adds: float = 0.0


def added_up(events: Iterable[tuple[str, float, float]]) -> dict[str, Kernel]:
    """By the name of the kernel. events: name, begin and end in microseconds, in any order."""
    found: dict[str, Kernel] = {}
    before: float | None = None
    for name, begin, end in sorted(events, key=lambda event: event[2]):
        kernel = found.setdefault(name, Kernel())
        kernel.launches += 1
        kernel.microseconds += end - begin
        kernel.adds += end - (begin if before is None else before)
        before = end
    return found


def a_step(long: Mapping[str, Kernel], short: Mapping[str, Kernel], steps: int) -> dict[str, Kernel]:
    """What one of the steps took that the long run has more than the short one."""
    none = Kernel()
    return {
        name: Kernel(
            (kernel.launches - short.get(name, none).launches) / steps,
            (kernel.microseconds - short.get(name, none).microseconds) / steps,
            (kernel.adds - short.get(name, none).adds) / steps,
        )
        for name, kernel in long.items()
    }


def lines(kernels: Mapping[str, Kernel], clock: float) -> list[str]:
    """The sum and what a clock says, in microseconds, then the kernels that take longest."""
    total = sum(kernel.microseconds for kernel in kernels.values())
    rows = sorted(kernels.items(), key=lambda pair: -pair[1].microseconds)[:SHOWN]
    return [f"{total:10.1f} us in all, {clock:.1f} us by the clock"] + [
        f"{kernel.microseconds:10.1f} us  {kernel.launches:7.1f} x "
        f"{kernel.microseconds / max(kernel.launches, 1e-9):9.2f}  "
        f"adds {kernel.adds / max(kernel.launches, 1e-9):7.2f}  {name[:90]}"
        for name, kernel in rows
        if kernel.launches > 0
    ]


def recorded(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Kernel]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        engine.generate(prompts, tokens)
        torch.cuda.synchronize()
    events: Any = seen.events()
    return added_up(
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA"
    )


def taken(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Microseconds of an answer of so many tokens, as the clock says."""
    begin = time.perf_counter()
    engine.generate(prompts, tokens)
    return 1e6 * (time.perf_counter() - begin)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.profile", description=__doc__.partition(":\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", action="store_true", help="of the prompts, not of a token behind them")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig")
    given = parser.parse_args(arguments)
    own = settings(given.set)
    engine = make_engine(
        "tenfold",
        Setup(given.model, batch=given.batch, context=given.context + 2 * TOKENS, device="cuda", settings=own),
    )
    draw = random.Random(1)

    def prompts() -> list[list[int]]:
        return [draw.choices(range(30_000), k=given.context) for _ in range(given.batch)]

    for _ in range(3):  # kernels are compiled and graphs captured
        engine.generate(prompts(), 1 if given.prefill else TOKENS)
    same = prompts()
    if given.prefill:
        clock = taken(engine, same, 1)
        found = recorded(engine, prompts(), 1)
    else:
        engine.generate(same, 1)
        clock = (taken(engine, same, TOKENS) - taken(engine, same, 1)) / (TOKENS - 1)
        found = a_step(recorded(engine, same, TOKENS), recorded(engine, same, 1), TOKENS - 1)
    print("\n".join(lines(found, clock)))


if __name__ == "__main__":
    main()
