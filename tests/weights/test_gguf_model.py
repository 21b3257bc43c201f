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

from tenfold.engine.memory import weight_bytes
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
from tests.tiny import TINY, Tiny, make_checkpoint
from tests.weights.gguf_files import (
    converted,
    gguf_name,
    latent_metadata,
    metadata_of,
    split,
    to_gguf,
    write_gguf,
)

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


def latent_file(folder: Path, path: Path, storage: str = "F32", apart: bool = False, **extra: object) -> Path:
    """A tiny DeepSeek as a GGUF file. extra: metadata instead, keys without the architecture; None leaves one out."""
    hf = HFCheckpoint(folder)
    tensors = converted(hf, "deepseek2", storage)
    metadata = metadata_of(hf, "deepseek2") | latent_metadata(hf.config, apart)
    metadata |= {f"deepseek2.{key}": value for key, value in extra.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, metadata, split(tensors, hf.config) if apart else tensors)


LATENT = ("deepseek-v2", "deepseek-v2-groups", "deepseek-v3")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_is_that_of_the_folder(tiny, tmp_path, name, apart, kernels):
    """In files of both kinds: keys and values of heads made by one matrix, or by two, of which one is turned over."""
    folder = HFCheckpoint(tiny(name))
    file = GGUFCheckpoint(latent_file(tiny(name), tmp_path / "m.gguf", apart=apart))
    assert any("attn_k_b" in stored for stored in file.files[0].tensors) == apart
    assert model_config(file.config) == model_config(folder.config)
    assert set(file.names()) == set(folder.names())
    for tensor in folder.names():
        ours, theirs = file.tensor(tensor), folder.tensor(tensor)
        assert (ours.name, ours.shape) == (tensor, theirs.shape)
        assert torch.equal(ours.data, theirs.data), tensor
    logits = []
    for checkpoint in (file, folder):
        model = build_model(checkpoint.config, Weights(checkpoint, kernels), 64)
        with torch.inference_mode():
            logits.append(model.forward(Sequences(make_store(model.config)).step({0: [3, 9, 200], 1: [7]}, "all")))
    assert torch.equal(*logits)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), attn_implementation="eager")
    with torch.inference_mode():
        wanted = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in ([3, 9, 200], [7])])
    torch.testing.assert_close(logits[0], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("apart", [False, True])
def test_blocks_of_latent_attention(tmp_path, apart, kernels):
    """The part for keys is rounded along other rows where it is turned over; what is read is what the file holds."""
    folder = make_checkpoint(Tiny("DeepseekV3", {**TINY["deepseek-v3"].values, **EVEN}), tmp_path / "even")
    file = GGUFCheckpoint(latent_file(folder, tmp_path / "m.gguf", "Q8_0", apart))
    raw = file.tensor("model.layers.1.self_attn.kv_b_proj.weight")
    assert raw.storage == ("F32" if apart else "Q8_0")
    assert raw.shape == (4 * 64, 32)
    exact = HFCheckpoint(folder).tensor(raw.name).data
    each, wanted = dequantize(raw).view(4, 64, 32), exact.view(4, 64, 32)
    assert 0 < (each - wanted).abs().max() < 0.01 * wanted.abs().max()
    if apart:
        keys, values = (dequantize(file.stored(f"blk.1.{half}.weight")) for half in ("attn_k_b", "attn_v_b"))
        assert torch.equal(each[:, :32], keys.view(4, 32, 32).transpose(1, 2))
        assert torch.equal(each[:, 32:], values.view(4, 32, 32))
    weights = Weights(file, kernels)
    model = build_model(file.config, weights, 64)
    planned, _ = weight_bytes(file, "auto", torch.float32, kernels.name)
    assert planned == pytest.approx(sum(m.nbytes for m in weights.matrices), rel=0.05)
    hf = HFCheckpoint(folder)
    whole = build_model(hf.config, Weights(hf, kernels), 64)
    with torch.inference_mode():
        ours, theirs = (
            m.forward(Sequences(make_store(m.config)).step({0: [3, 9, 200], 1: [7]}, "all")) for m in (model, whole)
        )
    assert (ours - theirs).abs().mean() < 0.05 * theirs.abs().mean()


EVEN = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 32, "moe_intermediate_size": 32}


def test_names_are_those_of_the_gguf_package(tiny):
    """Against the table that converters write by."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 3)
    for name in LATENT:
        for tensor in HFCheckpoint(tiny(name)).names():
            plain = tensor.replace("e_score_correction_bias", "e_score_correction.bias")
            stem, _, kind = plain.rpartition(".")
            if ".experts." not in stem:
                assert gguf_name(tensor, "deepseek2") == f"{table.get_name(stem)}.{kind}"
    for half in ("k", "v"):
        assert table.get_name(f"model.layers.0.self_attn.{half}_b_proj") == f"blk.0.attn_{half}_b"


def test_matrices_of_forks_that_keep_the_whole_beside_its_halves(tiny, tmp_path):
    hf = HFCheckpoint(tiny("deepseek-v2"))
    whole = converted(hf, "deepseek2", "F32")
    halves = [t for t in split(whole, hf.config) if t not in whole]
    flat = [RawTensor(t.name, t.storage, (t.shape[0] * t.shape[1], t.shape[2]), t.data.flatten(0, 1)) for t in halves]
    metadata = metadata_of(hf, "deepseek2") | latent_metadata(hf.config, False)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    for tensors in ([*whole, *halves], [*halves, *whole], [t for t in whole if "kv_b" not in t.name] + flat):
        file = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata, tensors))
        assert torch.equal(file.tensor(name).data, hf.tensor(name).data)
    short = [t for t in halves if t.name != "blk.1.attn_v_b.weight"]
    path = write_gguf(tmp_path / "m.gguf", metadata, [t for t in whole if "kv_b" not in t.name] + short)
    with pytest.raises(CheckpointError, match=r"holds blk\.1\.attn_k_b\.weight without its attn_v_b"):
        GGUFCheckpoint(path)
    wrong = [RawTensor("blk.1.attn_v_b.weight", "F32", (4, 20, 8), torch.zeros(4, 20, 8)), *short]
    path = write_gguf(tmp_path / "m.gguf", metadata, [t for t in whole if "kv_b" not in t.name] + wrong)
    with pytest.raises(CheckpointError, match=r"attn_v_b\.weight has the shape \[4, 20, 8\], which 4 heads"):
        GGUFCheckpoint(path).tensor(name)


def test_groups_of_experts_that_early_files_do_not_tell(tiny, tmp_path):
    """Of DeepSeek's own sizes they are known, and any other model has none."""
    config = GGUFCheckpoint(latent_file(tiny("deepseek-v2"), tmp_path / "a.gguf")).config
    assert (config["n_group"], config["topk_method"]) == (1, "greedy")
    for layers, experts, wanted in ((60, 160, (8, 3)), (61, 256, (8, 4)), (61, 384, (1, 1))):
        extra = {"block_count": layers, "expert_count": experts}
        config = GGUFCheckpoint(latent_file(tiny("deepseek-v3"), tmp_path / "b.gguf", **extra, **SILENT)).config
        assert (config["n_group"], config["topk_group"]) == wanted


SILENT = {"expert_group_count": None, "expert_group_used_count": None}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope.dimension_count": 64}, "attention.key_length is 40, where more than the 64 features that rotate"),
        ({"attention.kv_lora_rank": None}, "attention.kv_lora_rank is missing"),
        ({"expert_gating_func": 7}, r"expert_gating_func is 7, where 1 \(softmax\) or 2"),
        ({"expert_weights_norm": True}, "expert_weights_norm is True, where false beside a softmax"),
        ({"attention.temperature_scale": 0.1}, "attention sharper as a text grows"),
        ({"expert_count": None}, "expert_count is missing"),
        ({"leading_dense_block_count": -1.0}, "leading_dense_block_count is -1.0, where a whole number from 0"),
    ],
)
def test_metadata_that_makes_no_latent_model_gets_a_sentence(tiny, tmp_path, extra, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(latent_file(tiny("deepseek-v2"), tmp_path / "m.gguf", **extra))


def test_a_bias_of_choices_beside_a_softmax_is_refused(tiny, tmp_path):
    path = latent_file(tiny("deepseek-v3"), tmp_path / "m.gguf", expert_gating_func=1, expert_weights_norm=None)
    with pytest.raises(CheckpointError, match=r"exp_probs_b\.bias, which DeepseekV2ForCausalLM does not have"):
        GGUFCheckpoint(path)


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


@pytest.mark.parametrize(
    ("name", "arch"), [("llama", "llama"), ("gemma3", "gemma3"), ("phi3", "phi3"), ("deepseek-v3", "deepseek2")]
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_metadata_gives_a_model_or_a_sentence(tiny, tmp_path, name, arch, data):
    hf = HFCheckpoint(tiny(name))
    tensors, latent = converted(hf, arch, "F32"), {}
    if arch == "deepseek2":
        tensors, latent = split(tensors, hf.config), latent_metadata(hf.config, True)
    metadata = {
        **metadata_of(hf, arch),
        **latent,
        f"{arch}.rope.scaling.type": "yarn",
        f"{arch}.rope.scaling.factor": 2.0,
        f"{arch}.rope.scaling.attn_factor": 1.0,
        f"{arch}.attention.sliding_window_pattern": 2,
        f"{arch}.attention.scale": 0.5,
    }
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2, unique=True)):
        metadata[key] = data.draw(VALUES)
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    try:
        file = GGUFCheckpoint(path)
        model_config(file.config)
        file.tokenizer().encode("the land", add_special_tokens=True)
        for tensor in file.names():
            assert file.tensor(tensor).data.numel()
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


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_kind_is_linear(tiny, tmp_path, key):
    """As llama.cpp reads files that do not say, and those of before it had kinds."""
    file = GGUFCheckpoint(to_gguf(tiny("llama"), tmp_path / "m.gguf", "llama", extra={f"llama.{key}": 4.0}))
    assert file.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
