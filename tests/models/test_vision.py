"""Models that see against transformers in float32, on real pictures, over paged keys and values.

Logits must agree to TOLERANCE of their largest magnitude: a few times more than in `test_parity`, since a tower comes
before, and what rounding does to pixels is multiplied by scores of random weights.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenfold.engine.request import Pictured
from tenfold.engine.sight import Layout
from tenfold.engine.text import Text
from tenfold.models.config import ConfigError
from tenfold.models.table import Model, build_model, make_processor, model_config
from tenfold.nn.step import Seen, Step
from tenfold.ops.kernels import Kernels
from tenfold.ops.oracle import Oracle
from tenfold.ops.table import make_kernels
from tenfold.weights.checkpoint import CheckpointError
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", vision.FAMILIES)
@torch.inference_mode()
def test_cuda_kernels(name: str, seeing: Folder) -> None:
    """The tower on the kernels of a GPU, in bfloat16: off by no more than twice what plain PyTorch is."""
    folder = seeing(name)
    (picture,) = prompt(folder, [vision.pictures()[1]]).pictures
    device, dtype = torch.device("cuda"), torch.bfloat16
    sets = (Oracle(), Oracle(device, dtype), make_kernels("auto", device, dtype, 1))
    found = []
    for kernels in sets:
        checkpoint, exact = open_checkpoint(folder), kernels is sets[0]
        where = ("cpu", torch.float32) if exact else (device, dtype)
        tower = build_model(checkpoint.config, Weights(checkpoint, kernels, *where), 64).tower
        assert tower is not None
        found.append(tower.encode(picture).float().cpu())
    plain, ours = ((other - found[0]).square().mean().sqrt() for other in found[1:])
    assert ours <= 2 * plain


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
    with pytest.raises(ValueError, match="other tokens between those of a picture"):
        Layout((*[9] * 5, 1, *[9] * 3), pictures, 9, True)


HOSTILE = (None, [], {}, "x", -1, 0, 1e300, float("nan"), [[]], {"a": 1}, True, 1 << 40)


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_hostile_configs(name: str, seeing: Folder) -> None:
    """Whatever stands in a config or a processor's settings: a ValueError with a sentence, or a model."""
    checkpoint = open_checkpoint(seeing(name))
    config, whole = dict(checkpoint.config), dict(checkpoint.config["whole"])
    for part in ("", "vision_config", "processor"):
        keys = whole if part == "" else config["processor"] if part == "processor" else whole["vision_config"]
        for key in [*keys, "min_pixels", "size", "image_mean", "max_dynamic_patch", "vision_feature_layer"]:
            for value in HOSTILE:
                changed = {**keys, key: value}
                checkpoint.config = {
                    **config,
                    "whole": changed if part == "" else {**whole, part: changed} if part != "processor" else whole,
                    "processor": changed if part == "processor" else config["processor"],
                }
                with suppress(ValueError):
                    model_config(checkpoint.config)
                    make_processor(checkpoint)


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


def rewritten(folder: Path, to: Path, config: dict[str, object], names: list[tuple[str, str]]) -> Path:
    """The checkpoint with another config.json and other names of tensors; "" leaves a tensor out."""
    to.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.startswith("model"):
            (to / file.name).write_bytes(file.read_bytes())
    (to / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        new = name
        for pattern, instead in names:
            new = re.sub(pattern, instead, new)
        tensors[new] = tensor
    save_file(tensors, to / "model.safetensors")
    return to


def agrees(folder: Path, with_folder: Path) -> None:
    """Both give the same logits for a prompt with a picture."""
    asked = prompt(folder, [vision.pictures()[1]])
    assert asked == prompt(with_folder, [vision.pictures()[1]])
    found = []
    for each in (folder, with_folder):
        model = load(each, Oracle())
        sequences = Sequences(make_store(model.config, page_size=4, pages=128))
        step = with_seen(sequences.step({0: list(asked.tokens)}, "all"), model, asked, 0, len(asked))
        with torch.inference_mode():
            found.append(model.forward(step))
    assert (found[0] == found[1]).all()


def test_the_original_files_of_internvl(seeing: Folder, tmp_path: Path) -> None:
    """`internvl_chat`, with the names and config that came before transformers knew the model."""
    folder = seeing("internvl")
    config = json.loads((folder / "config.json").read_text())
    vision_config = {
        **{key: config["vision_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6, "hidden_act": "gelu"},
        **{"qkv_bias": False, "qk_normalization": False, "norm_type": "layer_norm", "model_type": "intern_vit_6b"},
    }
    original = {
        **{"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5},
        **{
            "llm_config": config["text_config"],
            "vision_config": vision_config,
            "max_dynamic_patch": 6,
            "select_layer": -1,
        },
    }
    names = [
        (r"^vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
        (r"^vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
        (r"^vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
        (r"^vision_tower\.encoder\.layer\.(\d+)\.", r"vision_model.encoder.layers.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.lambda_(\d)$", r".ls\1"),
        (r"\.attention\.projection_layer\.", ".attn.proj."),
        (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
        (r"^multi_modal_projector\.linear_1", "mlp1.1"),
        (r"^multi_modal_projector\.linear_2", "mlp1.3"),
    ]
    to = rewritten(folder, tmp_path / "chat", original, names)
    tensors = load_file(to / "model.safetensors")
    for layer in range(2):
        own = f"vision_model.encoder.layers.{layer}.att"
        parts = [tensors.pop(f"{own}ention.{name}_proj.weight") for name in ("q", "k", "v")]
        tensors[f"{own}n.qkv.weight"] = torch.cat(parts)
    save_file(tensors, to / "model.safetensors")
    settings = {"size": 28, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    (to / "preprocessor_config.json").write_text(json.dumps(settings))
    agrees(folder, to)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_flat_configs_of_qwen(name: str, seeing: Folder, tmp_path: Path) -> None:
    """As they are on the hub: the text part lies open, and rope_scaling names its sections."""
    folder = seeing(name)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {
        **{key: value for key, value in text.items() if key not in ("model_type", "layer_types")},
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    agrees(folder, rewritten(folder, tmp_path / "flat", flat, []))


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2-vl"])
def test_names_of_newer_files(name: str, seeing: Folder, tmp_path: Path) -> None:
    """Everything under "model.", as in memory."""
    folder = seeing(name)
    config = json.loads((folder / "config.json").read_text())
    names = [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector|image_newline|visual)", r"model.\1"),
        (r"^model\.(layers|embed_tokens|norm)", r"model.language_model.\1"),
    ]
    agrees(folder, rewritten(folder, tmp_path / "newer", config, names))


def test_a_text_part_that_is_not_known(seeing: Folder, tmp_path: Path) -> None:
    folder = seeing("internvl")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "internlm2"
    with pytest.raises(CheckpointError, match="whose text part is 'internlm2'; supported: gemma3_text, llama"):
        open_checkpoint(rewritten(folder, tmp_path / "other", config, []))


def test_modes_that_quantise_leave_the_tower_alone(seeing: Folder) -> None:
    checkpoint = open_checkpoint(seeing("llava"))
    kernels = Oracle()
    (picture,) = prompt(seeing("llava"), [vision.pictures()[1]]).pictures
    towers = [build_model(checkpoint.config, Weights(checkpoint, kernels, mode=m), 64).tower for m in ("auto", "q8_0")]
    want, found = (tower.encode(picture) for tower in towers if tower is not None)
    assert (want == found).all()


# Tiles and patches of the published models, on towers that are small otherwise. 384 is no multiple of 14.
PUBLISHED = {
    "llava": vision.varied(
        vision.LLAVA,
        vision={**vision.LLAVA.vision, "image_size": 384, "patch_size": 14},
        settings={"size": {"height": 384, "width": 384}},
        whole={},
    ),
    "smolvlm": vision.varied(
        vision.TINY["smolvlm"],
        vision={**vision.SIGLIP, "image_size": 384, "patch_size": 14},
        settings={"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
        whole={"scale_factor": 3},
    ),
    "idefics3": vision.varied(
        vision.IDEFICS,
        vision={**vision.SIGLIP, "image_size": 364, "patch_size": 14},
        settings={"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    ),
    "internvl": vision.varied(
        vision.INTERN,
        vision={**vision.SIGLIP, "image_size": [448, 448], "patch_size": [14, 14]},
        settings={**vision.INTERN.settings, "size": {"height": 448, "width": 448}},
    ),
    "qwen2.5-vl": vision.varied(
        vision.TINY["qwen2.5-vl"],
        vision={**vision.TINY["qwen2.5-vl"].vision, "patch_size": 14, "window_size": 112},
        settings={"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 602112},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.inference_mode()
def test_published_sizes(name: str, tmp_path: Path) -> None:
    tiny, image = PUBLISHED[name], vision.photograph()
    folder = vision.make_checkpoint(tiny, tmp_path / name)
    (picture,) = prompt(folder, [image]).pictures
    reference = vision.reference(folder, tiny.family)
    found = reference.model.get_image_features(**vision.inputs(tiny, [image]), return_dict=True).pooler_output
    theirs = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    model = load(folder, Oracle())
    assert model.tower is not None
    assert_agree(model.tower.encode(picture), theirs)
