"""Names of formats read both ways, and bytes are counted exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.ops.kv.quantize import plain, quantize, to_bytes
from tenfold.ops.kv.spec import GROUPS, PARAMETERS, ROTARY, PackedSpec

BITS = st.sampled_from([1.5, 2, 3, 4, 8])
SPECS = st.builds(
    PackedSpec,
    BITS,
    BITS,
    st.sampled_from(GROUPS),
    span=st.integers(1, 4),
    window=st.integers(0, 4096),
    sinks=st.integers(0, 64),
    rotary=st.sampled_from(ROTARY),
    parameters=st.sampled_from(sorted(PARAMETERS)),
) | st.builds(PackedSpec, BITS, BITS, st.sampled_from([32, 64]), rotary=st.just("post"), turned=st.booleans())


@settings(deadline=None, max_examples=40)
@given(spec=SPECS)
def test_a_name_reads_both_ways(spec: PackedSpec) -> None:
    assert PackedSpec.parse(str(spec)) == spec


def test_names() -> None:
    assert str(PackedSpec(2, 1.5)) == "k2v1.5g64"
    assert PackedSpec.parse("k4v2g32h2w0s0-post-fp16") == PackedSpec(4, 2, 32, 2, 0, 0, "post", "fp16")
    for wrong in ("", "k2", "k2v2", "k2v2g64x", "k2v2g40", "k5v2g64", "k2v1..5g64", "k2v2g64h0", "K2V2G64"):
        with pytest.raises(ValueError, match=r"allowed|expected|no numbers"):
            PackedSpec.parse(wrong)


@settings(deadline=None, max_examples=40)
@given(spec=SPECS, kv_heads=st.sampled_from([4, 8, 12]), head_dim=st.sampled_from([64, 96, 128]))
def test_bytes_are_those_that_are_stored(spec: PackedSpec, kv_heads: int, head_dim: int) -> None:
    try:
        counted = spec.bytes_per_token(kv_heads, head_dim)
    except ValueError:
        assert kv_heads % spec.span or spec.span * head_dim % spec.group
        return
    channels = kv_heads * head_dim
    x = torch.linspace(-3, 3, channels)[None]
    total = 0
    for bits in (spec.key_bits, spec.value_bits):
        stored = quantize(x, plain(channels, spec.group), bits, spec.parameters)
        total += sum(part.numel() for part in to_bytes(stored, bits, kv_heads))
    assert counted == total


def test_a_million_tokens_of_a_7b_model_fit_80_gb() -> None:
    """32 layers of 32 heads of 128; 26 bytes a head hold 128 ternary values."""
    spec = PackedSpec(2, 1.5, 128)
    assert spec.bytes_per_token(32, 128) == 32 * (32 + 26) + 2 * 32 * 2
    assert 32 * (1 << 20) * spec.bytes_per_token(32, 128) < 67 * 10**9  # beside 13.5 GB of weights
    assert spec.bits(32, 128) == pytest.approx(1.9375)


def test_groups_that_heads_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match=r"more heads a group"):
        PackedSpec(2, 2, 128).check(4, 64)
    PackedSpec(2, 2, 128, span=2).check(4, 64)
    with pytest.raises(ValueError, match=r"3 kv heads; allowed: 1, 3"):
        PackedSpec(2, 2, 64, span=2).check(3, 64)
