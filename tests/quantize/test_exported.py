"""What is written as compressed-tensors, read back by the library of that name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("scipy")
pytest.importorskip(
    "compressed_tensors", reason="compressed-tensors is not installed; run: pip install compressed-tensors"
)

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors import safe_open

from tenfold.ops.blocks import dequantize
from tenfold.quantize.mxmoe.recipe import FILE
from tenfold.quantize.mxmoe.run import Wish, quantize
from tenfold.weights.open import open_checkpoint
from tests.tiny import Tiny, make_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it would do that. " * 60
SCHEMES = "w2g128", "w3g128", "w4g128", "w4a8", "w8", "fp8", "fp8g128a8"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def modules_of(names: list[str]) -> nn.Module:
    """Linears of these names in a tree, as transformers would have them."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(128, 128, bias=False))
    return root


@pytest.mark.parametrize("schemes", [SCHEMES, ("w4a8",), ("fp8a8",)], ids=["mixed", "w4a8", "fp8a8"])
def test_the_library_decompresses_the_same(schemes: tuple[str, ...], tmp_path: Path) -> None:
    """Each module gets the scheme that was written for it, and becomes the very numbers that we read."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
    counts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    source = open_checkpoint(make_checkpoint(Tiny("Qwen2Moe", {**sizes, **counts}), tmp_path / "model"))
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    wish = Wish(9.0, ",".join(schemes), "rtn", length=64, windows=4, layout="compressed-tensors", sensitivity="layer")
    made = quantize(source, text, out, wish)
    if len(schemes) > 1:
        content = json.loads((out / FILE).read_text())
        content["schemes"] = {block: schemes[i % len(schemes)] for i, block in enumerate(made.schemes)}
        (tmp_path / "recipe.json").write_text(json.dumps(content))
        out = tmp_path / "followed"
        quantize(source, text, out, wish, recipe=tmp_path / "recipe.json")

    state, ours = stored(out), open_checkpoint(out)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    matrices = [name for name in ours.names() if name.endswith(".weight") and ours.tensor(name).data.dim() == 2]
    root = modules_of([name.removesuffix(".weight") for name in matrices if "embed" not in name])
    apply_quantization_config(root, QuantizationConfig.model_validate(settings))
    packed = {name.removesuffix("_scale") for name in state if name.endswith("weight_scale")}
    acts = set()
    for module, own in root.named_modules():
        scheme: Any = getattr(own, "quantization_scheme", None)
        assert (scheme is not None) == (f"{module}.weight" in packed), module
        if scheme is None:
            continue
        parts = {name.rpartition(".")[2]: t for name, t in state.items() if name.startswith(f"{module}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        theirs = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
        raw = ours.tensor(f"{module}.weight")
        assert torch.equal(theirs.decompress(parts, scheme)["weight"], dequantize(raw)), raw.storage
        acts.add((raw.storage.endswith("a8"), scheme.input_activations and scheme.input_activations.type))
    assert len(packed) == 4 * 3
    assert acts <= {(True, "float"), (False, None)}
    assert len({ours.tensor(name).storage for name in packed}) == len(schemes)
