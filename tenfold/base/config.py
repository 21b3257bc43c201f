"""What a user can set about an engine. `resolve` steps elsewhere fill the zeros ("derive it") once and log them."""

from dataclasses import dataclass, field, fields
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    group: str = "",
    secret: bool = False,
) -> Any:
    """A dataclass field as the command line, the environment and the configuration file offer it.

    unit: what a number counts; of "bytes" people may write 2G, and a "list" is
    separated by commas. choices: all that is allowed, where that is a short
    list. group: heading of this field and those after it, up to the next that names one. secret: never printed.
    """
    metadata = {"help": help, "unit": unit, "choices": choices, "group": group, "secret": secret}
    return field(default=default, metadata=metadata, repr=not secret)


KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def fits(value: object, kind: type) -> bool:
    """Whether a setting of this kind may have the value: whole numbers are numbers, truth values are none."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_kinds(config: Any) -> None:
    """Of a dataclass made of settings, whether every value is of the kind of its default. Raises ValueError."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        if kind in KINDS and not fits(value, kind):
            raise ValueError(f"{f.name} is {value!r}; allowed: {KINDS[kind]}.")


def groups(kind: type) -> dict[str, str]:
    """The heading of each field of a dataclass made of settings."""
    found, heading = {}, ""
    for f in fields(kind):
        heading = f.metadata.get("group") or heading
        found[f.name] = heading
    return found


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. `0`, `None` and "auto" mean: derive it from the checkpoint and the hardware."""

    model: str = setting(
        "default",
        "folder, .gguf file, Hugging Face cache entry or hub name; 'default' is SmolLM2-135M-Instruct",
        group="Model",
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "compute type: auto, float32, bfloat16 or float16", choices=DTYPES)
    kernels: str = setting(
        "auto",
        "auto, native (compiled CPU kernels, GPU kernels) or torch (the plain PyTorch meaning of every operation)",
        choices=("auto", "native", "torch"),
    )
    weights: str = setting(
        "auto",
        "auto (as stored), dense (dequantise when loading), or quantise dense weights when loading: q8_0 (for CPUs), "
        "fp8, int8, int4, int3, w4a8 (for GPUs; the head in 8 bits), or each with -blocks (the head as stored)",
        choices=(
            *("auto", "dense", "q8_0", "fp8", "int8", "int4", "int3", "w4a8"),
            *("fp8-blocks", "int8-blocks", "int4-blocks", "int3-blocks", "w4a8-blocks"),
        ),
    )
    max_model_len: int = setting(
        0,
        "longest sequence in tokens, prompt and answer together (0: what the model allows and memory holds)",
        unit="tokens",
        group="Memory",
    )
    page_size: int = setting(16, "tokens in one page of the KV cache", unit="tokens")
    kv_dtype: str = setting(
        "auto", "type of cached keys and values: auto, float32, float16 or bfloat16", choices=DTYPES
    )
    kv_cache: str = setting(
        "auto",
        "how keys and values are stored: auto or dense (in kv_dtype), fp8, int4, skvq (keys of 2 bits, values of 1.5), "
        "or a format such as k2v2g64",
    )
    kv_memory: int = setting(0, "bytes for the KV cache (0: derived from free memory)", unit="bytes")
    picture_cache: int = setting(
        0,
        "bytes for what was seen in the latest pictures, of models that see (0: 1 GiB on a GPU, 256 MiB on a CPU)",
        unit="bytes",
    )
    gpu_memory_utilization: float = setting(0.9, "GPU: share of its free memory to use, for everything")
    max_batch: int = setting(
        0, "requests computed together at most (0: 64 on CPU, 256 on a GPU)", unit="requests", group="Speed"
    )
    max_step_tokens: int = setting(
        0,
        "tokens of one step at most, the size of a prefill chunk (0: 512 on CPU; on a GPU max_batch + 2048, or 8192 "
        "for a model with experts)",
        unit="tokens",
    )
    prefix_cache: bool = setting(True, "reuse the KV pages of prompts that start alike")
    lookahead: int = setting(
        -1, "steps launched before the tokens of the one before are read: 0 or 1 (-1: 0 on CPU, 1 on a GPU)"
    )
    late_planning: bool = setting(
        True, "GPU: plan a step just before the one under way ends, so that what comes meanwhile is in it"
    )
    graphs: bool = setting(True, "GPU: launch steps of decodes and short prompts as CUDA graphs")
    rehearse: bool = setting(
        True,
        "GPU: compile kernels for steps of every size, and capture their graphs, at the start, not when one first "
        "comes and others wait",
    )
    softmax: str = setting(
        "auto",
        "GPU attention: online, lazy, unified or paper; auto takes what `tenfold tune` measured, else unified for "
        "prompts where `tenfold calibrate softmax` measured the model, else lazy",
        choices=("auto", "online", "lazy", "unified", "paper"),
    )
    gemm: str = setting(
        "auto",
        "GPU linear operations: auto (the arm measured by `tenfold tune`, else a rule), library (cuBLAS everywhere), "
        "flat (FlashDecoding++'s flat GEMM where it can, else cuBLAS), flat-1 (no buffering), flat-2 (double buffers)",
        choices=("auto", "library", "flat", "flat-1", "flat-2"),
    )
    merge: str = setting(
        "auto",
        "GPU decode attention, how splits of a context meet: auto (the arm measured by `tenfold tune`, else a rule), "
        "global (the last of them merges through global memory), cluster (through shared memory of a cluster), launch "
        "(a second launch merges)",
        choices=("auto", "global", "cluster", "launch"),
    )
    speculate: str = setting(
        "",
        "guess tokens ahead and check several in one step; answers stay the same: ngram (what followed when the latest "
        "tokens occurred before), or the name of a small draft model with the same vocabulary ('': off)",
    )
    speculate_tokens: int = setting(
        4, "tokens guessed ahead at most, 1 to 16; fewer, or none, where more would not pay", unit="tokens"
    )
    schedule: str = setting(
        "chunked",
        "how prompts and answers share the device: chunked (chunks of prompts in the steps of decodes), prefill-first "
        "(answers wait for prompts), phases (GPU: side by side, on groups of multiprocessors of their own), "
        "disaggregated (prompts on another GPU with its own copy of the weights; needs prefix_cache=false)",
        choices=("chunked", "prefill-first", "phases", "disaggregated"),
    )
    border: str = setting(
        "adaptive",
        "schedule=phases, who gets which multiprocessors: adaptive (prompts ride in the steps of answers that keep "
        "to tpot, or have a part where none does), staircase (as measured), paper (semi-PD's Algorithm 1), shared, "
        "or how many prompts get",
    )
    ttft: float = setting(
        0.0,
        "schedule=phases: time to the first token to aim at (0: 7.5 times what the idle GPU takes for 1,024 tokens)",
        unit="seconds",
    )
    tpot: float = setting(
        0.0,
        "schedule=phases: time per token after it to aim at (0: 7.5 times what the idle GPU takes for one request)",
        unit="seconds",
    )
    threads: int = setting(0, "CPU threads (0: the physical cores this process may use)")
    max_queue: int = setting(1024, "requests that may wait; more are refused", unit="requests", group="Queue")
    max_queue_tokens: int = setting(0, "prompt tokens that may wait (0: no limit)", unit="tokens")
    overtake: float = setting(
        4.0,
        "shorter prompts overtake longer ones that came little before: a prompt is due when so many times its own "
        "tokens were computed of others, and who is due first goes first (0: in the order they came)",
    )
