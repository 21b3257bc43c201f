"""Methods at equal bits, side by side: what answers to held-out pairs lose when the text part is rounded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tenfold.quantize.mbq.data import Sample
from tenfold.quantize.mbq.fold import Scales, layer_swaps, swaps_of
from tenfold.quantize.mbq.gradients import WEIGHINGS, Directions, Magnitudes, directions, magnitudes, worths
from tenfold.quantize.mbq.search import METHODS, NORMS, Layer, Method, equalize
from tenfold.quantize.mbq.subject import Batch, Score, Subject
from tenfold.quantize.mbq.trial import Swap
from tenfold.quantize.schemes import Scheme

# What is taken apart: the norm of differences, what tokens count, and what matrices are looked at with. Gradients that
# differences are multiplied by need no other weights.
ABLATION = {
    f"search {norm} {weigh}{', propagated' * propagate}": Method("search", weigh, norm, propagate=propagate)
    for propagate in (False, True)
    for norm in NORMS
    for weigh in (WEIGHINGS if norm != "fisher" else ("alike",))
}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One method of one scheme."""

    method: str
    scheme: str
    bits: float
    score: Score


def scales_of(
    subject: Subject,
    batches: Sequence[Batch],
    scheme: Scheme,
    methods: Mapping[str, Method],
    found: Magnitudes,
    towards: Directions | None = None,
) -> dict[str, dict[int, Scales]]:
    """By method and layer, in one walk through the model, and one for each that propagates. found: gradients, for
    methods that weigh tokens; towards: the same themselves, for the norm fisher.
    """
    made: dict[str, dict[int, Scales]] = {name: {} for name in methods}
    each = {name: worths(found, method.weigh) for name, method in methods.items()}

    def find(name: str, layer: Layer) -> Scales:
        own = {part: values[layer.number] for part, values in each[name].items()}
        made[name][layer.number], _ = equalize(layer, scheme, methods[name], own)
        return made[name][layer.number]

    def together(number: int, states: Sequence[Tensor]) -> None:
        for name, method in methods.items():
            if not method.propagate:
                find(name, Layer(subject, number, batches, states, towards))

    def alone(name: str, number: int, states: Sequence[Tensor]) -> dict[int, Swap]:
        layer = Layer(subject, number, batches, states, towards)
        return layer_swaps(subject, number, find(name, layer), scheme)

    subject.walk(batches, together)
    for name, method in methods.items():
        if method.propagate:
            subject.walk(batches, partial(alone, name))
    return made


def stored_bits(subject: Subject, scheme: Scheme) -> float:
    """Of a weight of the text part's layers, scales and zeros included."""
    matrices = [
        subject.linear(layer, part).weight
        for layer in range(subject.layers)
        for part in ("qkv", "out", "gate_up", "down")
    ]
    every = sum(m.rows * m.cols for m in matrices)
    return sum(m.rows * m.cols * scheme.stored_bits(m.cols) for m in matrices) / every


def compare(
    subject: Subject,
    calibrating: Sequence[Sample],
    judged: Sequence[Sample],
    schemes: Sequence[Scheme],
    methods: Mapping[str, Method] = METHODS,
    say: Say = lambda line: None,
) -> tuple[list[Row], Magnitudes]:
    """Rows of everything exact, then of each scheme by each method; and the gradients of the calibration samples."""
    batches, held = subject.batches(calibrating), subject.batches(judged)
    found = magnitudes(subject, batches)
    loss_aware = any(method.norm == "fisher" for method in methods.values())
    towards = directions(subject, batches) if loss_aware else None
    rows = [Row("exact", "w16", 16.0, subject.score(held))]
    say(told(rows[-1]))
    for scheme in schemes:
        bits = stored_bits(subject, scheme)
        for name, scales in scales_of(subject, batches, scheme, methods, found, towards).items():
            rows.append(Row(name, str(scheme), bits, subject.score(held, swaps_of(subject, scales, scheme))))
            say(told(rows[-1]))
    return rows, found


def told(row: Row) -> str:
    return (
        f"{row.scheme:10} {row.method:22} {row.bits:6.3f} bits  loss {row.score.loss:.4f}  "
        f"right {row.score.accuracy:7.2%}"
    )
