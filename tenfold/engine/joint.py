"""One plan of memory for several models, worked out before any of them is loaded.

Weights and workspaces are what they are; the KV caches share the rest so that every model holds the same number of
tokens, except that none gets more than it would take alone or less than it needs to be of use. On a CPU the caches
together take no more than the largest would alone: memory of a CPU is not ours only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tenfold.base.config import EngineConfig
from tenfold.engine.memory import LEAST_TOKENS, DoesNotFit, Draft, MemoryPlan, fill, lay_out, share_of, size
from tenfold.engine.opened import Opened
from tenfold.models.config import ModelConfig

MOST_TOKENS = 1 << 40  # more than any cache holds


@dataclass(frozen=True, slots=True)
class Tenant:
    """One of the models, and the one that drafts for it. weights: bytes. config: resolved settings, in which
    `max_model_len` and `kv_memory` are as they were asked for.
    """

    name: str
    shape: ModelConfig
    weights: int
    config: EngineConfig
    draft: Draft | None = None

    @classmethod
    def of(cls, name: str, asked: EngineConfig, opened: Opened) -> "Tenant":
        """opened: the model of `asked`, with its choices made."""
        config = replace(opened.config, max_model_len=asked.max_model_len, kv_memory=asked.kv_memory)
        return cls(name, opened.shape, opened.weights, config, opened.draft)

    def plan(self, free: int, kv_memory: int | None = None) -> MemoryPlan:
        config = self.config if kv_memory is None else replace(self.config, kv_memory=kv_memory)
        return lay_out(self.shape, self.weights, config, free, self.draft)


@dataclass(frozen=True, slots=True)
class JointPlan:
    """A plan for each model, by name and without changes of its own, and for each device what is free there in bytes.
    `changes`: settings or fewer models with which it would fit; empty where it does.
    """

    plans: Mapping[str, MemoryPlan]
    configs: Mapping[str, EngineConfig]
    free: Mapping[str, int]
    fits: bool
    changes: tuple[str, ...] = ()

    def total(self, device: str) -> int:
        return sum(plan.total for name, plan in self.plans.items() if self.configs[name].device == device)

    def require(self) -> None:
        """Raises DoesNotFit unless all fit together."""
        if self.fits:
            return
        each = ", ".join(f"{name} {size(plan.total)}" for name, plan in self.plans.items())
        there = ", ".join(f"{size(free)} on {device}" for device, free in self.free.items())
        way = (
            "Any one of these would make them fit: " + "; ".join(self.changes)
            if self.changes
            else "Use smaller models, or ones with fewer bits a weight"
        )
        raise DoesNotFit(
            f"The models do not fit into memory together: they need at least {each}; free: {there}. {way}."
        )


def plan_together(tenants: Sequence[Tenant], free: Mapping[str, int]) -> JointPlan:
    """free: bytes by device. Never raises for lack of memory."""
    plan = _lay_out(tenants, free)
    return plan if plan.fits else replace(plan, changes=tuple(_changes(tenants, free)))


def _lay_out(tenants: Sequence[Tenant], free: Mapping[str, int]) -> JointPlan:
    plans: dict[str, MemoryPlan] = {}
    fits = True
    for device, there in free.items():
        group = [tenant for tenant in tenants if tenant.config.device == device]
        least = {t.name: t.plan(0) for t in group}
        left = _usable(group, there) - sum(plan.weights + plan.workspace for plan in least.values())
        together = sum(plan.kv for plan in least.values()) <= left
        plans |= _shared(group, least, there, left) if together else least
        fits = fits and together
    found = {t.name: plans[t.name] for t in tenants}
    configs = {t.name: fill(t.config, plans[t.name]) for t in tenants}
    return JointPlan(found, configs, free, fits and all(plan.fits for plan in found.values()))


def _usable(group: Sequence[Tenant], free: int) -> int:
    """Of a device's free memory, as much as the most modest of its models allows."""
    return int(free * min((share_of(t.config) for t in group), default=1.0))


def _shared(group: Sequence[Tenant], least: Mapping[str, MemoryPlan], free: int, left: int) -> dict[str, MemoryPlan]:
    """Plans for models that fit: caches of the same number of tokens, between the least and the most of each."""
    most = {t.name: max(t.plan(free).kv, least[t.name].kv) for t in group}
    if group and group[0].config.device == "cpu":
        left = min(left, max(sum(plan.kv for plan in least.values()), *most.values()))

    def shares(tokens: int) -> dict[str, int]:
        wanted = {name: tokens * plan.bytes_per_token for name, plan in least.items()}
        return {name: min(max(bytes, least[name].kv), most[name]) for name, bytes in wanted.items()}

    tokens, too_many = 0, MOST_TOKENS
    while too_many - tokens > 1:
        middle = (tokens + too_many) // 2
        tokens, too_many = (middle, too_many) if sum(shares(middle).values()) <= left else (tokens, middle)
    return {t.name: t.plan(free, shares(tokens)[t.name]) for t in group}


def _changes(tenants: Sequence[Tenant], free: Mapping[str, int]) -> Iterator[str]:
    """Single changes that make them fit: of a setting of all, or a model left out."""

    def fits(change: Callable[[EngineConfig], EngineConfig]) -> bool:
        return _lay_out([replace(t, config=change(t.config)) for t in tenants], free).fits

    if fits(lambda c: replace(c, kv_dtype="float16")):
        yield "kv_dtype=float16"
    for name, first, smallest in (
        ("max_batch", max(t.config.max_batch for t in tenants), 1),
        ("max_step_tokens", max(t.config.max_step_tokens for t in tenants), 16),
        ("max_model_len", max(t.config.max_model_len for t in tenants), LEAST_TOKENS),
    ):
        value = first // 2
        while value >= smallest:
            if fits(lambda c: replace(c, **{name: min(getattr(c, name), value)})):  # noqa: B023  called at once
                yield f"{name}={value}"
                break
            value //= 2
    if any(t.config.kv_memory for t in tenants) and fits(lambda c: replace(c, kv_memory=0)):
        yield "kv_memory=0 (derived from free memory)"
    for left_out in tenants if len(tenants) > 1 else ():
        if _lay_out([t for t in tenants if t is not left_out], free).fits:
            yield f"leaving out {left_out.name}"
