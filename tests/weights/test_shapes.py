"""Random weights of a published shape: nothing is made before it is asked for, and the engine runs on them."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.llm import LLM
from tenfold.engine.opened import Opened
from tenfold.engine.request import Request, SamplingParams
from tenfold.models.table import build_model, make_processor, model_config
from tenfold.ops.blocks import dequantize
from tenfold.ops.formats import format_of
from tenfold.ops.oracle import Oracle
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.find import resolve
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tenfold.weights.shapes import MIXED, SHAPES, ShapeCheckpoint, at_least_positions, draw, shape_config, tensor_shapes

# What the publishers say of their models, in billions.
PARAMETERS = {"llama-2-7b": 6.738, "llama-3-8b": 8.030, "qwen3-8b": 8.191, "mistral-7b": 7.248, "llama-3.2-1b": 1.236}
PARAMETERS |= {"qwen2.5-7b": 7.616, "smollm2-135m": 0.1345, "qwen3-0.6b": 0.596, "llama-3.2-3b": 3.213}
PARAMETERS |= {"mixtral-8x7b": 46.703, "qwen3-30b-a3b": 30.532, "qwen1.5-moe-a2.7b": 14.316, "olmoe-1b-7b": 6.919}
PARAMETERS |= {"deepseek-v2-lite": 15.706, "llava-onevision-7b": 8.03, "llava-onevision-0.5b": 0.894}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_parameters_as_its_model(name: str) -> None:
    count = sum(math.prod(size) for size in tensor_shapes(SHAPES[name]).values())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_of_a_family_we_run(name: str) -> None:
    assert model_config(open_checkpoint(resolve(f"shape:{name}")).config).layers == SHAPES[name]["num_hidden_layers"]


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_and_vllm_know_the_family_of_every_shape(name: str, tmp_path: Path) -> None:
    """vLLM reads configs by way of transformers and goes by the name of the class."""
    (tmp_path / "config.json").write_text(json.dumps(shape_config(f"shape:{name}")))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]


def test_weights_depend_on_their_name_and_look_trained() -> None:
    checkpoint = open_checkpoint(resolve("shape:tiny"))
    first, second = (checkpoint.tensor(f"model.layers.0.mlp.{name}_proj.weight").data for name in ("gate", "up"))
    assert first.dtype == torch.bfloat16
    assert float(first.float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(first, second)
    assert torch.equal(first, open_checkpoint(resolve("shape:tiny")).tensor("model.layers.0.mlp.gate_proj.weight").data)
    assert checkpoint.tensor("model.norm.weight").data.unique().tolist() == [1.0]


def test_opening_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 140 GB is planned on any machine."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made")

    monkeypatch.setattr(torch.Tensor, "normal_", never)
    opened = Opened(EngineConfig("shape:llama-2-70b", device="cpu", kernels="torch", dtype="bfloat16"))
    opened.choose()
    assert opened.memory.weights / 2e9 == pytest.approx(68.98, rel=1e-3)
    assert not opened.memory.fits or opened.memory.free > 138e9


@pytest.mark.parametrize("change", ["", "@layers=1", "@layers=1,vocab=99"])
def test_the_engine_runs_on_token_ids(change: str) -> None:
    engine = Engine.load(EngineConfig("shape:tiny" + change, device="cpu", threads=1), tokens_only=True)
    engine.add(Request("r", (5, 6, 7), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)))
    found = []
    while engine.has_work:
        found += [t for output in engine.step() for t in output.tokens]
    assert len(found) == 4
    assert len(engine.model.blocks) == shape_config("shape:tiny" + change)["num_hidden_layers"]  # type: ignore[attr-defined]
    assert engine.vocab_size == (99 if "vocab" in change else 512)


@pytest.mark.parametrize(("bits", "every"), [("4", 8), ("4.5", 8), ("5", 4)])
def test_experts_may_have_several_formats(bits: str, every: int) -> None:
    """By turns, all matrices of an expert alike, with the numbers that they have in sixteen bits."""
    checkpoint = ShapeCheckpoint(f"shape:qwen3-30b-a3b@layers=1,mixed={bits}")
    names = [name for name in checkpoint.names() if ".experts." in name]
    storages = [checkpoint.tensor(name).storage for name in names]
    assert storages[: 3 * every] * (128 // every) == storages
    turns = storages[: 3 * every : 3]
    assert [s for s in turns for _ in range(3)] == storages[: 3 * every]
    assert {name: turns.count(name) for name in turns} == MIXED[bits]
    sizes = [format_of(storage).nbytes(*checkpoint.tensor(name).shape) for name, storage in zip(names, storages)]
    assert 8 * sum(sizes) / (len(names) * 2048 * 768) == pytest.approx(float(bits), abs=0.2)
    raw, size = checkpoint.tensor(names[0]), checkpoint.tensor(names[0]).shape
    expected = draw(names[0], size, "cpu").float()
    assert (dequantize(raw, torch.float32) - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert checkpoint.tensor("model.layers.0.self_attn.o_proj.weight").storage == "BF16"


def test_where_text_is_needed_it_is_refused_with_a_reason() -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LLM("shape:tiny", device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "shape:",
        "shape:gpt-9",
        "shape:tiny@layers",
        "shape:tiny@layers=0",
        "shape:tiny@x=1",
        "shape:tiny@mixed=4",
        "shape:tiny-moe@mixed=3",
    ],
)
def test_what_is_no_shape_says_what_is(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"known: llama-2-7b|allowed: layers"):
        resolve(name)


def test_a_shape_can_be_given_longer_contexts() -> None:
    assert at_least_positions("shape:tiny", 2048) == "shape:tiny"
    longer = at_least_positions("shape:tiny@layers=1", 4096)
    assert shape_config(longer)["max_position_embeddings"] == 4096
    assert shape_config(longer)["num_hidden_layers"] == 1


@torch.inference_mode()
def test_a_shape_that_sees() -> None:
    """Its tower looks at a picture that its processor prepared."""
    checkpoint = open_checkpoint(resolve("shape:llava-onevision-0.5b@layers=1"))
    checkpoint.config["whole"]["vision_config"] = {
        **checkpoint.config["whole"]["vision_config"],
        "num_hidden_layers": 1,
    }
    processor = make_processor(checkpoint, str)
    assert processor is not None
    (picture,) = processor.prepare([Image.new("RGB", (384, 384))], False)
    assert (picture.tokens, picture.tiles) == (730, 1)
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle()), 16)
    assert model.tower is not None
    assert model.tower.encode(picture).shape == (730, 896)
