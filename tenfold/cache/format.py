"""KV formats by name: what `--kv-cache` allows, and what a name means for a model's heads."""

from collections.abc import Iterable

from tenfold.ops.kv.spec import GROUPS, PackedSpec

AS_COMPUTED = ("auto", "dense")
NAMES = ("dense", "fp8", "int4", "skvq")


def parse(name: str, kv_heads: int, head_dim: int) -> PackedSpec | None:
    """None: keys and values are stored as computed, in the type of `kv_dtype`. Raises ValueError.

    "fp8": float8 e4m3, a scale for each token and head. "int4": four bits, groups of 64 channels turned by a Hadamard
    matrix. "skvq": two bits for keys and 1.5 for values behind a window of 128 tokens, groups as large as still leave a
    head something to reorder. Any other name is one of `PackedSpec`.
    """
    if name in AS_COMPUTED:
        return None
    if name == "fp8":
        spec = PackedSpec(
            8, 8, _group(name, head_dim, reversed(GROUPS)), window=0, sinks=0, rotary="post", parameters="fp16"
        )
    elif name == "int4":
        group = _group(name, head_dim, (64, 32, 16))
        spec = PackedSpec(4, 4, group, window=0, sinks=0, rotary="post", parameters="fp16", turned=True)
    elif name == "skvq":
        spec = PackedSpec(2, 1.5, _group(name, head_dim, (g for g in (64, 32, 16) if g < head_dim)))
    else:
        try:
            spec = PackedSpec.parse(name)
        except ValueError as error:
            raise ValueError(f"kv_cache is {name!r}; allowed: auto, {', '.join(NAMES)}. {error}") from error
    spec.check(kv_heads, head_dim)
    return spec


def _group(name: str, head_dim: int, wanted: Iterable[int]) -> int:
    """The first of these numbers of channels that cuts a head into equal groups. Raises ValueError."""
    found = next((group for group in wanted if head_dim % group == 0), None)
    if found is None:
        raise ValueError(
            f"kv_cache is {name!r}, which has no groups for heads of {head_dim} channels; allowed for this model: "
            "auto, dense."
        )
    return found


def calibrated(spec: PackedSpec) -> bool:
    """Whether the format is of no use without groups and clip factors that were measured."""
    return not spec.turned and min(spec.key_bits, spec.value_bits) < 8
