"""`tenfold calibrate softmax`: measure a model's attention scores, write them beside it, and say what they mean."""

from pathlib import Path

import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.calibrate import LARGEST_TEXT, calibrate
from tenfold.ops.attention.unified_max import window
from tenfold.serve.cli.terminal import Bar, columns, loading
from tenfold.weights.softmax import RARE, SoftmaxStatistics, save

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST_TOKENS = round(1 / RARE)  # fewer hold none of a head's rarest rows, which phi is chosen by
MOST_FOREIGN = 0.05  # share of characters of a text that may be no UTF-8
WANTED = "some thousand words of the usual kind, as UTF-8"


def softmax(config: EngineConfig, text: Path, size: int, count: int, as_json: bool) -> None:
    """Measure, save, print. Raises ValueError, and leaves what was saved before, for what is no text or too short."""
    check_length(check_text(text))
    bar = Bar("measuring")
    try:
        with loading(quiet=False) as progress:
            found, opened = calibrate(config, text, size, count, bar.update, progress)
    finally:
        bar.stop()
    check_length(found.tokens, size * count)
    path = save(found, opened.checkpoint)
    if as_json:
        print(path.read_text(encoding="utf-8"))
        return
    print(describe(found))
    print(f"saved in {path}")


def check_text(text: Path) -> int:
    """The bytes that are read, and so the most tokens that it can give. Raises ValueError for what is no text."""
    with text.open("rb") as file:
        content = file.read(LARGEST_TEXT)
    characters = content.decode("utf-8", errors="replace")
    foreign = characters.count("\ufffd") + characters.count("\0")
    if foreign > MOST_FOREIGN * len(characters):
        raise ValueError(
            f"{text} is no text: {foreign / len(characters):.0%} of its characters are not UTF-8; give {WANTED}."
        )
    return len(content)


def check_length(tokens: int, asked: int = LEAST_TOKENS) -> None:
    """tokens: that a text gives, or at most can give; asked: for how many there were windows. Raises ValueError."""
    if tokens >= LEAST_TOKENS:
        return
    few = "the windows" if asked < LEAST_TOKENS else "the text"
    instead = "raise --window or --windows" if asked < LEAST_TOKENS else f"give {WANTED}"
    raise ValueError(
        f"{few[:1].upper()}{few[1:]} gave {tokens} tokens at most; allowed: from {LEAST_TOKENS}, for fewer do not tell "
        f"how large scores get. Nothing was saved; {instead}."
    )


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
