"""Models that see, small enough to make in a test; real pictures; and what transformers makes of both."""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import SIZES, fill, write_tokenizer

SPECIALS = (
    *("<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<IMG_CONTEXT>", "<img>", "</img>"),
    *("<fake_token_around_image>", "<global-img>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
SPECIAL = {name: 268 + i for i, name in enumerate(SPECIALS)}  # ids, after the bytes and merges of the tokenizer
TEXT = {**SIZES, "max_position_embeddings": 1024}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 2400}
GRID = [[28 * rows, 28 * columns] for rows in range(1, 4) for columns in range(1, 4)]

# Templates in the manner of each family, written for these tests.
PARTS = (  # lists only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "MARK\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EITHER = (  # texts and lists
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' or 'image' in part %}<|vision_start|>MARK<|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRINGS = (  # texts only
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """family: prefix of its transformers classes. mark: the token for a picture; key: where the config names it;
    processor: module and class of its image processor on Pillow, with the settings it is tested with.
    """

    family: str
    mark: str
    text: dict[str, Any]
    vision: dict[str, Any]
    processor: tuple[str, str]
    settings: dict[str, Any]
    template: str
    whole: dict[str, Any] = field(default_factory=dict)


LLAVA = Tiny(
    "LlavaOnevision",
    "<image>",
    {**TEXT, "model_type": "qwen2"},
    {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
    ("llava_onevision.image_processing_pil_llava_onevision", "LlavaOnevisionImageProcessorPil"),
    {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": GRID},
    PARTS,
    {"image_grid_pinpoints": GRID},
)
QWEN2 = Tiny(
    "Qwen2VL",
    "<|image_pad|>",
    {**TEXT, **MROPE},
    {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
    ("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    QWEN,
    EITHER,
)
INTERN = Tiny(
    "InternVL",
    "<IMG_CONTEXT>",
    {**TEXT, "model_type": "qwen2"},
    {**SIGLIP, "image_size": [28, 28], "patch_size": [7, 7]},
    ("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil"),
    {
        "size": {"height": 28, "width": 28},
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    STRINGS,
)
IDEFICS = Tiny(
    "Idefics3",
    "<image>",
    {**TEXT, "model_type": "llama"},
    SIGLIP,
    ("idefics3.image_processing_pil_idefics3", "Idefics3ImageProcessorPil"),
    {"size": {"longest_edge": 80}, "max_image_size": {"longest_edge": 28}},
    PARTS,
    {"scale_factor": 2},
)


def varied(base: Tiny, **values: Any) -> Tiny:
    return Tiny(**{**{name: getattr(base, name) for name in base.__dataclass_fields__}, **values})


TINY: dict[str, Tiny] = {
    "llava": LLAVA,
    "llava-layer": varied(
        LLAVA, whole={**LLAVA.whole, "vision_feature_layer": -2, "vision_aspect_ratio": "anyres_max_2"}
    ),
    "qwen2-vl": QWEN2,
    "qwen2.5-vl": varied(
        QWEN2,
        family="Qwen2_5_VL",
        vision={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 44,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "internvl": INTERN,
    "internvl-norms": varied(
        INTERN,
        text={**TEXT, "model_type": "llama"},
        vision={**INTERN.vision, "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True},
        whole={"tie_word_embeddings": False},
    ),
    "idefics3": IDEFICS,
    "smolvlm": varied(
        IDEFICS,
        family="SmolVLM",
        processor=("smolvlm.image_processing_pil_smolvlm", "SmolVLMImageProcessorPil"),
        vision={**SIGLIP, "image_size": 42},
        settings={"size": {"longest_edge": 100}, "max_image_size": {"longest_edge": 42}},
    ),
}
FAMILIES = ("llava", "qwen2-vl", "qwen2.5-vl", "internvl", "idefics3")


def make_checkpoint(tiny: Tiny, folder: Path) -> Path:
    import transformers

    token = "image_token_index" if tiny.family == "LlavaOnevision" else "image_token_id"
    values = json.loads(json.dumps({"text_config": tiny.text, "vision_config": tiny.vision, **tiny.whole}))
    config = getattr(transformers, f"{tiny.family}Config")(**values, image_token_id=SPECIAL[tiny.mark])
    assert getattr(config, token if hasattr(config, token) else "image_token_id") == SPECIAL[tiny.mark]
    torch.manual_seed(0)  # of what `fill` only adds to
    model = getattr(transformers, f"{tiny.family}ForConditionalGeneration")(config)
    fill(model, seed=sum(map(ord, folder.name)))
    model.save_pretrained(folder)
    write_tokenizer(folder, SPECIALS)
    (folder / "chat_template.jinja").write_text(tiny.template.replace("MARK", tiny.mark))
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny.settings))
    return folder


@cache
def reference(folder: Path, family: str) -> Any:
    import transformers

    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def image_processor(tiny: Tiny) -> Any:
    module, name = tiny.processor
    return getattr(import_module(f"transformers.models.{module}"), name)(**tiny.settings)


def processed(tiny: Tiny, images: list[Image.Image]) -> dict[str, Any]:
    """What transformers' own image processor makes of the pictures of one prompt."""
    processor = image_processor(tiny)
    more: dict[str, Any] = {}
    given: Any = images
    if tiny.family in ("Idefics3", "SmolVLM"):
        given, more = [images], {"return_row_col_info": True}
    elif tiny.family == "LlavaOnevision":
        given = [images]
    elif tiny.family == "InternVL":
        more = {"crop_to_patches": True}
    return dict(processor(images=given, return_tensors="pt", **more))


def inputs(tiny: Tiny, images: list[Image.Image]) -> dict[str, Any]:
    """The same as arguments of the model."""
    made = processed(tiny, images)
    return {name: value for name, value in made.items() if name not in ("rows", "cols", "num_patches")}


@torch.inference_mode()
def logits(tiny: Tiny, folder: Path, tokens: list[int], images: list[Image.Image]) -> Tensor:
    """transformers' logits of a whole text with pictures [len(tokens), vocab]."""
    ids = torch.tensor([tokens])
    more: dict[str, Any] = inputs(tiny, images) if images else {}
    if tiny.family.startswith("Qwen"):
        more["mm_token_type_ids"] = (ids == SPECIAL[tiny.mark]).int()
    found: Tensor = reference(folder, tiny.family)(input_ids=ids, **more).logits[0]
    return found


@cache
def photograph() -> Image.Image:
    """A portrait of 512 x 600 pixels that comes with matplotlib."""
    return Image.open(_sample("grace_hopper.jpg")).convert("RGB")


@cache
def flower() -> Image.Image:
    """A picture of 525 x 350 pixels, of which parts are transparent."""
    return Image.open(_sample("Minduka_Present_Blue_Pack.png"))


def _sample(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / name


def pictures() -> list[Image.Image]:
    """Of every shape: large, upright, wide, tall, tiny."""
    whole = photograph()
    sizes = [(512, 600), (300, 100), (64, 233), (28, 28), (9, 13), (131, 130), (57, 400)]
    parts = [whole.crop((40 + i, 60, 40 + i + min(w, 470), 60 + min(h, 530))) for i, (w, h) in enumerate(sizes)]
    noise = np.random.default_rng(5).integers(0, 256, (41, 77, 3), dtype=np.uint8)
    return [whole, *parts[1:], Image.fromarray(noise)]
