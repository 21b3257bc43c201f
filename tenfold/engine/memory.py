"""The plan of memory: what weights, KV cache and workspace take, worked out before anything is loaded.

`resolve` fills the settings that depend on device and checkpoint, `plan_memory` those that depend on free memory. A
plan that does not fit carries changes of the settings each of which was checked to make it fit.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tenfold.base.config import EngineConfig
from tenfold.cache.format import AS_COMPUTED, parse
from tenfold.cache.store import KVSpec
from tenfold.engine.phases import table as schedules
from tenfold.engine.plan import PROMPT_LOGPROBS
from tenfold.models.config import ModelConfig
from tenfold.models.decoder import SEEN_TOKENS
from tenfold.ops.blocks import DENSE, storage_bytes
from tenfold.ops.cpu.repack import cpu_storage, has_fractions
from tenfold.ops.formats import format_of, is_format
from tenfold.ops.gpu.packed import refusal
from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.kv.attend import OLD_TOKENS
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.load import TABLE, TARGETS, UNPACKED, check_mode, head_copy, loaded_storage

GIB = 1 << 30
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GPU_PICTURES, CPU_PICTURES = GIB, GIB // 4
FUSED = ("fp8", "int4", "k2v2g64", "k4v2g64", "k2v2g32")  # formats to offer for one that no fused kernel reads
CPU_KV_SHARE = 0.25  # of free memory
CPU_KV_LIMIT = 2 * GIB  # unless max_model_len or kv_memory asks for more
KEPT_ROOMS = 4  # sequences that run for one room that is kept for those who go on from its end
ROOM_SHARE = 0.5  # of the KV cache at most, for rooms of a packed cache
GPU_BATCH, CPU_BATCH = 256, 64  # requests computed together at most
CPU_STEP = 512  # tokens of a step
PREFILL, EXPERT_PREFILL = 2048, 8192  # tokens of prompts in a step on a GPU: of a dense model, of one with experts
LEAST_TOKENS = 256  # an engine with a smaller cache is of no use
Q8_0_BYTES = 34 / 32  # per weight
MOST_DRAFTS = 16  # of a sequence in one step
MOST_DRAWN = 64  # tokens drawn in a step for the sake of drafts, where max_batch is less


class DoesNotFit(ValueError):
    """The engine asked for needs more memory than is free: says what takes how much and which changes would make it
    fit.
    """


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model beside the one served: its sizes, and the bytes of its weights."""

    shape: ModelConfig
    weights: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by use, and the sizes that follow. `changes`: settings that would make it fit, empty where it does.
    weights: of a draft model, too, whose part is draft_weights; a page and a token hold its keys and values as well.
    rooms: of a packed cache, room_bytes each, part of `kv`. pictures: for what was seen in them.
    """

    weights: int
    kv: int
    workspace: int
    free: int
    bytes_per_token: int
    page_size: int
    pages: int
    max_model_len: int
    max_batch: int
    kv_dtype: str
    fits: bool
    changes: tuple[str, ...] = ()
    draft_weights: int = 0
    rooms: int = 0
    room_bytes: int = 0
    pictures: int = 0

    @property
    def tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self.pages * self.page_size

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace + self.pictures

    def __str__(self) -> str:
        lines = [
            f"weights    {size(self.weights):>10}"
            + (f"   of which the draft model {size(self.draft_weights)}" if self.draft_weights else ""),
            f"KV cache   {size(self.kv):>10}   {self.tokens} tokens in {self.pages} pages of {self.page_size}, "
            f"{size(self.bytes_per_token)} a token in {self.kv_dtype}",
            *self._rooms(),
            f"workspace  {size(self.workspace):>10}",
            *([f"pictures   {size(self.pictures):>10}   for what was seen in the latest"] if self.pictures else []),
            f"total      {size(self.total):>10}   of {size(self.free)} free",
            f"context    {self.max_model_len:>10}   tokens at most in one sequence; "
            f"{max(1, self.tokens // self.max_model_len)} such at a time",
        ]
        if not self.fits:
            lines += [
                "It does not fit. Any one of these would make it fit:"
                if self.changes
                else "It does not fit, and no setting would make it fit.",
                *(f"  {c}" for c in self.changes),
            ]
        return "\n".join(lines)

    def _rooms(self) -> list[str]:
        if not self.rooms:
            return []
        return [
            f"           {size(self.rooms * self.room_bytes):>10}   of it for the most recent tokens of {self.rooms} "
            f"sequences; {self.max_batch} run at a time"
        ]

    def require(self) -> None:
        """Raises DoesNotFit unless it fits."""
        if self.fits:
            return
        what = (
            f"weights {size(self.weights)}, KV cache {size(self.kv)}, workspace {size(self.workspace)}"
            + (f", pictures {size(self.pictures)}" if self.pictures else "")
            + ": "
            f"{size(self.total)} in all, and {size(self.free)} are free."
        )
        way = (
            "Any one of these would make it fit: " + "; ".join(self.changes)
            if self.changes
            else "Use a smaller model or one with fewer bits a weight"
        )
        raise DoesNotFit(f"The model does not fit into memory: {what} {way}.")


def size(count: int) -> str:
    """Bytes for people, in binary units."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def resolve(
    config: EngineConfig, device: torch.device, kernels: str, quantised: bool, experts: bool = False
) -> EngineConfig:
    """Fill what depends on the device and on how weights are stored; sizes that depend on memory stay for
    `plan_memory`.

    kernels: name of the set in use; quantised: whether matrices run as quantised blocks; experts: whether the model has
    any. Raises ValueError with the setting and what is allowed.
    """
    gpu = device.type != "cpu"
    check_sizes(config)
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if gpu else "float32")
    if config.kv_dtype != "auto":
        kv_dtype = config.kv_dtype
    else:
        kv_dtype = "float16" if kernels == "native" and quantised and config.dtype == "auto" else dtype
    for name, value in (("dtype", dtype), ("kv_dtype", kv_dtype)):
        if value not in DTYPES:
            raise ValueError(f"{name} is {value!r}; allowed: auto, {', '.join(DTYPES)}.")
    batch = config.max_batch or (GPU_BATCH if gpu else CPU_BATCH)
    return replace(
        config,
        device=str(device),
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_batch=batch,
        max_step_tokens=config.max_step_tokens or usual_step(config.schedule, batch, gpu, experts),
        lookahead=config.lookahead if config.lookahead >= 0 else int(gpu),
        picture_cache=config.picture_cache or (GPU_PICTURES if gpu else CPU_PICTURES),
    )


def check_sight(model: ModelConfig, config: EngineConfig) -> None:
    """Raises ValueError for resolved settings that a model which sees pictures does not go with."""
    if model.tower is None:
        return
    if config.schedule not in (schedules.CHUNKED, schedules.PREFILL_FIRST):
        raise ValueError(
            f"schedule is {config.schedule!r}, and this model sees pictures, which only one lane can look at yet; "
            f"allowed: {schedules.CHUNKED}, {schedules.PREFILL_FIRST}."
        )
    if config.speculate not in ("", "ngram"):
        raise ValueError(
            f"speculate is {config.speculate!r}, and this model sees pictures, which a draft model would not; allowed: "
            "'' or ngram."
        )
    if not model.rope_sections:
        return
    packed = parse(config.kv_cache, model.kv_heads, model.head_dim)
    if packed is not None and packed.rotary == "pre":
        raise ValueError(
            f"kv_cache is {config.kv_cache!r}, which keeps keys as they are before they turn, and this model turns "
            "keys of pictures by rows and columns; allowed: auto, fp8, int4, or a format that ends in -post."
        )
    if config.max_step_tokens > SEEN_TOKENS:
        raise ValueError(
            f"max_step_tokens is {config.max_step_tokens}; allowed for a model that turns keys of pictures by rows and "
            f"columns: up to {SEEN_TOKENS}."
        )


def usual_step(schedule: str, batch: int, gpu: bool, experts: bool) -> int:
    """Tokens of a step where nothing else is said. On a GPU about as few of prompts as are computed as fast as any
    number, for nobody's token comes sooner than the step ends; experts see only a share of the tokens, so they want
    more. And room for decodes beside a whole chunk: prompts of its length would leave a few tokens for one more.
    """
    if not gpu:
        return CPU_STEP
    if schedule == schedules.PHASES:
        return schedules.PREFILL_TOKENS + batch
    return (EXPERT_PREFILL if experts else PREFILL) + batch


def check_sizes(config: EngineConfig) -> None:
    """Raises ValueError for a setting that is out of range whatever the model."""
    if not 1 <= config.page_size <= 1024:
        raise ValueError(f"page_size is {config.page_size}; allowed: 1 to 1024 tokens, 16 is usual.")
    for name in (
        "max_model_len",
        "kv_memory",
        "picture_cache",
        "max_batch",
        "max_step_tokens",
        "max_queue",
        "max_queue_tokens",
        "threads",
    ):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}; allowed: a whole number from 0 (derive it).")
    if not 0 <= config.overtake < math.inf:
        raise ValueError(f"overtake is {config.overtake}; allowed: a number from 0 (prompts in the order they come).")
    if config.max_model_len == 1:
        raise ValueError("max_model_len is 1; allowed: 0 (derive it) or from 2, a token of prompt and one of answer.")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ValueError(
            f"gpu_memory_utilization is {config.gpu_memory_utilization}; allowed: above 0 to 1, 0.9 is usual."
        )
    if config.lookahead not in (-1, 0, 1):
        raise ValueError(f"lookahead is {config.lookahead}; allowed: 0, 1, or -1 (derive it).")
    schedules.check(config)
    if not 1 <= config.speculate_tokens <= MOST_DRAFTS:
        raise ValueError(f"speculate_tokens is {config.speculate_tokens}; allowed: 1 to {MOST_DRAFTS}, 4 is usual.")


def kv_spec(model: ModelConfig, config: EngineConfig) -> KVSpec:
    """The KV cache's layout for a model under resolved settings. Raises ValueError for a format it cannot have."""
    if model.latent is not None and config.kv_cache not in AS_COMPUTED:
        raise ValueError(
            f"kv_cache is {config.kv_cache!r} and this model caches one latent vector for all heads, which is small "
            "already and is stored as computed; allowed: auto."
        )
    packed = parse(config.kv_cache, model.kv_heads, model.head_dim)
    local = frozenset(i for i, window in enumerate(model.windows) if window) if packed else frozenset()
    sizes = (model.layers, model.kv_heads, model.head_dim)
    return KVSpec(*sizes, DTYPES[config.kv_dtype], config.page_size, packed, local, model.latent is not None)


def unfused(model: ModelConfig, config: EngineConfig) -> str:
    """Why decode steps on a GPU do not read a packed cache as it is stored, what that costs and what to take instead;
    empty where they do. config: resolved.
    """

    def refused(name: str) -> str:
        cache = kv_spec(model, replace(config, kv_cache=name))
        if cache.packed is None or not cache.packing:
            return ""
        spec = AttentionSpec(model.heads, model.kv_heads, model.head_dim, 1.0, rotary_dim=model.rope.rotary_dim)
        if cache.room_pages and cache.dtype != DTYPES[config.dtype]:
            return f"kv_dtype {config.kv_dtype} beside dtype {config.dtype}; allowed: the same"
        return refusal(spec, cache.packed, DTYPES[config.dtype], config.page_size)

    why = refused(config.kv_cache)
    if not why:
        return ""
    fused = [name for name in FUSED if _parses(name, model) and not refused(name)]
    return (
        f"no fused kernel reads {why}. Every decode step unpacks whole contexts first and is slower than with a cache "
        f"as computed; what is won is memory. Take {' or '.join(fused or AS_COMPUTED[:1])} for speed."
    )


def _parses(name: str, model: ModelConfig) -> bool:
    try:
        return parse(name, model.kv_heads, model.head_dim) is not None
    except ValueError:
        return False


def draft_spec(model: ModelConfig, config: EngineConfig) -> KVSpec:
    """Of a draft model, whose small cache is never packed."""
    return kv_spec(model, replace(config, kv_cache="dense"))


def share_of(config: EngineConfig) -> float:
    """Of free memory, how much may be used."""
    return 1.0 if config.device == "cpu" else config.gpu_memory_utilization


def rooms_for(rows: int, spec: KVSpec, config: EngineConfig) -> int:
    """Rooms of a packed cache: of sequences that run, and where prefixes are cached of ends to go on from."""
    if not spec.bytes_per_room:
        return 0
    return rows + (-(-rows // KEPT_ROOMS) if config.prefix_cache else 0)


def plan_memory(
    model: ModelConfig, weights: int, config: EngineConfig, free: int, draft: Draft | None = None
) -> MemoryPlan:
    """Lay out `free` bytes for a model whose weights take `weights` bytes, under resolved settings. Never raises for
    lack of memory.
    """
    plan = lay_out(model, weights, config, free, draft)
    return plan if plan.fits else replace(plan, changes=tuple(_changes(model, weights, config, free, draft)))


def fill(config: EngineConfig, plan: MemoryPlan) -> EngineConfig:
    """Settings with the sizes of a memory plan."""
    return replace(config, max_model_len=plan.max_model_len, kv_memory=plan.kv, max_batch=plan.max_batch)


def lay_out(
    model: ModelConfig, weights: int, config: EngineConfig, free: int, draft: Draft | None = None
) -> MemoryPlan:
    """As `plan_memory`, but it does not look for what would make it fit."""
    specs = [kv_spec(model, config)]
    if draft is not None:
        specs.append(draft_spec(draft.shape, config))
    per_token = sum(spec.bytes_per_token for spec in specs)
    loaded = weights + (draft.weights if draft is not None else 0)
    workspace = workspace_bytes(model, config)
    if draft is not None:
        workspace = max(workspace, workspace_bytes(draft.shape, config))  # they take turns
    longest = min(config.max_model_len or model.max_positions, model.max_positions)
    pictures = config.picture_cache if model.tower is not None else 0
    left = max(0, int(free * share_of(config)) - loaded - workspace - pictures)
    least = longest if config.max_model_len else min(longest, LEAST_TOKENS)
    budget = config.kv_memory or _kv_budget(config, left, free, least * per_token)
    batch = _batch(specs[0], config, budget)
    rooms = rooms_for(min(batch, config.max_step_tokens), specs[0], config)
    exact = rooms * specs[0].bytes_per_room
    tokens = min(max(0, budget - exact) // per_token, batch * (longest + config.page_size))
    pages = max(tokens // config.page_size, -(-least // config.page_size))
    kv = pages * per_token * config.page_size + exact
    return MemoryPlan(
        weights=loaded,
        kv=kv,
        workspace=workspace,
        free=free,
        bytes_per_token=per_token,
        page_size=config.page_size,
        pages=pages,
        max_model_len=min(longest, pages * config.page_size),
        max_batch=batch,
        kv_dtype=config.kv_dtype if specs[0].packed is None else str(specs[0].packed),
        rooms=rooms,
        room_bytes=specs[0].bytes_per_room,
        fits=kv <= min(left, config.kv_memory or left),
        draft_weights=loaded - weights,
        pictures=pictures,
    )


def _batch(spec: KVSpec, config: EngineConfig, budget: int) -> int:
    """Requests computed together: as many as was asked for, or as there are rooms for in the budget's share."""
    most = config.max_batch
    while most > 1 and rooms_for(most, spec, config) * spec.bytes_per_room > ROOM_SHARE * budget:
        most -= max(1, most // 16)
    return most


def _kv_budget(config: EngineConfig, left: int, free: int, least: int) -> int:
    """Bytes for the KV cache: all that is left on a GPU, a modest share of a CPU's memory, unless one sequence needs
    more.
    """
    if config.device != "cpu":
        return left
    return max(min(int(free * CPU_KV_SHARE), CPU_KV_LIMIT, left), min(least, left))


def workspace_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Activations of one step, scratch of a packed cache and what sampling takes, and log-probabilities of prompts, in
    each lane, and of looking at a picture: an estimate from above.
    """
    inner = model.intermediate_size
    if model.experts is not None:
        inner = max(inner, model.experts.routing.top * model.experts.size + model.experts.shared)
    width = 4 * model.hidden_size + 2 * (model.q_size + 2 * model.kv_size) + 3 * inner
    activations = config.max_step_tokens * width * DTYPES[config.dtype].itemsize
    logits = logits_rows(config) * model.vocab_size * (3 * 4 + 8)
    logits += min(PROMPT_LOGPROBS, config.max_step_tokens) * model.vocab_size * 2 * 4
    lane = activations + logits + _unpacking(model, config) + (64 << 20)
    return schedules.pairs_of(config) * lane + _looking(model, config)


def _unpacking(model: ModelConfig, config: EngineConfig) -> int:
    """Scratch of a step with chunks over a packed cache (`kv.attend`): old tokens of a band, new ones behind those of
    their windows, a page more for each request; results of bands in float32.
    """
    packed = None if config.kv_cache in AS_COMPUTED else kv_spec(model, config).packed
    if packed is None:
        return 0
    longest = min(config.max_model_len or model.max_positions, model.max_positions)
    requests, new = logits_rows(config), config.max_step_tokens
    old = min(OLD_TOKENS, requests * longest) + new + requests * config.page_size
    recent = new + requests * (min(packed.window, longest) + config.page_size)
    each = 2 * model.kv_size * max(DTYPES[config.dtype].itemsize, DTYPES[config.kv_dtype].itemsize)
    return (old + recent) * each + 4 * new * model.q_size * 4


def _looking(model: ModelConfig, config: EngineConfig) -> int:
    """Activations of a tower, some of them in float32."""
    tower = model.tower
    if tower is None:
        return 0
    each = 3 * tower.pixels * 4 + (6 * tower.hidden + 2 * tower.inner) * DTYPES[config.dtype].itemsize
    return tower.patches * (each + 4 * tower.hidden * 4)


def logits_rows(config: EngineConfig) -> int:
    """Tokens a step may draw: one a row, and where there are drafts a few more for small batches."""
    drawn = min(config.max_batch * (1 + config.speculate_tokens), MOST_DRAWN) if config.speculate else 0
    return min(max(config.max_batch, drawn), config.max_step_tokens)


def _changes(model: ModelConfig, weights: int, config: EngineConfig, free: int, draft: Draft | None) -> Iterator[str]:
    """Single changes of settings that make it fit, by how little they take away."""

    def fits(changed: EngineConfig, changed_weights: int = weights) -> bool:
        return lay_out(model, changed_weights, changed, free, draft).fits

    if draft is not None and lay_out(model, weights, replace(config, speculate="ngram"), free).fits:
        yield "speculate=ngram (drafts without a model)"
    if DTYPES[config.kv_dtype].itemsize > 2 and fits(replace(config, kv_dtype="float16")):
        yield "kv_dtype=float16"
    if config.kv_cache in AS_COMPUTED and fits(replace(config, kv_cache="fp8")):
        yield "kv_cache=fp8 (keys and values of 8 bits)"
    for batch in _halvings(config.max_batch):
        if fits(replace(config, max_batch=batch)):
            yield f"max_batch={batch}"
            break
    for tokens in _halvings(config.max_step_tokens):
        if fits(replace(config, max_step_tokens=tokens)):
            yield f"max_step_tokens={tokens}"
            break
    for length in _halvings(min(config.max_model_len or model.max_positions, model.max_positions)):
        if length >= LEAST_TOKENS and fits(replace(config, max_model_len=length)):
            yield f"max_model_len={length}"
            break
    if model.tower is not None and config.picture_cache > 1 << 20 and fits(replace(config, picture_cache=1 << 20)):
        yield "picture_cache=1M (pictures are looked at again whenever they come back)"
    if config.kv_memory and fits(replace(config, kv_memory=0)):
        yield "kv_memory=0 (derived from free memory)"
    yield from _lighter_weights(model, weights, config, fits)


def _halvings(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value


def _lighter_weights(
    model: ModelConfig, weights: int, config: EngineConfig, fits: Callable[..., bool]
) -> Iterator[str]:
    """Fewer bits a weight, judged by the bytes a weight takes now."""
    each, cpu = weights / max(1, _parameters(model)), config.device == "cpu"
    if config.weights not in TARGETS and each > 1.5 * Q8_0_BYTES and fits(config, int(weights * Q8_0_BYTES / each)):
        yield f"weights={'q8_0' if cpu else 'int8'} (8 bits a weight)"
    elif each > 0.75 and fits(config, int(weights * 0.6 / each)):
        yield "a GGUF file of about 4.5 bits a weight, such as Q4_K_M" if cpu else "weights=int4 (4 bits a weight)"


def _parameters(model: ModelConfig) -> int:
    inner = model.layers * model.intermediate_size
    if model.experts is not None:
        each = model.experts.routing.experts * model.experts.size + model.experts.shared
        inner = sum(each if sparse else model.intermediate_size for sparse in model.experts.layers)
    attention = model.layers * (2 * model.q_size + 2 * model.kv_size)
    return model.hidden_size * (attention + 3 * inner) + model.vocab_size * model.hidden_size * (1 if model.tied else 2)


def weight_bytes(
    checkpoint: Checkpoint, mode: str, dtype: torch.dtype, kernels: str, without: tuple[str, ...] = ()
) -> tuple[int, bool]:
    """Bytes the weights will take when loaded in this mode, and whether any run quantised. without: how names begin
    that are left out. Of weights only one of each format with zeros is read, where a CPU holds fractions otherwise.
    Raises ValueError for an unknown mode.
    """
    check_mode(mode)
    loaded = []
    fine: dict[str, bool] = {}  # formats with zeros: whether those are fractions
    for name in (name for name in checkpoint.names() if not name.startswith(without)):
        raw = checkpoint.tensor(name)
        stored = "F32" if name.endswith(UNPACKED) else loaded_storage(mode, name, raw.storage, raw.shape)
        if kernels == "native" and stored == raw.storage and is_format(stored) and format_of(stored).zero:
            if stored not in fine:
                fine[stored] = has_fractions(raw)
            stored = "F32" if fine[stored] else stored
        loaded.append((stored, raw.shape))
    copy = head_copy(checkpoint, mode)
    if copy:
        loaded.append((copy, checkpoint.tensor(TABLE).shape))
    total, quantised = 0, False
    for stored, shape in loaded:
        storage = kept_storage(stored, kernels)
        if storage and len(shape) > 1:
            total += math.prod(shape[:-2]) * storage_bytes(storage, shape[-2:])
            quantised = True
        else:
            total += math.prod(shape) * dtype.itemsize
    return total, quantised


def kept_storage(storage: str, kernels: str) -> str:
    """What a set of kernels keeps a matrix of this storage as, empty for dense in the compute type."""
    if storage in DENSE or kernels not in ("native", "gpu"):
        return ""
    if kernels == "gpu":
        return storage if is_format(storage) else ""
    kept = cpu_storage(storage) if is_format(storage) else storage
    return "" if kept in DENSE else kept


def free_memory(device: torch.device) -> int:
    """Bytes this process may still use on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [n for n in (_meminfo(), _cgroup()) if n is not None]
    if limits:
        return min(limits)
    return (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    )  # no measure of what is free: half of what there is


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of the container's limit; cached file pages can be had back, so only anonymous memory counts as
    used.
    """
    try:
        limit = (root / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return None if limit == "max" else max(0, int(limit) - int(stat["anon"]))
    except (OSError, ValueError, KeyError):
        return None
