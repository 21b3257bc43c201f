"""Every family and variant against transformers in float32, over paged keys and values.

Logits must agree to TOLERANCE of their largest magnitude. float32 rounds to 6e-8; a dozen dependent sums of a hundred
terms, taken in another order, leave about 1e-6 of that. A wrong mask, angle or norm is off by 1e-2 and more.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.models.table import Model, build_model
from tenfold.ops.kernels import Kernels
from tenfold.ops.oracle import Oracle
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.steps import Sequences, make_store
from tests.tiny import FAMILIES, SIZES, TINY, VOCAB, fill, write_tokenizer

TOLERANCE = 1e-5
DECODES = 5

Folder = Callable[[str], Path]


@cache
def reference(folder: Path) -> Any:
    """The transformers model, with scores computed as matrices rather than by a fused kernel."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def load(folder: Path, name: str, kernels: Kernels) -> Model:
    checkpoint = open_checkpoint(folder)
    return build_model(checkpoint.config, Weights(checkpoint, kernels), TINY[name].positions)


def random_tokens(lengths: list[int], seed: int = 0) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randint(3, VOCAB, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_logits(name: str, tiny: Folder, kernels: Kernels) -> None:
    """All positions of prompts of different lengths in one step, then decodes, then a chunk between decodes."""
    shortest = TINY[name].shortest
    texts = random_tokens([n + shortest + DECODES + 3 for n in (0, 6, 25, 40)])
    hf = reference(tiny(name))
    want = {i: hf(torch.tensor([tokens])).logits[0] for i, tokens in texts.items()}

    model = load(tiny(name), name, kernels)
    sequences = Sequences(make_store(model.config, page_size=4, pages=64))
    prompts = {i: tokens[: -DECODES - 3] for i, tokens in texts.items()}
    assert_agree(
        model.forward(sequences.step(prompts, "all")),
        torch.cat([want[i][: len(tokens)] for i, tokens in prompts.items()]),
    )
    for _ in range(DECODES):
        at = dict(sequences.lengths)
        ours = model.forward(sequences.step({i: [texts[i][at[i]]] for i in texts}))
        assert_agree(ours, torch.stack([want[i][at[i]] for i in texts]))
    at = dict(sequences.lengths)
    sizes = {0: 1, 2: 3, 1: 2, 3: 1}
    step = sequences.step({i: texts[i][at[i] : at[i] + n] for i, n in sizes.items()}, "all")
    assert_agree(model.forward(step), torch.cat([want[i][at[i] : at[i] + n] for i, n in sizes.items()]))


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_greedy_tokens(name: str, tiny: Folder, kernels: Kernels) -> None:
    """64 tokens after each of 20 prompts, all in one batch."""
    lengths = [1 + (7 * i) % 31 for i in range(20)]
    prompts = random_tokens(lengths, seed=1)
    model = load(tiny(name), name, kernels)
    sequences = Sequences(make_store(model.config, page_size=16, pages=20 * 7))
    ours: dict[int, list[int]] = {i: [] for i in prompts}
    step = sequences.step(prompts)
    for _ in range(64):
        for i, token in enumerate(model.forward(step).argmax(dim=1).tolist()):
            ours[i].append(token)
        step = sequences.step({i: [tokens[-1]] for i, tokens in ours.items()})
    assert list(ours.values()) == greedy(tiny(name), tuple(map(tuple, prompts.values())))


@cache
def greedy(folder: Path, prompts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """transformers' own generation, prompts padded on the left; the mask must be given, inferred it goes wrong."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    hf = reference(folder)
    hf.generation_config.eos_token_id = None
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_hidden_states(name: str, tiny: Folder, kernels: Kernels) -> None:
    """The final normed states, which embeddings are pooled from."""
    prompts = random_tokens([3, 11], seed=2)
    model = load(tiny(name), name, kernels)
    ours = model.hidden(Sequences(make_store(model.config, page_size=4)).step(prompts))
    hf = reference(tiny(name))
    theirs = [hf.model(torch.tensor([tokens])).last_hidden_state[0] for tokens in prompts.values()]
    assert_agree(ours, torch.cat(theirs))


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_only_wanted_rows_reach_the_head(name: str, tiny: Folder, kernels: Kernels) -> None:
    prompts = random_tokens([4, 1, 9], seed=3)
    model = load(tiny(name), name, kernels)
    every = model.forward(Sequences(make_store(model.config)).step(prompts, "all"))
    last = model.forward(Sequences(make_store(model.config)).step(prompts))
    assert last.dtype == torch.float32
    assert_agree(last, every[[3, 4, 13]])
    nobody = replace(Sequences(make_store(model.config)).step(prompts), logits_rows=torch.empty(0, dtype=torch.int64))
    assert model.forward(nobody).shape == (0, VOCAB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_half_precision(name: str, dtype: torch.dtype, tiny: Folder) -> None:
    """In half precision the torch kernels are off by no more than twice what transformers' own half precision is."""
    import transformers

    prompts = random_tokens([5, 24], seed=4)
    want = torch.cat([reference(tiny(name))(torch.tensor([tokens])).logits[0] for tokens in prompts.values()])
    half = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=dtype, attn_implementation="eager")
    theirs = torch.cat([half(torch.tensor([tokens])).logits[0] for tokens in prompts.values()]).float()

    checkpoint = open_checkpoint(tiny(name))
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle(dtype=dtype), dtype=dtype), 64)
    ours = model.forward(Sequences(make_store(model.config, page_size=4, dtype=dtype)).step(prompts, "all"))
    assert (ours - want).square().mean().sqrt() <= 2 * (theirs - want).square().mean().sqrt()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_cuda(name: str, tiny: Folder) -> None:
    """The torch kernels on a GPU."""
    prompts = random_tokens([5, 24], seed=4)
    want = torch.cat([reference(tiny(name))(torch.tensor([tokens])).logits[0] for tokens in prompts.values()])
    checkpoint = open_checkpoint(tiny(name))
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle("cuda"), device="cuda"), 64)
    store = make_store(model.config, page_size=4, device="cuda")
    assert_agree(model.forward(Sequences(store).step(prompts, "all")).cpu(), want)


@torch.inference_mode()
def test_text_part_of_a_vision_language_model(tmp_path: Path) -> None:
    """Gemma 3 from 4b up is published with a vision tower; its text part runs by itself."""
    import transformers

    text = {**SIZES, **TINY["gemma3"].values}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    hf = transformers.Gemma3ForConditionalGeneration(config)
    fill(hf, seed=5)
    hf.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)

    prompts = random_tokens([24], seed=6)
    checkpoint = open_checkpoint(tmp_path)
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle()), 64)
    ours = model.forward(Sequences(make_store(model.config, page_size=4)).step(prompts, "all"))
    assert_agree(ours, hf(input_ids=torch.tensor([prompts[0]])).logits[0])
