"""Start the phases of an engine: lanes over its GPU, their stairs measured, and a controller of the border."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tenfold.base.log import logger
from tenfold.engine.phases import stored, table
from tenfold.engine.phases.lanes import TwoDevices
from tenfold.engine.phases.latency import Stairs
from tenfold.engine.phases.loop import Phases
from tenfold.engine.phases.table import TYPICAL
from tenfold.engine.rehearsal import capture, chunks, decodes, rehearse, shapes

if TYPE_CHECKING:
    from tenfold.engine.core import Engine
    from tenfold.engine.opened import Opened
    from tenfold.engine.phases.lanes import GreenLanes


def start(engine: Engine) -> Phases | None:
    """None where the device cannot; then the log says why. Raises ValueError for a border that this GPU cannot have."""
    schedule = engine.config.schedule
    if schedule == table.DISAGGREGATED:
        return apart(engine)
    if schedule != table.PHASES:
        return None
    if reason := unable(engine):
        table.told(schedule, reason)
        return None
    from tenfold.engine.phases.lanes import GreenLanes

    kernels: Any = engine.kernels
    border = engine.config.border
    try:
        lanes = GreenLanes(engine.runner, kernels, table.splits_of(border, kernels.sms))
    except RuntimeError as error:
        table.told(schedule, f"the driver does not divide the GPU ({error})")
        return None
    stairs = stairs_of(engine, lanes)
    rehearse_lanes(engine, lanes)
    targets = table.targets_of(engine.config, stairs, lanes.total)
    controller = table.make_controller(border, targets, lanes.splits, stairs)
    first = table.first_of(border, lanes.splits)
    if first is not None:
        lanes.use(first)
    logger.info("phases, border %s: %s", border, said(stairs))
    logger.info("targets: %.0f ms to the first token, %.1f ms a token after it", 1e3 * targets.ttft, 1e3 * targets.tpot)
    return Phases(engine, lanes, controller, targets=targets, stairs=stairs)


def stairs_of(engine: Engine, lanes: GreenLanes) -> Stairs:
    """As they are in the table of choices, else measured now and put there."""
    from tenfold.engine.phases.measure import measure

    kernels: Any = engine.kernels
    known, config = kernels.arms.table, engine.config
    plan = engine.memory
    subject = stored.Subject(engine.model.config, config, 0 if plan is None else plan.weights - plan.draft_weights)
    prefills, decodes = ([part.sms for part, _ in every] for every in (lanes.every_prefill(), lanes.every_decode()))
    tokens, requests = stored.sizes_of(engine.max_model_len, config.max_batch)
    found = stored.recall(known, subject, prefills, decodes, tokens, requests)
    if found is not None:
        return found
    found = measure(lanes, engine.max_model_len, config.max_batch)
    torch.cuda.empty_cache()  # what it took stays with every lane's stream, and is more than steps take
    try:
        stored.keep(known, subject, found)
    except OSError as error:
        logger.warning("the times of phases are not kept in %s (%s); the next start measures again", known.path, error)
    return found


def rehearse_lanes(engine: Engine, lanes: GreenLanes) -> None:
    """Compile what the kernels of each lane want, and capture its steps: decodes of all lengths where it has the whole
    GPU, else of the usual ones; prompts also where they ride in steps of decodes.
    """
    from tenfold.ops.gpu import green

    config = engine.config
    if not config.rehearse:
        return
    steps = list(decodes(config.max_batch, engine.max_model_len, engine.kv.tokens, (TYPICAL,)))
    for part, runner in lanes.every_decode():
        contexts = (TYPICAL, 2 * TYPICAL) if part.sms < lanes.total else ()
        with green.on(part):
            if contexts:
                rehearse(runner, steps)
            if config.graphs:
                capture(runner, config.max_step_tokens, shapes(runner, config.max_batch, contexts))
    prompts = list(chunks(min(table.PREFILL_TOKENS, engine.max_model_len)))
    rides = lanes.every_decode() if config.border == table.ADAPTIVE else ()
    whole = [(part, runner) for part, runner in rides if part.sms == lanes.total]
    for part, runner in (*whole, *lanes.every_prefill()):
        if part.sms < lanes.total or config.graphs:
            with green.on(part):
                rehearse(runner, prompts, config.graphs)
    torch.cuda.synchronize()


def apart(engine: Engine, device: torch.device | None = None) -> Phases | None:
    """Prefill on another device; None: the next GPU, where there is one."""
    if device is None:
        count = torch.cuda.device_count() if engine.device.type == "cuda" else 0
        if count < 2:
            table.told(table.DISAGGREGATED, f"it needs two GPUs and there {'is one' if count else 'is none'}")
            return None
        device = torch.device("cuda", ((engine.device.index or 0) + 1) % count)
    if engine.replica is None:
        table.told(table.DISAGGREGATED, "the weights are not there to be loaded twice")
        return None
    model, kernels = engine.replica(device)
    engine.elsewhere.append(kernels)
    return Phases(engine, TwoDevices(engine.runner, model, device))


def unable(engine: Engine | Opened) -> str:
    """Why phases cannot run side by side; "" where they can."""
    if engine.device.type != "cuda":
        return "there is no GPU here whose multiprocessors could be shared out"
    if getattr(engine.kernels, "name", "") != "gpu":
        return f"the kernels are {engine.kernels.name} ({engine.kernels.reason}), and lanes need those for GPUs"
    if engine.config.border == table.SHARED:
        return ""
    from tenfold.ops.gpu import green

    if reason := green.unavailable():
        return reason
    kernels: Any = engine.kernels
    if not table.splits_of(engine.config.border, kernels.sms):
        return f"the GPU has {kernels.sms} multiprocessors and the first border needs {table.LEAST_SMS}"
    return ""


def said(stairs: Stairs) -> str:
    """What was measured of each part, for people."""
    prefill = ", ".join(f"{sms}: {1e3 * points[-1][1]:.1f}" for sms, points in sorted(stairs.prefill.items()))
    decode = ", ".join(f"{sms}: {1e3 * points[-1][1]:.2f}" for sms, points in sorted(stairs.decode.items()))
    tokens = next(iter(stairs.prefill.values()))[-1][0]
    requests = next(iter(stairs.decode.values()))[-1][0]
    return f"prefill of {tokens} tokens by SMs, ms: {prefill}; decode of {requests}: {decode}"
