"""`tenfold calibrate softmax`: measure a model's attention scores, write them beside it, and say what they mean."""

from pathlib import Path

import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.calibrate import calibrate
from tenfold.ops.attention.unified_max import window
from tenfold.serve.cli.terminal import Bar, columns, loading
from tenfold.weights.softmax import RARE, SoftmaxStatistics, save

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def softmax(config: EngineConfig, text: Path, size: int, count: int, as_json: bool) -> None:
    """Measure, save, print."""
    bar = Bar("measuring")
    try:
        with loading(quiet=False) as progress:
            found, opened = calibrate(config, text, size, count, bar.update, progress)
    finally:
        bar.stop()
    path = save(found, opened.checkpoint)
    if as_json:
        print(path.read_text(encoding="utf-8"))
        return
    print(describe(found))
    print(f"saved in {path}")


def describe(found: SoftmaxStatistics) -> str:
    """The ranges, and for which types of weights a unified maximum would serve."""
    low, high = min(map(min, found.low)), max(map(max, found.high))
    widest = max(h - low for lows, highs in zip(found.low, found.high) for low, h in zip(lows, highs))
    rows = [
        ("tokens measured", str(found.tokens)),
        ("99.99 % of all scores", f"{found.score_low:.1f} to {found.score_high:.1f}"),
        ("largest scores of rows", f"{low:.1f} to {high:.1f}, of one head at most {widest:.1f} wide"),
    ]
    for name, dtype in TYPES.items():
        safe, layers = window(dtype), found.phi(dtype)
        one = found.model_phi(dtype)
        rows.append((f"{name}, one phi for the model", "serves none" if one is None else f"{one:.1f} serves all rows"))
        served = sum(phi is not None for phi in layers)
        words = (
            f"serves {served} of {len(layers)} layers (window {safe.width:.1f} wide, all but {2 * RARE:.1%} of rows)"
        )
        rows.append((f"{name}, a phi for each head", words))
    return columns(rows)
