"""Runs the quality comparison on a model file: our float32 path and our default CPU path against transformers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.bench.claims import Claim, called, claim
from tenfold.bench.peers.hugging_face import reference_model
from tenfold.bench.quality import Quality, compare, windows
from tenfold.cache.store import KVStore
from tenfold.engine.core import Engine
from tenfold.engine.text import Text
from tenfold.nn.step import Step

# Name of a path and the settings that select it.
PATHS: dict[str, dict[str, Any]] = {
    "float32": {"weights": "dense", "dtype": "float32", "kernels": "torch"},
    "float32, compiled kernels": {"weights": "dense", "dtype": "float32", "kernels": "native"},
    "default": {},
}


def forward(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Logits [T, vocabulary] of one sequence in one step, over a KV store of its own."""
    size, device = engine.config.page_size, engine.device
    pages = -(-len(ids) // size)
    count = len(ids)
    step = Step(
        token_ids=torch.tensor(list(ids), device=device),
        positions=torch.arange(count, dtype=torch.int32, device=device),
        slots=torch.arange(count, dtype=torch.int32, device=device),
        page_table=torch.arange(pages, dtype=torch.int32, device=device)[None],
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        kv_lengths=torch.tensor([count], dtype=torch.int32, device=device),
        logits_rows=torch.arange(count, device=device),
        max_query=count,
        max_kv=count,
        kv=KVStore(engine.kv.spec, pages, device),
    )
    return engine.model.forward(step)


def decoded(engine: Engine, pieces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [T, vocabulary] of each piece, all of one length: token by token, the pieces of one step together, as
    answers are made. Inputs lie at one place, so that a GPU replays its graph.
    """
    count, length = len(pieces), len(pieces[0])
    size, device = engine.config.page_size, engine.device
    pages = -(-length // size)
    ids = torch.tensor([list(piece) for piece in pieces], device=device)
    table = torch.arange(count * pages, dtype=torch.int32, device=device).view(count, pages)
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    step = Step(
        token_ids=ids[:, 0].clone(),
        positions=zeros.clone(),
        slots=table[:, 0] * size,
        page_table=table,
        query_start=torch.arange(count + 1, dtype=torch.int32, device=device),
        kv_lengths=zeros + 1,
        logits_rows=torch.arange(count, device=device),
        max_query=1,
        max_kv=1,
        kv=KVStore(engine.kv.spec, count * pages, device),
        decodes=count,
    )
    found = []
    for place in range(length):
        step.token_ids.copy_(ids[:, place])
        found.append(engine.model.forward(replace(step, max_kv=place + 1)).clone())
        for tensor in (step.positions, step.slots, step.kv_lengths):
            tensor += 1  # the pages of a piece follow each other
    return list(torch.stack(found, dim=1))


def run(
    model: str, text: Path, window: int, count: int, command: str, say: Callable[[str], None]
) -> tuple[list[Claim], dict[str, Any]]:
    """Judge every path on the first `count` windows of the text. Raises ValueError for a text too short."""
    reference = reference_model(model)

    def expected(ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = reference(torch.tensor([list(ids)])).logits[0]
            return logits

    claims: list[Claim] = []
    rows: dict[str, Any] = {}
    pieces: list[Sequence[int]] = []
    for name, settings in PATHS.items():
        config = EngineConfig(model=model, max_model_len=max(window, 256), max_batch=1)
        engine = Engine.load(replace(config, **settings))
        if not pieces:
            assert isinstance(engine.text, Text)
            pieces = list(windows(engine.text.encode(text.read_text(errors="replace")), window, count))
        with torch.inference_mode():
            found = compare(expected, lambda ids, engine=engine: forward(engine, ids), pieces)
        rows[name] = asdict(found)
        say(describe(name, found))
        claims += judged(name, found, model, command)
    return claims, rows


def describe(name: str, found: Quality) -> str:
    perplexity = f"perplexity {found.perplexity:.4f} (transformers {found.reference_perplexity:.4f}"
    rest = f"KL {found.kl:.3g}, same best token {found.agreement:.4f}, {found.tokens} tokens"
    return f"{name:26} {perplexity}, {found.perplexity_change:+.4%}), {rest}"


def judged(name: str, found: Quality, model: str, command: str) -> list[Claim]:
    """The claims on one path: float32 within 0.1 % of transformers, the default path within 1 % and 0.005 nats."""
    label = f"{called(model)}, {name} path against transformers float32"
    note = f"{found.perplexity:.3f} against {found.reference_perplexity:.3f} over {found.tokens} tokens of the text."
    change, limit = 100 * abs(found.perplexity_change), 1.0 if name == "default" else 0.1
    claims = [
        claim("A5", f"perplexity change, {label}", change, "%", command, at_most=limit, kind="correctness", note=note)
    ]
    if name == "default":
        note = f"Same best token at {found.agreement:.1%} of places."
        claims.append(
            claim("A5", f"mean KL, {label}", found.kl, "nats", command, at_most=0.005, kind="correctness", note=note)
        )
    return claims
