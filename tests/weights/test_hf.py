"""Hugging Face folders: shards, tokenizer files, both forms of config.json, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tenfold.models.table import model_config
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.hf import HFCheckpoint
from tenfold.weights.hf_config import normalise
from tenfold.weights.open import open_checkpoint
from tests.weights.test_tokenizers import train


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of a small model that a test may change."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    edit(content)
    path.write_text(json.dumps(content))


def test_a_folder_holds_config_tensors_tokenizer_and_template(folder):
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    assert set(checkpoint.names()) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name).data, tensor)
    assert "model.norm.weight" in checkpoint
    assert "model.other.weight" not in checkpoint
    assert checkpoint.eos_ids == (2,)
    assert checkpoint.special["bos_token"] == "<s>"
    assert checkpoint.tokenizer().encode("the", add_special_tokens=True).ids[0] == 1
    assert "messages" in checkpoint.chat_template
    with pytest.raises(CheckpointError, match="holds no tensor nothing"):
        checkpoint.tensor("nothing")


def test_shards_are_one_model(tiny, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = HFCheckpoint(tmp_path)
    state = model.state_dict()
    assert set(checkpoint.names()) == set(state)
    assert all(torch.equal(checkpoint.tensor(name).data, state[name]) for name in state)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "model.bin", ""]
)
def test_an_index_may_not_point_elsewhere(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="only safetensors files in the same folder"):
        HFCheckpoint(folder)


def test_broken_folders_get_a_sentence(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors"):
        HFCheckpoint(folder)
    index.write_text(json.dumps({"weight_map": ["w"]}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        HFCheckpoint(folder)
    index.unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle files, which can run any code"):
        HFCheckpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="download is incomplete"):
        HFCheckpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        HFCheckpoint(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config\.json is not UTF-8"):
        HFCheckpoint(folder)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HFCheckpoint(tmp_path)


def test_paths_that_are_no_checkpoint_get_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="neither a folder"):
        open_checkpoint(tmp_path / "notes.txt")


def test_one_tensor_in_two_files_gets_a_sentence(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    files = {"a": "model.safetensors", "b": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match="both hold the tensor"):
        HFCheckpoint(folder)


def test_files_larger_than_any_real_one_are_not_read(folder, monkeypatch):
    monkeypatch.setattr("tenfold.weights.hf.MAX_CONFIG", 100)
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        HFCheckpoint(folder)


def test_ends_of_an_answer_come_from_the_most_specific_file(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert HFCheckpoint(folder).eos_ids == (5, 2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert HFCheckpoint(folder).eos_ids == (2,)
    change(folder / "config.json", lambda config: config.pop("eos_token_id"))
    assert HFCheckpoint(folder).eos_ids == (2,)  # the tokenizer's "</s>"
    change(folder / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    assert HFCheckpoint(folder).eos_ids == ()


def test_chat_templates_have_an_order(folder):
    config = folder / "tokenizer_config.json"
    change(
        config,
        lambda c: c.update(chat_template=[{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]),
    )
    assert HFCheckpoint(folder).chat_template == "D"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert HFCheckpoint(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("X\n")
    assert HFCheckpoint(folder).chat_template == "X\n"
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink()
    change(config, lambda c: c.pop("chat_template"))
    assert HFCheckpoint(folder).chat_template is None


def test_special_tokens_may_be_objects_or_in_their_own_file(folder):
    change(folder / "tokenizer_config.json", lambda c: c.update(bos_token={"content": "<B>"}, unk_token=None))
    change(folder / "special_tokens_map.json", lambda c: c.update(bos_token="<A>", unk_token={"content": "<U>"}))
    special = HFCheckpoint(folder).special
    assert (special["bos_token"], special["unk_token"]) == ("<B>", "<U>")


def test_settings_for_training_do_not_cut_or_fill_texts(folder):
    def shorten(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        }

    change(folder / "tokenizer.json", shorten)
    ids = HFCheckpoint(folder).tokenizer().encode("xyzxyz", add_special_tokens=False).ids
    assert len(ids) == 6


def test_tokenizers_that_are_broken_missing_or_sentencepiece(folder):
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="not a usable tokenizer"):
        HFCheckpoint(folder).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        HFCheckpoint(folder).tokenizer()
    (folder / "tokenizer.model").write_bytes(train())
    tokenizer = HFCheckpoint(folder).tokenizer()
    ids = tokenizer.encode("the dog").ids
    assert ids[0] == 1  # "<s>", as Llama's tokenizers begin
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the dog"


def save_composite(tiny: Callable[[str], Path], path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """A text model inside a vision-language checkpoint, as Gemma 3 from 4B up is published."""
    inner = json.loads((tiny("gemma3") / "config.json").read_text())
    text = {key: value for key, value in inner.items() if key != "architectures"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    (path / "config.json").write_text(json.dumps({**outer, "text_config": text, "vision_config": {}}))
    state = load_file(tiny("gemma3") / "model.safetensors")
    stored = {prefix + name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file({**stored, "vision_tower.w": torch.zeros(3)}, path / "model.safetensors")
    return state


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_vision_language_model_is_a_model(tiny, tmp_path, prefix):
    state = save_composite(tiny, tmp_path, prefix)
    checkpoint = HFCheckpoint(tmp_path)
    assert set(checkpoint.names()) == set(state)
    assert all(torch.equal(checkpoint.tensor(name).data, state[name]) for name in state)
    assert model_config(checkpoint.config) == model_config(HFCheckpoint(tiny("gemma3")).config)
    assert checkpoint.eos_ids == (1, 106)


def form(config: dict[str, Any]) -> dict[str, Any]:
    found = normalise(config, "config.json")
    keys = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "torch_dtype")
    return {key: found[key] for key in keys if key in found}


LINEAR = {"rope_type": "linear", "factor": 8.0}


def test_both_forms_of_rope_and_type_become_one():
    assert form({}) == {"rope_scaling": None}
    assert form({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 8.0}}) == {
        "rope_theta": 5.0,
        "rope_scaling": LINEAR,
    }
    assert form({"rope_parameters": {**LINEAR, "rope_theta": 5.0, "partial_rotary_factor": 0.5}}) == {
        "rope_theta": 5.0,
        "rope_scaling": LINEAR,
        "partial_rotary_factor": 0.5,
    }
    assert form({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})["rope_scaling"] is None
    assert form({"rope_scaling": {"type": "su", "long_factor": [1.0]}})["rope_scaling"]["rope_type"] == "longrope"
    layers = {
        "full_attention": {**LINEAR, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert form({"rope_parameters": layers}) == {
        "rope_theta": 1e6,
        "rope_scaling": LINEAR,
        "rope_local_base_freq": 1e4,
    }
    assert form({"dtype": "bfloat16"})["torch_dtype"] == "bfloat16"
    assert form({"torch_dtype": "torch.float16"})["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": 3},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"type": 3}},
        {"model_type": "gemma3", "text_config": None},
    ],
)
def test_configs_of_the_wrong_kind_get_a_sentence(config):
    with pytest.raises(CheckpointError, match=r"config\.json.*damaged"):
        normalise(config, "config.json")


def test_scaling_of_sliding_layers_is_refused() -> None:
    layers = {"full_attention": {"rope_type": "default"}, "sliding_attention": {**LINEAR, "rope_theta": 5.0}}
    with pytest.raises(CheckpointError, match="sliding_attention have rope_type 'linear'; supported: default"):
        form({"rope_parameters": layers})
