"""GGUF files in Hugging Face's names: same config, same tensors, and the reference reading of transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tenfold.models.config import ConfigError
from tenfold.models.table import build_model, model_config
from tenfold.ops.blocks import dequantize
from tenfold.ops.matrix import RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.gguf_model import GGUFCheckpoint
from tenfold.weights.hf import HFCheckpoint
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store
from tests.weights.gguf_files import converted, metadata_of, to_gguf, write_gguf

# Variants whose config a GGUF file can state in full.
SAME = {
    "llama": "llama",
    "llama-tied": "llama",
    "llama-mqa": "llama",
    "llama-bias": "llama",
    "llama-head-dim": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "phi3-partial": "phi3",
}


@pytest.mark.parametrize("name", SAME)
def test_config_and_tensors_equal_those_of_the_folder(tiny, tmp_path, name):
    folder = HFCheckpoint(tiny(name))
    file = GGUFCheckpoint(to_gguf(tiny(name), tmp_path / "m.gguf", SAME[name]))
    assert model_config(file.config) == model_config(folder.config)
    assert set(file.names()) == set(folder.names())
    for tensor in folder.names():
        ours = file.tensor(tensor)
        assert ours.name == tensor
        assert torch.equal(ours.data, folder.tensor(tensor).data), tensor


EXPERTS = {"mixtral": "llama", "qwen2-moe-even": "qwen2moe", "qwen3-moe-even": "qwen3moe", "olmoe": "olmoe"}


@pytest.mark.parametrize("storage", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_those_of_the_folder(tiny, tmp_path, name, storage, kernels):
    """One tensor of a file holds a projection of all experts of a layer."""
    folder = HFCheckpoint(tiny(name))
    file = GGUFCheckpoint(to_gguf(tiny(name), tmp_path / "m.gguf", EXPERTS[name], storage))
    assert model_config(file.config) == model_config(folder.config)
    logits = []
    for checkpoint in (file, folder):
        mode = "auto" if checkpoint is file or storage == "F32" else "q8_0"
        model = build_model(checkpoint.config, Weights(checkpoint, kernels, mode=mode), 64)
        with torch.inference_mode():
            logits.append(model.forward(Sequences(make_store(model.config)).step({0: [3, 9, 200], 1: [7]}, "all")))
    # the gate of the shared expert is rounded where weights are quantised as they are loaded, and not in the file
    bound = 1e-5 if storage == "F32" else 0.02
    assert (logits[0] - logits[1]).abs().mean() <= bound * logits[1].abs().mean()


def test_experts_of_another_shape_get_a_sentence(tiny, tmp_path):
    flat = [RawTensor("blk.0.ffn_gate_exps.weight", "F32", (8, 4), torch.zeros(8, 4))]
    hf = HFCheckpoint(tiny("mixtral"))
    others = [t for t in converted(hf, "llama", "F32") if t.name != flat[0].name]
    path = write_gguf(tmp_path / "m.gguf", metadata_of(hf, "llama"), [*flat, *others])
    with pytest.raises(CheckpointError, match=r"ffn_gate_exps\.weight has the shape \[8, 4\]"):
        GGUFCheckpoint(path)


def gemma_extra(folder: Path) -> dict[str, object]:
    """What a Gemma 3 file states in newer keys."""
    config = HFCheckpoint(folder).config
    scaling = config["rope_scaling"]
    extra = {
        "gemma3.attention.sliding_window_pattern": np.array([t != "full_attention" for t in config["layer_types"]]),
        "gemma3.attention.scale": float(config["query_pre_attn_scalar"]) ** -0.5,
    }
    if scaling:
        extra |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": scaling["factor"]}
    return extra


@pytest.mark.parametrize("name", ["gemma3", "gemma3-softcap"])
def test_gemma3_config_and_tensors(tiny, tmp_path, name):
    folder = HFCheckpoint(tiny(name))
    file = GGUFCheckpoint(to_gguf(tiny(name), tmp_path / "m.gguf", "gemma3", extra=gemma_extra(tiny(name))))
    ours, theirs = model_config(file.config), model_config(folder.config)
    assert ours.scale == pytest.approx(theirs.scale, rel=1e-6)
    fields = ("windows", "rope", "local_rope", "logit_softcap", "attention_softcap", "activation", "head_dim", "tied")
    assert {f: getattr(ours, f) for f in fields} == {f: getattr(theirs, f) for f in fields}
    for tensor in folder.names():
        assert torch.allclose(file.tensor(tensor).data, folder.tensor(tensor).data, atol=2e-7), tensor


def test_gemma3_defaults_of_files_that_say_little(tiny, tmp_path):
    config = GGUFCheckpoint(to_gguf(tiny("gemma3"), tmp_path / "m.gguf", "gemma3")).config
    assert config["rope_local_base_freq"] == 10000.0
    assert config["layer_types"] == ["sliding_attention"] * 4
    assert config["query_pre_attn_scalar"] == 32
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


REFERENCE = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3", "phi3": "phi3"}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("storage", ["F32", "Q8_0"])
def test_tensors_equal_what_transformers_reads_from_the_same_file(tiny, tmp_path, name, storage):
    """Names, row order and norms against an independent reader."""
    path = to_gguf(tiny(name), tmp_path / "m.gguf", REFERENCE[name], storage)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name))
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    ours = GGUFCheckpoint(path)
    missing = {"lm_head.weight"} if ours.config["tie_word_embeddings"] else set()
    assert set(theirs) - missing == set(ours.names())
    for tensor in ours.names():
        assert torch.equal(dequantize(ours.tensor(tensor)), theirs[tensor].float()), tensor


def test_blocks_keep_their_bytes_while_rows_change_places(tiny, tmp_path):
    file = GGUFCheckpoint(to_gguf(tiny("llama"), tmp_path / "m.gguf", "llama", "Q4_1"))
    stored = file.stored("blk.1.attn_q.weight")
    ours = file.tensor("model.layers.1.self_attn.q_proj.weight")
    assert ours.storage == "Q4_1"
    assert ours.data.shape == stored.data.shape
    # 4 heads of 16 rows: rows 0, 1, 2 of a head come from its stored rows 0, 2, 4; row 8 from row 1.
    for row, source in ((0, 0), (1, 2), (2, 4), (8, 1), (15, 15), (16, 16), (17, 18), (63, 63)):
        assert torch.equal(ours.data[row], stored.data[source])


def test_llama3_factors_and_longrope_reach_the_config(tiny, tmp_path):
    factors = torch.tensor([1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0])
    rope = [RawTensor("rope_freqs.weight", "F32", (8,), factors)]
    file = GGUFCheckpoint(to_gguf(tiny("llama"), tmp_path / "a.gguf", "llama", more=rope))
    assert file.config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert "rope_freqs.weight" not in set(file.names())
    model_config(file.config)

    folder = HFCheckpoint(tiny("phi3-long"))
    scaling = folder.config["rope_scaling"]
    rope = [
        RawTensor(f"rope_factors_{kind}.weight", "F32", (8,), torch.tensor(scaling[f"{kind}_factor"]))
        for kind in ("long", "short")
    ]
    extra = {"phi3.rope.scaling.original_context_length": 16}
    file = GGUFCheckpoint(to_gguf(tiny("phi3-long"), tmp_path / "b.gguf", "phi3", extra=extra, more=rope))
    ours, theirs = model_config(file.config).rope, model_config(folder.config).rope
    assert ours.scaling["original_max_position_embeddings"] == theirs.scaling["original_max_position_embeddings"] == 16
    assert ours.scaling["long_factor"] == pytest.approx(theirs.scaling["long_factor"])
    assert ours.scaling["short_factor"] == pytest.approx(theirs.scaling["short_factor"])


def test_linear_and_yarn_scalings(tiny, tmp_path):
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = GGUFCheckpoint(to_gguf(tiny("llama-linear"), tmp_path / "a.gguf", "llama", extra=extra))
    assert model_config(file.config).rope == model_config(HFCheckpoint(tiny("llama-linear")).config).rope
    extra = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    file = GGUFCheckpoint(to_gguf(tiny("llama-yarn"), tmp_path / "b.gguf", "llama", extra=extra))
    assert model_config(file.config).rope == model_config(HFCheckpoint(tiny("llama-yarn")).config).rope


BROKEN = {
    "general.architecture": ("mamba", "architecture of this GGUF file is 'mamba'"),
    "llama.block_count": (0, "block_count is 0"),
    "llama.embedding_length": ("wide", "embedding_length is 'wide'"),
    "llama.attention.head_count": (-1.0, "head_count is -1.0"),
    "llama.attention.head_count_kv": (np.array([2, 2, 1], np.int32), "the same for all layers"),
    "llama.attention.value_length": (8, "value_length is 8"),
    "llama.rope.freq_base": (float("nan"), "freq_base is nan"),
    "llama.rope.scaling.type": ("cubic", "type is 'cubic'"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_metadata_that_makes_no_model_gets_a_sentence(tiny, tmp_path, key):
    value, message = BROKEN[key]
    extra = {"llama.rope.scaling.factor": 2.0} if "scaling" in key else {}
    path = to_gguf(tiny("llama"), tmp_path / "m.gguf", "llama", extra={**extra, key: value})
    with pytest.raises(CheckpointError, match=rf"m\.gguf.*{message}"):
        GGUFCheckpoint(path)


def test_tensors_that_do_not_belong_get_a_sentence(tiny, tmp_path):
    expert = [RawTensor("blk.0.ffn_gate_exps.weight", "F32", (2, 4, 4), torch.zeros(2, 4, 4))]
    path = to_gguf(tiny("llama"), tmp_path / "m.gguf", "llama", more=expert)
    with pytest.raises(CheckpointError, match=r"ffn_gate_exps\.weight, which LlamaForCausalLM does not have"):
        GGUFCheckpoint(path)
    path = write_gguf(tmp_path / "empty.gguf", metadata_of(HFCheckpoint(tiny("llama")), "llama"), [])
    with pytest.raises(CheckpointError, match=r"token_embd\.weight"):
        GGUFCheckpoint(path)
    file = GGUFCheckpoint(to_gguf(tiny("llama"), tmp_path / "m.gguf", "llama"))
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.9"):
        file.tensor("model.layers.9.mlp.up_proj.weight")


def test_special_tokens_ends_and_template(tiny, tmp_path):
    extra = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eot_token_id": 7}
    file = GGUFCheckpoint(to_gguf(tiny("llama"), tmp_path / "m.gguf", "llama", extra=extra))
    assert file.chat_template == "{{ messages }}"
    assert file.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert file.eos_ids == (2, 7)


VALUES = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 7, 64, 2**31 - 1, 2**32 - 1]),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda numbers: np.array(numbers, np.int32)),
    st.just(np.array([True, False, True])),
)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_metadata_gives_a_model_or_a_sentence(tiny, tmp_path, name, data):
    hf = HFCheckpoint(tiny(name))
    metadata = {
        **metadata_of(hf, name),
        f"{name}.rope.scaling.type": "yarn",
        f"{name}.rope.scaling.factor": 2.0,
        f"{name}.rope.scaling.attn_factor": 1.0,
        f"{name}.attention.sliding_window_pattern": 2,
        f"{name}.attention.scale": 0.5,
    }
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2, unique=True)):
        metadata[key] = data.draw(VALUES)
    path = write_gguf(tmp_path / "m.gguf", metadata, converted(hf, name, "F32"))
    try:
        file = GGUFCheckpoint(path)
        model_config(file.config)
        file.tokenizer().encode("the land", add_special_tokens=True)
        for tensor in file.names():
            file.tensor(tensor)
    except (CheckpointError, ConfigError):
        pass


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_more_layers_than_tensors_are_refused_before_lists_of_them_are_made(tiny, tmp_path, name):
    path = to_gguf(tiny(name), tmp_path / "m.gguf", name, extra={f"{name}.block_count": 2**31 - 1})
    with pytest.raises(CheckpointError, match=r"block_count is 2147483647"):
        GGUFCheckpoint(path)


@pytest.mark.real_model
def test_the_real_default_model(smollm2):
    file = open_checkpoint(smollm2)
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    assert {key: file.config[key] for key in wanted} == wanted
    assert json.loads(json.dumps(file.config)) == file.config
    assert file.eos_ids == (0, 2)
    assert "<|im_start|>" in file.chat_template
    assert len(set(file.names())) == 272
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    down = reference["blk.29.ffn_down.weight"]
    ours = file.tensor("model.layers.29.mlp.down_proj.weight")
    assert np.array_equal(dequantize(ours).numpy(), gguf.dequantize(down.data, down.tensor_type))
