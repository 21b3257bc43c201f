"""Measured stairs in the table of choices, so that only the first engine of a model on a GPU has to measure them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tenfold.base.config import EngineConfig
from tenfold.engine.phases.latency import Stairs
from tenfold.models.config import ModelConfig
from tenfold.ops.choose import Key, Table

PREFILLS = (128, 256, 512, 1024, 2048)  # tokens
DECODES = (1, 8, 64, 256)  # requests
PHASES = ("prefill", "decode")
LANE = "lane"


def sizes_of(max_len: int, max_batch: int) -> tuple[list[int], list[int]]:
    """Tokens of a prefill and requests of a decode that are measured of an engine of this size."""
    return [n for n in PREFILLS if n <= max_len] or [max_len], [n for n in DECODES if n <= max_batch]


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose times: a model, the settings of its engine with every size filled in, and the bytes of its weights, which
    checkpoints of a shape may hold in many formats.
    """

    shape: ModelConfig
    config: EngineConfig
    weights: int


def key(of: Subject, phase: str, size: int, sms: int) -> Key:
    """size: tokens of a prefill, or requests of a decode."""
    shape, config = of.shape, of.config
    stored = f"{config.dtype}, weights {config.weights} of {of.weights} bytes, KV {config.kv_cache} {config.kv_dtype}"
    return Key(op(shape, phase), shape.hidden_size, shape.intermediate_size, stored, size, sms)


def op(shape: ModelConfig, phase: str) -> str:
    """The operation of a key."""
    return f"{phase} of {shape.layers} layers, {shape.heads}/{shape.kv_heads} heads, vocabulary {shape.vocab_size}"


def recall(
    table: Table,
    of: Subject,
    prefills: Iterable[int],
    decodes: Iterable[int],
    tokens: Sequence[int],
    requests: Sequence[int],
) -> Stairs | None:
    """prefills, decodes: SMs that a phase may get. None where something was not measured."""

    def side(phase: str, parts: Iterable[int], sizes: Sequence[int]) -> dict[int, tuple[tuple[int, float], ...]]:
        found = {}
        for sms in parts:
            times = [(n, table.times(key(of, phase, n, sms)).get(LANE, 0.0) / 1e6) for n in sizes]
            found[sms] = tuple((n, seconds) for n, seconds in times if seconds)
        return found

    made = side(PHASES[0], prefills, tokens), side(PHASES[1], decodes, requests)
    whole = all(len(times) == len(sizes) for part, sizes in zip(made, (tokens, requests)) for times in part.values())
    return Stairs(*made) if whole else None


def keep(table: Table, of: Subject, stairs: Stairs) -> None:
    """Write them down. Raises OSError."""
    for phase in PHASES:
        for sms, points in getattr(stairs, phase).items():
            for size, seconds in points:
                table.record(key(of, phase, size, sms), {LANE: 1e6 * seconds})
    table.save()


def forget(table: Table, shape: ModelConfig) -> None:
    """Leave it to the next engine to measure: what runs in steps was chosen anew. Raises OSError."""
    ops = [op(shape, phase) for phase in PHASES]
    old = [key for key in table if key.op in ops and table.times(key)]
    for key in old:
        table.record(key, {})
    if old:
        table.save()
