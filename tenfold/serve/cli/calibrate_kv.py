"""`tenfold calibrate kv`: measure a model's keys and values, write what was found beside it, and say what it means."""

from pathlib import Path

from tenfold.base.config import EngineConfig
from tenfold.engine.calibrate_kv import calibrate_kv, format_of
from tenfold.engine.opened import Opened
from tenfold.ops.kv.spec import PackedSpec
from tenfold.serve.cli.calibrate import check_text
from tenfold.serve.cli.terminal import Bar, columns, loading
from tenfold.serve.cli.terminal import size as bytes_in_words
from tenfold.weights.kv_calibration import SIDES, KvCalibration, save


def kv(config: EngineConfig, text: Path, format: str, window: int, count: int, as_json: bool) -> None:
    """Measure, save, print. Raises ValueError, and leaves what was saved before, for what is no text or too short."""
    check_text(text)
    spec = format_of(config, format)
    bar = Bar("measuring")
    try:
        with loading(quiet=False) as progress:
            found, opened = calibrate_kv(config, spec, text, window, count, bar.update, progress)
    finally:
        bar.stop()
    path = save(found, opened.checkpoint)
    if as_json:
        print(path.read_text(encoding="utf-8"))
        return
    print(describe(found, spec, opened))
    print(f"saved in {path}")


def describe(found: KvCalibration, spec: PackedSpec, opened: Opened) -> str:
    """What a token takes, and what was found."""
    shape = opened.shape
    packed = shape.layers * spec.bytes_per_token(shape.kv_heads, shape.head_dim)
    plain = shape.layers * 4 * shape.kv_size
    rows = [
        ("tokens measured", str(found.header.tokens)),
        (
            "a token past the window",
            f"{bytes_in_words(packed)} of {bytes_in_words(plain)} in 16 bits, "
            f"{spec.bits(shape.kv_heads, shape.head_dim):.2f} bits a number",
        ),
    ]
    for side in SIDES:
        clip = found.tensors[f"{side}.clip"]
        rows.append((f"clip factors of {side}", f"{clip.min():.2f} to {clip.max():.2f}, mean {clip.mean():.2f}"))
    if spec.group == spec.span * shape.head_dim:
        rows.append(("groups", "each is a whole head, so there was nothing to reorder; try a smaller group"))
    return columns(rows)
