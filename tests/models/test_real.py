"""SmolLM2-135M-Instruct from its GGUF file: dequantised it is what transformers runs, quantised it stays close."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.models.table import Model, build_model
from tenfold.ops.blocks import dequantize
from tenfold.ops.cpu.build import find_compiler
from tenfold.ops.oracle import Oracle
from tenfold.ops.table import make_kernels
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store

pytestmark = pytest.mark.real_model

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
)


@pytest.fixture(autouse=True, scope="module")
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    transformers_model.cache_clear()
    dense.cache_clear()


@cache
def transformers_model(path: Path) -> Any:
    """transformers' Llama filled with our dequantised tensors: its own GGUF reader takes a minute."""
    import transformers

    checkpoint = open_checkpoint(path)
    known = {key: value for key, value in checkpoint.config.items() if key not in ("rope_theta", "rope_scaling")}
    config = transformers.LlamaConfig(
        **known, rope_parameters={"rope_type": "default", "rope_theta": checkpoint.config["rope_theta"]}
    )
    assert checkpoint.config["rope_scaling"] is None
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = {name: dequantize(checkpoint.tensor(name)) for name in checkpoint.names()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@cache
def dense(path: Path) -> Model:
    checkpoint = open_checkpoint(path)
    return build_model(checkpoint.config, Weights(checkpoint, Oracle()), 256)


def encode(path: Path, text: str) -> list[int]:
    return open_checkpoint(path).tokenizer().encode(text).ids


def test_greedy_tokens_equal_transformers(smollm2: Path) -> None:
    """64 tokens after each prompt. Given equal tokens so far, greedy decoding goes on equally where the best token of
    the next position is the same; so one pass of transformers over our text decides what 64 of its steps would."""
    prompts = {i: encode(smollm2, text) for i, text in enumerate(PROMPTS)}
    model = dense(smollm2)
    sequences = Sequences(make_store(model.config, pages=24))
    ours: dict[int, list[int]] = {i: [] for i in prompts}
    step = sequences.step(prompts)
    for _ in range(64):
        for i, token in enumerate(model.forward(step).argmax(dim=1).tolist()):
            ours[i].append(token)
        step = sequences.step({i: [tokens[-1]] for i, tokens in ours.items()})
    for i, prompt in prompts.items():
        logits = transformers_model(smollm2)(torch.tensor([prompt + ours[i]])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(dim=1).tolist() == ours[i]


def test_logits_equal_transformers(smollm2: Path) -> None:
    """30 layers of sums over up to 1536 terms: rounding grows to about 1e-5 of the largest logit."""
    tokens = encode(smollm2, PROMPTS[0] * 8)
    model = dense(smollm2)
    ours = model.forward(Sequences(make_store(model.config)).step({0: tokens}, "all"))
    theirs = transformers_model(smollm2)(torch.tensor([tokens])).logits[0]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_tensors_equal_the_gguf_package(smollm2: Path) -> None:
    """An independent reader of the file, which interleaves the rows of query and key heads."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    checkpoint = open_checkpoint(smollm2)

    def theirs(name: str) -> Tensor:
        tensor = stored[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.copy()).reshape(tuple(int(n) for n in reversed(tensor.shape)))

    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.7.attn_output.weight": "model.layers.7.self_attn.o_proj.weight",
        "blk.13.ffn_gate.weight": "model.layers.13.mlp.gate_proj.weight",
        "blk.13.ffn_up.weight": "model.layers.13.mlp.up_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }
    for name, ours in names.items():
        assert torch.equal(dequantize(checkpoint.tensor(ours)), theirs(name)), name
    for name, ours, heads in (("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3)):
        got = dequantize(checkpoint.tensor(f"model.layers.4.self_attn.{ours}.weight"))
        rows = theirs(f"blk.4.{name}.weight").view(heads, 32, 2, -1)
        assert torch.equal(got.view(heads, 2, 32, -1), torch.stack((rows[:, :, 0], rows[:, :, 1]), dim=1))


@pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine, so no compiled kernels to test")
def test_quantised_model_stays_close_to_dense(smollm2: Path) -> None:
    """Mean KL divergence from the dense float32 model of the same file. 8-bit activations cost about 0.003."""
    kernels = make_kernels("native", torch.device("cpu"), torch.float32, threads=1)
    tokens = encode(
        smollm2, " ".join(PROMPTS) + " return the sum of the two numbers before it, starting from zero and one."
    )
    checkpoint = open_checkpoint(smollm2)
    model = build_model(checkpoint.config, Weights(checkpoint, kernels), 256)
    ours = model.forward(Sequences(make_store(model.config)).step({0: tokens}, "all"))
    want = dense(smollm2).forward(Sequences(make_store(model.config)).step({0: tokens}, "all"))
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(1), want.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert divergence < 0.01
