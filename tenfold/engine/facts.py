"""What an engine says of itself: `Facts` once it is loaded, `Stats` after every step.

Invariant: plain data that crosses between processes as it is; importing this needs no PyTorch.
"""

from dataclasses import dataclass, field

from tenfold.base.config import EngineConfig

Choice = dict[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Counts are since the start; times in seconds; pages: used by sequences, cached (idle, reusable),
    free.
    """

    running: int
    waiting: int
    pages: int
    pages_used: int
    pages_cached: int
    pages_free: int
    steps: int
    step_seconds: float  # time inside `step`, all together
    last_step_seconds: float
    preemptions: int
    errors: int
    prompt_tokens: int  # of accepted requests
    prefix_hit_tokens: int  # of those, found in the prefix cache
    computed_tokens: int  # tokens the model was run on
    generated_tokens: int
    drafted_tokens: int = 0  # guesses that were verified
    accepted_tokens: int = 0  # of those, the ones that became part of an answer
    recomputed_rows: int = 0  # of attention: a token's query head whose unified maximum did not hold
    pictures: int = 0  # that were looked at; those that were known still are not counted
    prefill_sms: int = 0  # multiprocessors that prompts have now, where phases run side by side
    decode_sms: int = 0  # and answers
    prompt_chunk: int = 0  # tokens of prompts that a step of answers takes along at most; 0: prompts have a lane
    border_changes: int = 0
    border_why: str = ""  # they have as many, for people


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while an engine runs.

    config: with every size filled in. path: of the checkpoint, "" for a model made in memory. family: the model's
    class. memory: the plan, for people. timeline: phases of loading with their seconds. choices: one dict for each
    operation, shape and batch size with operation, shape, format, batch, budget, arm, microseconds (None: not
    measured), step (microseconds of a whole decode step with it, None likewise), runner_up, runner_up_microseconds (of
    a step too, where step is one), source ("step", "measured", "rule", "fixed" or "only") and why.
    """

    config: EngineConfig
    vocab_size: int
    max_model_len: int
    pages: int
    path: str = ""
    family: str = ""
    device: str = ""
    kernels: str = ""
    kernels_reason: str = ""
    memory: str = ""
    timeline: tuple[tuple[str, float], ...] = ()
    choices: tuple[Choice, ...] = field(default=(), repr=False)
