"""What `EngineConfig.schedule` names: how prompts and answers share a device."""

import math

from tenfold.base.config import EngineConfig
from tenfold.base.log import logger
from tenfold.cache.format import AS_COMPUTED
from tenfold.engine.phases.controller import Adaptive, Algorithm1, Controller, Split, Staircase, Targets
from tenfold.engine.phases.latency import Paper, Stairs
from tenfold.ops.gpu.green import STEP

CHUNKED, PREFILL_FIRST, PHASES, DISAGGREGATED = SCHEDULES = ("chunked", "prefill-first", "phases", "disaggregated")
ADAPTIVE, STAIRCASE, PAPER, SHARED = BORDERS = ("adaptive", "staircase", "paper", "shared")
MOVING = (ADAPTIVE, STAIRCASE, PAPER)  # borders that a controller moves
TARGETS = ("ttft", "tpot")  # settings
SIZES = (64, 80, 96, 112)  # SMs of prefill in splits; decode is within a fifth of full speed on 36 of 132
LEAST_REST = 20  # SMs beside a group: fewer are no whole cluster of blocks, and kernels that want one fail (H100)
LEAST_SMS = SIZES[0] + LEAST_REST  # of a GPU that is divided
PREFILL_TOKENS = 4096  # of a step of prompts in a lane: more are no faster, and each lane keeps memory for as many
UNLOADED = 7.5  # times what an idle GPU takes: the paper's tight targets
TYPICAL = 1024  # tokens of a prompt
PAPER_EVERY = 160  # decisions from one of the paper's looks at the targets to the next: most of a second


def check(config: EngineConfig) -> None:
    """Raises ValueError for settings of the schedule that make no sense; the log names those that change nothing."""
    if config.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {config.schedule!r}; allowed: {', '.join(SCHEDULES)}.")
    if config.border not in BORDERS and not _multiple(config.border):
        raise ValueError(
            f"border is {config.border!r}; allowed: {', '.join(BORDERS)}, or how many multiprocessors prompts get, "
            f"a multiple of {STEP} such as 96."
        )
    for name in TARGETS:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(
                f"{name} is {getattr(config, name)}; allowed: a finite number of seconds above 0, or 0 (derive it)."
            )
    if config.schedule == DISAGGREGATED and (config.prefix_cache or config.kv_cache not in AS_COMPUTED):
        raise ValueError(
            "schedule is disaggregated, which moves pages of keys and values as computed between GPUs and shares none: "
            "set prefix_cache=false and leave kv_cache at auto."
        )
    if config.schedule != CHUNKED and config.speculate:
        raise ValueError(
            f"schedule is {config.schedule} and speculate is {config.speculate!r}, which do not go together: tokens "
            f"are guessed ahead only with schedule={CHUNKED}. Leave one of them out."
        )
    given = [name for name in TARGETS if getattr(config, name)]
    if given and not (config.schedule == PHASES and config.border in MOVING):
        logger.warning(
            "%s set, which changes nothing with schedule=%s and border=%s: targets count only with schedule=%s and %s",
            *(" and ".join(given), config.schedule, config.border, PHASES, " or ".join(f"border={b}" for b in MOVING)),
        )


def _multiple(border: str) -> bool:
    """Whether it is a number of multiprocessors that some GPU may be divided at."""
    return border.isascii() and border.isdigit() and int(border) >= STEP and int(border) % STEP == 0


def splits_of(border: str, total: int) -> tuple[int, ...]:
    """SMs of prefill in each split that a border needs, of a GPU that has so many. Raises ValueError."""
    if border == SHARED:
        return ()
    if border in BORDERS:
        return tuple(size for size in SIZES if size <= total - LEAST_REST)
    if not STEP <= int(border) <= total - LEAST_REST or int(border) % STEP:
        raise ValueError(
            f"border is {border}; allowed on this GPU of {total} multiprocessors: multiples of {STEP} from {STEP} to "
            f"{(total - LEAST_REST) // STEP * STEP}."
        )
    return (int(border),)


def pairs_of(config: EngineConfig) -> int:
    """Pairs of lanes there will be, at most, each with memory of its own."""
    if config.schedule != PHASES or config.device == "cpu" or config.border == SHARED:
        return 1
    return 1 + (1 if config.border.isdigit() else len(SIZES))


def first_of(border: str, splits: list[Split]) -> Split | None:
    """The split at the start, of those in ascending order; None: both phases have all multiprocessors."""
    return splits[len(splits) // 2] if border in (STAIRCASE, PAPER) or border.isdigit() else None


def targets_of(config: EngineConfig, stairs: Stairs, total: int) -> Targets:
    """What a user set, else a multiple of what an idle GPU takes."""
    ttft = config.ttft or UNLOADED * stairs.prefill_seconds(total, TYPICAL)
    return Targets(ttft, config.tpot or UNLOADED * stairs.decode_seconds(total, 1))


def make_controller(border: str, targets: Targets, splits: list[Split], stairs: Stairs) -> Controller | None:
    """None where the border stays where it is."""
    if border == ADAPTIVE:
        return Adaptive(Staircase(targets, splits, stairs, most=PREFILL_TOKENS), PREFILL_TOKENS)
    if border == STAIRCASE:
        return Staircase(targets, splits, stairs, most=PREFILL_TOKENS)
    if border == PAPER:
        total = splits[0].prefill + splits[0].decode
        each = stairs.prefill_seconds(total, TYPICAL)
        model = Paper.seeded(total, each, stairs.decode_seconds(total, 1))
        return Algorithm1(targets, splits, model, each / TYPICAL, PAPER_EVERY)
    return None


def told(schedule: str, reason: str) -> None:
    """Says once for an engine why its phases do not run side by side."""
    logger.warning("%s", fallback(schedule, reason))


def fallback(schedule: str, reason: str) -> str:
    """What happens where phases cannot run side by side, for people."""
    return (
        f"schedule is {schedule}, but {reason}: prompts run in chunks in the steps of decodes, as with schedule=chunked"
    )
