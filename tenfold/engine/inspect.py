"""What can be told of a loaded engine: its facts, and who runs and waits at this moment."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from tenfold.engine.facts import Choice, Facts
from tenfold.engine.sequence import Sequence
from tenfold.ops import choose
from tenfold.ops.cpu import arms

if TYPE_CHECKING:  # the engine uses this module
    from tenfold.engine.core import Engine

SHOWN = 64  # sequences of a description
WHY = {
    "step": "steps of decodes were fastest with it here",
    "measured": "the fastest measured here",
    "rule": "the rule; nothing was measured here",
    "fixed": "a setting fixed it",
}


def facts(engine: Engine) -> Facts:
    """Facts of an engine; what it was not loaded with is empty."""
    kernels = engine.kernels
    return Facts(
        config=replace(engine.config, device=str(engine.device)),
        vocab_size=engine.vocab_size,
        max_model_len=engine.max_model_len,
        pages=engine.pool.total,
        path=str(engine.path or ""),
        family=type(engine.model).__name__,
        device=str(engine.device),
        kernels=getattr(kernels, "name", ""),
        kernels_reason=getattr(kernels, "reason", ""),
        memory=str(engine.memory or ""),
        timeline=tuple(engine.timeline.phases) if engine.timeline else (),
        choices=choices(engine),
    )


def choices(engine: Engine) -> tuple[Choice, ...]:
    """What runs each operation and why; one row where there is nothing to choose from."""
    kernels: Any = engine.kernels
    if getattr(kernels, "name", "") == "native":
        return tuple(_row(choice) for choice in arms.explain(engine.matrices))
    if getattr(kernels, "name", "") == "gpu":
        pages = (engine.config.page_size, engine.kv.spec.dtype, engine.max_model_len)
        every = [*kernels.arms.explain(), *kernels.expert_arms.explain(), *kernels.attending.explain(*pages)]
        return tuple(_row(choice) for choice in every)
    return (_only(getattr(kernels, "name", ""), getattr(kernels, "reason", "")),)


def _row(choice: choose.Choice) -> Choice:
    key = choice.key
    return {
        "operation": key.op,
        "shape": f"{key.rows} x {key.cols}",
        "format": key.format,
        "batch": key.batch,
        "budget": key.budget,
        "arm": choice.arm,
        "microseconds": choice.microseconds,
        "runner_up": choice.runner_up,
        "runner_up_microseconds": choice.runner_up_microseconds,
        "step": choice.step,
        "source": choice.source,
        "why": WHY[choice.source],
    }


def _only(name: str, reason: str) -> Choice:
    described: Choice = {"operation": "all", "arm": name, "source": "only", "why": reason}
    return dict.fromkeys(("shape", "format"), "") | dict.fromkeys(MEASURES) | described


MEASURES = ("batch", "budget", "microseconds", "runner_up", "runner_up_microseconds", "step")


def describe(engine: Engine) -> str:
    """Sequences that run, steps in flight and how many wait.

    May be called while another thread is in the middle of a step, so what it shows can be of two moments.
    """
    scheduler = engine.scheduler
    running = [*scheduler.decoding, *scheduler.prefilling]
    lines = [str(engine.stats())]
    lines += [f"in flight: {plan}" for plan, _ in list(engine._inflight)]
    lines += [_line(sequence) for sequence in islice(running, SHOWN)]
    if len(running) > SHOWN:
        lines.append(f"and {len(running) - SHOWN} more")
    return "\n".join(lines)


def _line(sequence: Sequence) -> str:
    request = sequence.request
    return (
        f"row {sequence.row}: {request.id}/{sequence.index} {sequence.status.name}, prompt {sequence.prompt_length}, "
        f"computed {sequence.computed} of {len(sequence.tokens)}, limit {sequence.limit}, {len(sequence.pages)} pages"
    )
