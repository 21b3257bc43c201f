"""Models that see against transformers in float32, on real pictures, over paged keys and values.

Logits must agree to TOLERANCE of their largest magnitude: a few times more than in `test_parity`, since a tower comes
before, and what rounding does to pixels is multiplied by scores of random weights.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tenfold.engine.request import Pictured
from tenfold.engine.sight import Layout
from tenfold.engine.text import Text
from tenfold.models.config import ConfigError
from tenfold.models.table import Model, build_model, model_config
from tenfold.nn.step import Seen, Step
from tenfold.ops.kernels import Kernels
from tenfold.ops.oracle import Oracle
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests import vision
from tests.steps import Sequences, make_store

TOLERANCE = 5e-5
DECODES = 3
Folder = Callable[[str], Path]


def load(folder: Path, kernels: Kernels) -> Model:
    checkpoint = open_checkpoint(folder)
    return build_model(checkpoint.config, Weights(checkpoint, kernels), 1024)


def prompt(folder: Path, images: list[Image.Image]) -> Pictured:
    """A text with pictures at its beginning and in the middle."""
    text = Text(open_checkpoint(folder))
    assert text.processor is not None
    mark = text.processor.placeholder
    words = [f"{mark}What", f" is the{mark}", f",{mark}"][: len(images)]
    return text.encode_pictured("".join(words) + " this?", images, add_special_tokens=False)


def with_seen(step: Step, model: Model, asked: Pictured, start: int, end: int) -> Step:
    """The step of tokens start..end-1 of a prompt, with what they show."""
    assert model.tower is not None
    turned = bool(model.config.rope_sections)
    layout = Layout(asked.tokens, asked.pictures, model.tower.token_id, turned)
    if turned:
        step = replace(step, positions=torch.from_numpy(layout.positions(start, end)).int())
    rows, parts = layout.parts(start, end)
    if not parts:
        return step
    features = torch.cat([model.tower.encode(part.picture)[part.start : part.end] for part in parts])
    places = torch.from_numpy(layout.turns[:, rows + start].T.astype(np.int64)) if layout.turns is not None else None
    return replace(step, seen=Seen(torch.from_numpy(rows), features, places))


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("chosen", [[0], [1], [4], [7], [2, 3], [6, 5, 1]], ids=str)
@pytest.mark.parametrize("name", vision.TINY)
@torch.inference_mode()
def test_logits(name: str, chosen: list[int], seeing: Folder, kernels: Kernels) -> None:
    """All positions of a prompt in two chunks, the border inside a picture, and a few tokens after it."""
    images = [vision.pictures()[i] for i in chosen]
    folder, tiny = seeing(name), vision.TINY[name]
    asked = prompt(folder, images)
    tokens = [*asked.tokens, 11, 12, 13]
    want = vision.logits(tiny, folder, tokens, images)

    model = load(folder, kernels)
    sequences = Sequences(make_store(model.config, page_size=4, pages=256))
    border = tokens.index(vision.SPECIAL[tiny.mark]) + 3
    for start, end in ((0, border), (border, len(asked))):
        step = with_seen(sequences.step({0: tokens[start:end]}, "all"), model, asked, start, end)
        assert_agree(model.forward(step), want[start:end])
    for at in range(len(asked), len(tokens)):
        step = with_seen(sequences.step({0: [tokens[at]]}), model, asked, at, at + 1)
        assert_agree(model.forward(step), want[at : at + 1])


@pytest.mark.parametrize("name", vision.TINY)
@torch.inference_mode()
def test_text_alone(name: str, seeing: Folder, kernels: Kernels) -> None:
    folder = seeing(name)
    tokens = list(range(5, 35))
    model = load(folder, kernels)
    step = Sequences(make_store(model.config, page_size=4)).step({0: tokens}, "all")
    assert_agree(model.forward(step), vision.logits(vision.TINY[name], folder, tokens, []))


@pytest.mark.parametrize("name", vision.TINY)
@torch.inference_mode()
def test_features(name: str, seeing: Folder, kernels: Kernels) -> None:
    """What the tower makes of each picture, one by one, where transformers looks at them together."""
    folder, tiny = seeing(name), vision.TINY[name]
    images = vision.pictures()
    model = load(folder, kernels)
    assert model.tower is not None
    reference = vision.reference(folder, tiny.family)
    for image in images:
        (picture,) = prompt(folder, [image]).pictures
        found = reference.model.get_image_features(**vision.inputs(tiny, [image]), return_dict=True).pooler_output
        theirs = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
        assert_agree(model.tower.encode(picture), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", vision.FAMILIES)
@torch.inference_mode()
def test_half_precision(name: str, dtype: torch.dtype, seeing: Folder) -> None:
    """Off by no more than twice what transformers' own tower is in half precision."""
    import transformers

    folder, tiny = seeing(name), vision.TINY[name]
    image = vision.pictures()[1]
    (picture,) = prompt(folder, [image]).pictures
    own = vision.inputs(tiny, [image])

    def features(model: object, inputs: dict[str, Tensor]) -> Tensor:
        found = model.model.get_image_features(**inputs, return_dict=True).pooler_output  # type: ignore[attr-defined]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in found]).float()

    want = features(vision.reference(folder, tiny.family), own)
    kind = getattr(transformers, f"{tiny.family}ForConditionalGeneration")
    half = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    theirs = features(half, {k: v.to(dtype) if v.is_floating_point() else v for k, v in own.items()})
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint.config, Weights(checkpoint, Oracle(dtype=dtype), dtype=dtype), 64)
    assert model.tower is not None
    ours = model.tower.encode(picture).float()
    assert (ours - want).square().mean().sqrt() <= 2 * (theirs - want).square().mean().sqrt()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", vision.FAMILIES)
@torch.inference_mode()
def test_cuda(name: str, seeing: Folder) -> None:
    """The tower on a GPU, with the torch kernels."""
    folder = seeing(name)
    (picture,) = prompt(folder, [vision.pictures()[1]]).pictures
    towers = []
    for device in ("cpu", "cuda"):
        checkpoint = open_checkpoint(folder)
        towers.append(build_model(checkpoint.config, Weights(checkpoint, Oracle(device), device=device), 64).tower)
    want, ours = (tower.encode(picture).cpu() for tower in towers if tower is not None)
    assert_agree(ours, want)


def test_positions_of_rows_and_columns() -> None:
    """Two words, a picture of 2 x 3 tokens, a word, a picture of 2 x 1, a word."""
    from tenfold.models.picture import Picture

    pictures = tuple(
        Picture(rows * columns, 1, 1, 1, b"", axes=(rows, columns), key=bytes(32)) for rows, columns in ((2, 3), (2, 1))
    )
    layout = Layout((1, 1, *[9] * 6, 1, 9, 9, 1), pictures, 9, True)
    assert layout.turns is not None
    assert layout.turns.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 8],
    ]
    assert layout.shift == 9 - 12
    assert layout.positions(11, 14).tolist() == [8, 9, 10]
    with pytest.raises(ValueError, match="has 5 tokens for parts of pictures, and its 2 pictures need 8"):
        Layout((9,) * 5, pictures, 9, True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", {"vision_feature_layer": 0}, "vision_feature_layer"),
        ("llava", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ("llava", {"projector_hidden_act": "swoosh"}, "activation 'swoosh'"),
        ("llava", {"image_token_index": 4000}, "image_token_index is 4000"),
        ("llava", {"vision_config": 3}, "vision_config is '3'"),
        ("internvl", {"downsample_ratio": 0.3}, "downsample_ratio"),
        ("idefics3", {"scale_factor": 3}, "scale_factor is 3"),
        ("idefics3", {"image_token_id": None}, "image_token_id is None"),
    ],
)
def test_configs_that_cannot_be(name: str, change: dict[str, object], message: str, seeing: Folder) -> None:
    checkpoint = open_checkpoint(seeing(name))
    checkpoint.config["whole"] = {**checkpoint.config["whole"], **change}
    with pytest.raises(ConfigError, match=message):
        build_model(checkpoint.config, Weights(checkpoint, Oracle()), 64)


def test_sizes_are_known_before_loading(seeing: Folder) -> None:
    for name in vision.TINY:
        size = model_config(open_checkpoint(seeing(name)).config).tower
        assert size is not None
        assert size.hidden == 32
    config = open_checkpoint(seeing("qwen2-vl")).config
    assert model_config(config).tower.patches == 2400 // 16  # type: ignore[union-attr]
