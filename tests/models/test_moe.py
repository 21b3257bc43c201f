"""Checkpoints of experts: the forms they come in, weights quantised as they are loaded, what is refused."""

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.linears import traced
from tenfold.engine.memory import kv_spec, weight_bytes
from tenfold.engine.request import Request, SamplingParams
from tenfold.models.config import ConfigError
from tenfold.models.table import build_model, model_config
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Bank, RawTensor
from tenfold.ops.oracle import Oracle
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store
from tests.tiny import EXPERTS

Folder = Callable[[str], Path]
PROMPTS = {0: [5, 9, 31, 7], 1: [8], 2: list(range(20, 45))}


def logits(folder: Path, kernels: Kernels, mode: str = "auto") -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint.config, Weights(checkpoint, kernels, mode=mode), 128)
    with torch.inference_mode():
        return model.forward(Sequences(make_store(model.config)).step(PROMPTS, "all"))


def stacked(folder: Path, target: Path) -> Path:
    """The same checkpoint with the experts of a layer in two tensors, as transformers 5 has them in memory."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    layers = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        own = [name for name in tensors if name.startswith(f"{layer}.experts.")]
        count = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in own)
        names = (
            ("w1", "w3", "w2") if f"{layer}.experts.0.w1.weight" in tensors else ("gate_proj", "up_proj", "down_proj")
        )
        gate, up, down = ([tensors[f"{layer}.experts.{i}.{n}.weight"] for i in range(count)] for n in names)
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        tensors[f"{layer}.experts.down_proj"] = torch.stack(down)
        for name in own:
            del tensors[name]
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_are_the_same_model(name: str, tiny: Folder, kernels: Kernels, tmp_path: Path) -> None:
    whole = stacked(tiny(name), tmp_path / "stacked")
    assert torch.equal(logits(whole, kernels), logits(tiny(name), kernels))


def test_stacked_experts_of_another_size_are_refused(tiny: Folder, tmp_path: Path) -> None:
    folder = stacked(tiny("qwen3-moe"), tmp_path / "stacked")
    config = json.loads((folder / "config.json").read_text())
    config["moe_intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj has shape \[8, 80, 64\]"):
        logits(folder, Oracle())


@pytest.mark.parametrize("name", ["qwen2-moe", "mixtral", "deepseek-v3"])
def test_experts_are_quantised_as_they_are_loaded(name: str, tiny: Folder, kernels: Kernels, tmp_path: Path) -> None:
    """The tiny sizes are multiples of 32 but for some inner ones, which stay as they are."""
    exact, rounded = logits(tiny(name), kernels), logits(tiny(name), kernels, "q8_0")
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().mean() < 0.15 * exact.abs().mean()
    whole = stacked(tiny(name), tmp_path / "stacked")
    assert torch.equal(logits(whole, kernels, "q8_0"), rounded)
    for folder in (tiny(name), whole):
        checkpoint = open_checkpoint(folder)
        weights = Weights(checkpoint, kernels, mode="q8_0")
        build_model(checkpoint.config, weights, 128)
        planned, quantised = weight_bytes(checkpoint, "q8_0", torch.float32, kernels.name)
        assert quantised == (kernels.name == "native")
        if quantised:
            assert planned == pytest.approx(sum(m.nbytes for m in weights.matrices), rel=0.12)


def test_a_projection_is_told_how_the_other_is_stored(tiny: Folder) -> None:
    """Of an expert's 24 features inside no block of 32 can be made."""
    seen = []

    class Told(Oracle):
        def bank(
            self, experts: Sequence[Sequence[RawTensor]], pairs: bool = False, beside: Collection[str] = ()
        ) -> Bank:
            seen.append((experts[0][0].storage, set(beside)))
            return super().bank(experts, pairs, beside)

    checkpoint = open_checkpoint(tiny("qwen2-moe"))
    build_model(checkpoint.config, Weights(checkpoint, Told(), mode="q8_0"), 128)
    assert seen == [("Q8_0", {"F32"}), ("F32", {"Q8_0"})] * 2


def test_the_engine_serves_experts_made_up_on_the_spot() -> None:
    engine = Engine.load(EngineConfig("shape:tiny-moe", device="cpu", threads=1), tokens_only=True)
    engine.add(Request("r", (5, 6, 7), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)))
    found = []
    while engine.has_work:
        found += [t for output in engine.step() for t in output.tokens]
    assert len(found) == 4


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b"])
def test_what_a_model_runs_is_found_without_its_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made")

    monkeypatch.setattr(torch.Tensor, "normal_", never)
    assert traced(open_checkpoint(f"shape:{name}"), torch.bfloat16).experts


def test_latents_take_less_room_and_are_not_packed() -> None:
    config = model_config(open_checkpoint("shape:deepseek-v2-lite").config)
    settings = EngineConfig(kv_dtype="bfloat16", device="cpu")
    assert kv_spec(config, settings).bytes_per_token == 27 * (512 + 64) * 2
    with pytest.raises(ValueError, match="one latent vector"):
        kv_spec(config, EngineConfig(kv_dtype="bfloat16", device="cpu", kv_cache="fp8"))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "1 to 4"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("qwen2-moe", {"mlp_only_layers": "all"}, "a list of layer numbers"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("deepseek-v2", {"topk_method": "noaux"}, "greedy, group_limited_greedy"),
        ("deepseek-v3", {"n_group": 3}, "equal groups"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "from 0"),
        ("deepseek-v3", {"kv_lora_rank": "wide"}, "kv_lora_rank is 'wide'"),
        (
            "deepseek-v3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": "much"}},
            "mscale_all_dim of a 'yarn' rope is 'much'",
        ),
    ],
)
def test_configs_that_make_no_sense_are_refused(name: str, change: dict[str, Any], says: str, tiny: Folder) -> None:
    raw = open_checkpoint(tiny(name)).config | change
    with pytest.raises(ConfigError, match=says):
        model_config(raw)


def test_an_expert_that_is_missing_is_named(tiny: Folder, tmp_path: Path) -> None:
    shutil.copytree(tiny("olmoe"), tmp_path / "olmoe")
    tensors = load_file(tmp_path / "olmoe" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, tmp_path / "olmoe" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight"):
        logits(tmp_path / "olmoe", Oracle())
