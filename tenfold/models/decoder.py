"""What decoder families share: making layers from checkpoint names, and the way from token ids to logits.

A family file holds its config reading and its block, whose `__call__` is the family's forward.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from tenfold.models.config import ModelConfig
from tenfold.models.tower import Tower
from tenfold.nn.attention import Attention
from tenfold.nn.embed import Embedding, Head
from tenfold.nn.linear import Linear
from tenfold.nn.mlp import MLP
from tenfold.nn.moe import MoE
from tenfold.nn.norm import RMSNorm
from tenfold.nn.rope import rope_table, turned_rows
from tenfold.nn.step import Step
from tenfold.ops.attention.unified_max import proven_phi, score_bound
from tenfold.ops.kernels import AttentionSpec, Heads, Kernels, Norm, run
from tenfold.ops.matrix import Experts
from tenfold.weights.load import Weights
from tenfold.weights.softmax import load_phi

SEEN_TOKENS = 1 << 14  # picture tokens of one step that have a row of the rotary table for themselves
LAYERS = ("tenfold.nn.", "tenfold.models.")  # modules whose objects are layers
T = TypeVar("T")


class Block(Protocol):
    def __call__(self, x: Tensor, step: Step) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where one block's layers come from: the weights under `prefix`, shaped by the config.

    rope: table for this layer. unit: what is added to a norm's stored weight (1 for Gemma). phi [heads] float32: the
    layer's unified maximum of attention scores, where a calibration measured it.
    """

    config: ModelConfig
    weights: Weights
    layer: int
    rope: Tensor
    unit: float = 0.0
    phi: Tensor | None = None

    @property
    def prefix(self) -> str:
        return f"model.layers.{self.layer}."

    def has(self, name: str) -> bool:
        return self.weights.has(self.prefix + name)

    def norm(self, name: str, size: int | None = None) -> RMSNorm:
        return make_norm(
            self.weights, self.prefix + name, size or self.config.hidden_size, self.config.norm_eps, self.unit
        )

    def linear(self, names: Sequence[str], rows: Sequence[int], cols: int, bias: bool = False) -> Linear:
        """The named projections stacked by rows."""
        full = [self.prefix + name for name in names]
        weight = self.weights.matrix(*(name + ".weight" for name in full), rows=rows, cols=cols)
        offsets = self.weights.vector(*(name + ".bias" for name in full), size=sum(rows)) if bias else None
        return Linear(self.weights.kernels, weight, offsets)

    def attention(
        self, qkv: Sequence[str], out: str, q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None
    ) -> Attention:
        """Self-attention; qkv names either three projections or one that holds all."""
        c = self.config
        rows = [c.q_size, c.kv_size, c.kv_size]
        spec = AttentionSpec(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.scale,
            window=c.windows[self.layer],
            softcap=c.attention_softcap,
            rotary_dim=c.rope.rotary_dim,
        )
        return Attention(
            self.weights.kernels,
            self.layer,
            self._heads(spec, q_norm, k_norm),
            self.linear(qkv, rows if len(qkv) == 3 else [sum(rows)], c.hidden_size, c.qkv_bias),
            self.linear([out], [c.hidden_size], c.q_size, c.out_bias),
        )

    def _heads(self, spec: AttentionSpec, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Heads:
        q, k = (None if n is None else n.spec for n in (q_norm, k_norm))
        return Heads(spec, self.rope, q, k, self._phi(spec, q, k))

    def _phi(self, spec: AttentionSpec, q_norm: Norm | None, k_norm: Norm | None) -> Tensor | None:
        """What was measured, else what norms of the heads or a soft cap prove to serve any text."""
        phi = self.phi
        if phi is None:
            norms = [None if n is None else n.weight for n in (q_norm, k_norm)]
            phi = proven_phi(score_bound(spec, *norms), spec.heads, self.weights.dtype)
        return None if phi is None else phi.to(self.weights.device)

    def mlp(self, gate_up: Sequence[str], down: str, size: int = 0) -> MLP:
        """Gated feed-forward; gate_up names either two projections or one that holds both; size: features inside, of
        the config where none is named.
        """
        c = self.config
        size = size or c.intermediate_size
        rows = [size] * 2 if len(gate_up) == 2 else [2 * size]
        return MLP(
            self.linear(gate_up, rows, c.hidden_size, c.mlp_bias),
            self.linear([down], [c.hidden_size], size, c.mlp_bias),
            c.activation,
        )

    def moe(
        self,
        router: str,
        experts: str,
        projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        shared: MLP | None = None,
        shared_gate: Linear | None = None,
        bias: str = "",
    ) -> MoE:
        """A router's weight by name; experts: what names of theirs begin with, before their number; projections: gate,
        up and down; bias: the name of what is added to scores for the choice.
        """
        c, weights = self.config, self.weights
        assert c.experts is not None
        own, hidden, count = c.experts, c.hidden_size, c.experts.routing.experts
        each = [[f"{self.prefix}{experts}{i}.{name}.weight" for name in projections] for i in range(count)]
        routing = own.routing
        if bias:
            routing = replace(routing, bias=weights.vector(self.prefix + bias, size=count))
        ups, downs = [e[:2] for e in each], [e[2:] for e in each]
        made = Experts(
            weights.bank(f"{self.prefix}{experts}gate_up_proj", ups, [own.size] * 2, hidden, beside=downs),
            weights.bank(f"{self.prefix}{experts}down_proj", downs, [hidden], own.size, beside=ups),
            c.activation,
        )
        weights.experts.append(made)
        router_weight = weights.kept(self.prefix + router, count, hidden)
        return MoE(weights.kernels, router_weight, routing, made, shared, shared_gate)


class Decoder:
    """Embedding, blocks, final norm, head. Families give `configure` and `block`.

    max_model_len: longest sequence in tokens; positions at or past it must not be run. The KV cache it needs has
    `config.layers`, `config.kv_heads` and `config.head_dim`. tower: what looks at pictures, None where nothing does.

    Where positions of pictures have several axes, the rotary table is longer than the longest sequence: rows past it
    are of the picture tokens of the step under way.
    """

    unit = 0.0
    tower: Tower | None = None

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        if max_model_len < 1:
            raise ValueError(f"max_model_len is {max_model_len}; allowed: a whole number from 1.")
        kernels = weights.kernels
        self.config = config
        table = weights.matrix("model.embed_tokens.weight", rows=[config.vocab_size], cols=config.hidden_size)
        self.embed = Embedding(kernels, table, self.embed_scale(config, weights.dtype))
        rope = rope_table(config.rope, max_model_len, weights.device)
        if config.rope_sections:
            rope = torch.cat([rope, torch.zeros_like(rope[:1]).expand(SEEN_TOKENS, -1)])
        self.turned = (max_model_len, rope)
        local = (
            rope if config.local_rope == config.rope else rope_table(config.local_rope, max_model_len, weights.device)
        )
        phis = load_phi(weights.checkpoint, config.layers, config.heads, weights.dtype) or [None] * config.layers
        self.blocks: list[Block] = [
            self.block(Source(config, weights, layer, local if window else rope, self.unit, phi))
            for layer, (window, phi) in enumerate(zip(config.windows, phis))
        ]
        self.norm = make_norm(weights, "model.norm.weight", config.hidden_size, config.norm_eps, self.unit)
        head = (
            weights.tied_head(table)
            if config.tied
            else weights.matrix("lm_head.weight", rows=[config.vocab_size], cols=config.hidden_size)
        )
        self.head = Head(kernels, head, config.logit_softcap)
        self.experts = tuple(weights.experts)
        self._record(kernels)

    def _record(self, kernels: Kernels) -> None:
        """Steps are recorded where the host need not know which experts they go to."""
        recorded = all(map(kernels.records, self.experts))
        self._replay, self._graph = (kernels.replay(), kernels.graph()) if recorded else (run, run)

    @classmethod
    def configure(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read and check a Hugging Face config. Raises ConfigError."""
        raise NotImplementedError

    def block(self, source: Source) -> Block:
        raise NotImplementedError

    def embed_scale(self, config: ModelConfig, dtype: torch.dtype) -> float:
        return 1.0

    def on(self, kernels: Kernels) -> Self:
        """The same weights on other kernels, with recordings and graphs of its own."""
        other = on_kernels(self, kernels)
        other._record(kernels)
        return other

    def forward(self, step: Step) -> Tensor:
        """Logits [len(step.logits_rows), vocab] float32 of the tokens that ask for them."""
        if step.seen is not None:  # no two such steps are alike
            return self._logits(self._turn(step))
        return self._graph(self._logits, step)

    def hidden(self, step: Step) -> Tensor:
        """Final normed states [T, hidden_size] of all tokens (for embeddings)."""
        return self.norm(self._states(self._turn(step)))

    def part(self, step: Step, x: Tensor | None, layers: range) -> Tensor:
        """Some layers of `forward`: x is what the layers before gave, None for the first; the last give the logits."""
        if x is None:
            x = self._embedded(step)
        step = self._turn(step)
        for layer in layers:
            x = self.blocks[layer](x, step)
        return x if layers.stop < len(self.blocks) else self.head(x[step.logits_rows], self.norm)

    def _logits(self, step: Step) -> Tensor:
        states = self._states(step)
        wanted = states if len(step.logits_rows) == len(states) else states[step.logits_rows]
        return self.head(wanted, self.norm)

    def _states(self, step: Step) -> Tensor:
        return self._run_blocks(step) if step.seen is not None else self._replay(self._run_blocks, step)

    def _run_blocks(self, step: Step) -> Tensor:
        x = self._embedded(step)
        for block in self.blocks:
            x = block(x, step)
        return x

    def _embedded(self, step: Step) -> Tensor:
        x = self.embed(step.token_ids)
        return x if step.seen is None else x.index_copy(0, step.seen.rows, step.seen.features.to(x.dtype))

    def _turn(self, step: Step) -> Step:
        """The same step, its picture tokens at rows of the rotary table that turn them by time, row and column."""
        if step.seen is None or step.seen.places is None:
            return step
        base, table = self.turned
        count = len(step.seen.rows)
        if count > SEEN_TOKENS:
            raise ValueError(f"A step has {count} picture tokens; allowed: up to {SEEN_TOKENS}; lower max_step_tokens.")
        table[base : base + count] = turned_rows(table, step.seen.places, self.config.rope_sections)
        positions = step.positions.clone()
        positions[step.seen.rows] = torch.arange(base, base + count, dtype=positions.dtype, device=positions.device)
        return replace(step, positions=positions)


def on_kernels(layer: T, kernels: Kernels) -> T:
    """A copy of a layer, and of the layers it is made of, on other kernels; weights are shared."""
    made = copy.copy(layer)
    for name, value in vars(layer).items():
        if name == "kernels":
            setattr(made, name, kernels)
        elif isinstance(value, list):
            setattr(made, name, [on_kernels(each, kernels) for each in value])
        elif hasattr(value, "__dict__") and type(value).__module__.startswith(LAYERS):
            setattr(made, name, on_kernels(value, kernels))
    return made


def make_norm(weights: Weights, name: str, size: int, eps: float, unit: float) -> RMSNorm:
    weight = weights.vector(name, size=size)
    return RMSNorm(weights.kernels, weight + unit if unit else weight, eps)
