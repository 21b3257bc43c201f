"""`tenfold explain` and `tenfold tune`: what runs each linear operation of a model on this CPU, and measuring it."""

import sys
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.engine.memory import DTYPES
from tenfold.engine.opened import Opened
from tenfold.models.table import build_model
from tenfold.ops.choose import Choice
from tenfold.ops.cpu import arms
from tenfold.ops.cpu.tune import tune_linear
from tenfold.ops.matrix import Matrix
from tenfold.serve.cli.terminal import columns
from tenfold.weights.load import Weights


class Collecting(Weights):
    """Weights that remember the matrices they made."""

    matrices: list[Matrix]

    def matrix(self, *names: str, **shape: Any) -> Matrix:
        made = super().matrix(*names, **shape)
        self.matrices.append(made)
        return made


def explain(config: EngineConfig) -> None:
    """Print one row for each shape and batch size."""
    show(arms.explain(matrices(config)))


def tune(config: EngineConfig) -> None:
    """Measure, save, print. The machine should be idle."""
    found = matrices(config)
    is_terminal = sys.stderr.isatty()

    def progress(done: int, total: int, what: str) -> None:
        print(f"{done + 1}/{total}  {what}", end="\x1b[K\r" if is_terminal else "\n", file=sys.stderr, flush=True)

    chosen = tune_linear(found, progress=progress)
    if is_terminal:
        print(end="\x1b[K", file=sys.stderr)
    show(chosen)
    print(f"saved in {arms.table().path}", file=sys.stderr)


def matrices(config: EngineConfig) -> list[Matrix]:
    """All matrices of a model, as the compiled kernels hold them. Raises ValueError where they are not used."""
    opened = Opened(config)
    opened.choose()
    if opened.kernels.name != "native":
        raise ValueError(
            f"The {opened.kernels.name} kernels have one way to run a linear operation ({opened.kernels.reason}); "
            "choices are made among the compiled CPU kernels. `tenfold doctor` says whether they are there."
        )
    weights = Collecting(
        opened.checkpoint, opened.kernels, opened.device, DTYPES[opened.config.dtype], opened.config.weights
    )
    weights.matrices = []
    build_model(opened.checkpoint.config, weights, opened.memory.max_model_len)
    return weights.matrices


def show(chosen: list[Choice]) -> None:
    rows = [("WEIGHT", "FORMAT", "BATCH", "THREADS", "RUNS", "TIME", "BECAUSE")]
    for c in chosen:
        k = c.key
        took = f"{c.microseconds:.1f} us" if c.microseconds is not None else ""
        why = c.source
        if c.runner_up is not None:
            why += f"; {c.runner_up} takes {c.runner_up_microseconds:.1f} us"
        rows.append((f"{k.rows} x {k.cols}", k.format, str(k.batch), str(k.budget), c.arm, took, why))
    print(columns(rows))
