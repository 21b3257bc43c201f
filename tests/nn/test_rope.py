"""Rotary tables against transformers' own, and what a broken scaling is answered with."""

import math
from typing import Any

import pytest
import torch

from tenfold.nn.rope import RopeSpec, rope_table

LISTS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 4.0, 9.0, 16.0]}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 32, **LISTS},
    "longrope-factor": {"rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": 32, **LISTS},
    "longrope-attention": {
        "rope_type": "longrope",
        "factor": 3.0,
        "attention_factor": 1.2,
        "original_max_position_embeddings": 32,
        **LISTS,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("positions", [20, 32, 33, 128, 300])
def test_tables_equal_transformers(name: str, positions: int) -> None:
    """To the last bit, since operations are the same. `positions` straddle the original and the model's context."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(positions)[None])
    want = torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=1)
    table = rope_table(RopeSpec(5000.0, 8, 128, scaling), positions)
    assert table.dtype == torch.float32
    assert torch.equal(table, want)


def test_dynamic_keeps_the_base_within_the_context() -> None:
    plain = RopeSpec(1e4, 8, 64)
    dynamic = RopeSpec(1e4, 8, 64, {"rope_type": "dynamic", "factor": 4.0})
    assert torch.equal(rope_table(plain, 64), rope_table(dynamic, 64))
    assert not torch.equal(rope_table(plain, 65), rope_table(dynamic, 65))


def test_longrope_is_picked_by_the_longest_sequence() -> None:
    spec = RopeSpec(1e4, 8, 128, SCALINGS["longrope"])
    short, long = rope_table(spec, 32), rope_table(spec, 33)
    assert not torch.equal(short, long[:32])


def test_gguf_divisors() -> None:
    spec = RopeSpec(1e4, 4, 64, {"rope_type": "factors", "factors": [1.0, 8.0]})
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 1e4**-0.5 / 8.0])
    torch.testing.assert_close(rope_table(spec, 5), torch.cat((angles.cos(), angles.sin()), dim=1))


def test_no_positions() -> None:
    assert rope_table(RopeSpec(1e4, 4, 64), 0).shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 0.0}, "rope_theta is 0.0"),
        ({"theta": math.nan}, "rope_theta is nan"),
        ({"theta": math.inf}, "rope_theta is inf"),
        ({"rotary_dim": 7}, "rotary dimension is 7; allowed: an even number"),
        ({"rotary_dim": 0}, "rotary dimension is 0"),
        ({"scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral'; supported: .*yarn"),
        ({"scaling": {"rope_type": "linear"}}, "factor of a 'linear' rope is None"),
        ({"scaling": {"rope_type": "linear", "factor": -1}}, "factor of a 'linear' rope is -1"),
        ({"scaling": {"rope_type": "linear", "factor": "8"}}, "is '8'"),
        ({"scaling": {"rope_type": "linear", "factor": True}}, "is True"),
        ({"scaling": {"rope_type": "linear", "factor": 1e300}}, "below 1e9"),
        ({"scaling": {**SCALINGS["llama3"], "high_freq_factor": 1.0}}, "more than low_freq_factor"),
        ({"scaling": {**SCALINGS["yarn"], "original_max_position_embeddings": 1}}, "a number above 1"),
        ({"scaling": {**SCALINGS["longrope"], "short_factor": [1.0]}}, "holds 1 numbers; allowed: a list of 4"),
        ({"scaling": {**SCALINGS["longrope"], "long_factor": [1.0, 1.0, 0.0, 1.0]}}, "not positive"),
        ({"scaling": {**SCALINGS["longrope"], "long_factor": [1.0, 1.0, "x", 1.0]}}, "not positive"),
        ({"scaling": {"rope_type": "factors", "factors": 3}}, "holds 3; allowed"),
        ({"rotary_dim": 2, "scaling": SCALINGS["dynamic"]}, "rotary dimension from 4"),
    ],
)
def test_broken_scalings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeSpec(**{"theta": 1e4, "rotary_dim": 8, "max_positions": 128, **changes})
