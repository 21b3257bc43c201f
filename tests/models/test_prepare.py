"""Pictures are prepared as by transformers' image processors on Pillow: the same pixels, as numbers equal to 1e-6 (in
float32 the order of scaling and rounding differs), and the same text in the prompt.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold.engine.text import Text
from tenfold.models import qwen_vl
from tenfold.models.config import ConfigError
from tenfold.models.idefics3 import IdeficsProcessor, buckets
from tenfold.models.internvl import InternProcessor
from tenfold.models.llava_onevision import Anyres, LlavaProcessor
from tenfold.models.picture import Picture
from tenfold.models.prepare import Settings
from tenfold.models.table import make_processor, sees
from tenfold.models.tower import pixels_of
from tenfold.nn.vision import patches, standardised
from tenfold.weights.open import open_checkpoint
from tests import vision

Folder = Callable[[str], Path]


def numbers(name: str, processor: Any, picture: Picture) -> torch.Tensor:
    """What the tower is given: [tiles, 3, H, W]."""
    colours = Settings(vision.TINY[name].settings).colours(
        {"internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}.get(name.split("-")[0])
        or (((0.5,) * 3, (0.5,) * 3) if isinstance(processor, IdeficsProcessor) else qwen_vl.OPENAI)
    )
    return standardised(pixels_of(picture, torch.device("cpu")), colours.scale, colours.mean, colours.std)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("name", vision.TINY)
def test_pixels(name: str, number: int, seeing: Folder) -> None:
    image = vision.pictures()[number]
    processor = make_processor(open_checkpoint(seeing(name)))
    assert processor is not None
    (picture,) = processor.prepare([image], True)
    picture.check()
    theirs = vision.processed(vision.TINY[name], [image])
    want, ours = theirs["pixel_values"], numbers(name, processor, picture)
    if isinstance(processor, qwen_vl.QwenProcessor):
        rows, columns = (n * 2 for n in picture.axes)
        assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
        own = patches(ours, 4).view(rows, columns, 3, 1, 16).expand(-1, -1, -1, 2, -1).reshape(1, rows, columns, -1)
        own = own.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2).reshape(rows * columns, -1)
        assert (own - want).abs().max() <= 1e-6
    else:
        want = want[0] if want.dim() == 5 else want
        assert ours.shape == want.shape
        assert (ours - want).abs().max() <= 1e-6
    if isinstance(processor, IdeficsProcessor):
        assert list(picture.grid) == [theirs["rows"][0][0], theirs["cols"][0][0]]


@pytest.mark.parametrize("strip", [7, 256])
@pytest.mark.parametrize("name", ["llava", "llava-layer"])
def test_several_pictures_are_squares(name: str, strip: int, seeing: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenfold.models.llava_onevision.STRIP", strip)
    images = vision.pictures()[1:4]
    processor = make_processor(open_checkpoint(seeing(name)))
    assert isinstance(processor, LlavaProcessor)
    prepared = processor.prepare(images, False)
    theirs = vision.processed(vision.TINY[name], images)["pixel_values"]
    for picture, want in zip(prepared, theirs):
        assert picture.tiles == 1
        assert picture.tokens == 17
        assert (numbers(name, processor, picture) - want[:1]).abs().max() <= 1e-6


def test_prompts(seeing: Folder) -> None:
    """The tokens of texts with one picture, and with two, are those of transformers' whole processor. Of the other
    families the model itself says in `test_vision` whether it gets as many tokens as it needs.
    """
    import transformers

    tiny, folder, images = vision.TINY["idefics3"], seeing("idefics3"), vision.pictures()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs = transformers.Idefics3Processor(vision.image_processor(tiny), tokenizer, image_seq_len=4)
    text = Text(open_checkpoint(folder))
    for chosen in ([images[1]], [images[4]], [images[2], images[3]]):
        prompt = "Look: " + f"{tiny.mark} and " * len(chosen) + "say."
        ours = text.encode_pictured(prompt, chosen, add_special_tokens=False)
        want = theirs(text=[prompt], images=[chosen], add_special_tokens=False)["input_ids"]
        assert list(ours.tokens) == list(want[0])


def test_what_stands_in_prompts(seeing: Folder) -> None:
    checkpoint = open_checkpoint(seeing("internvl"))
    processor = make_processor(checkpoint)
    assert isinstance(processor, InternProcessor)
    (picture,) = processor.prepare([vision.photograph()], True)
    assert processor.written(picture) == "<img>" + "<IMG_CONTEXT>" * picture.tokens + "</img>"
    assert picture.tokens == 4 * picture.tiles


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_keys(name: str, seeing: Folder) -> None:
    """Equal for the same picture, whatever else; different where one pixel is."""
    processor = make_processor(open_checkpoint(seeing(name)))
    assert processor is not None
    image = vision.pictures()[3]
    other = image.copy()
    other.putpixel((3, 3), (255, 0, 255))
    keys = [p.key for p in processor.prepare([image, other, image.copy()], False)]
    assert keys[0] == keys[2] != keys[1]


def test_models_that_see(seeing: Folder, tiny: Folder) -> None:
    assert make_processor(open_checkpoint(tiny("llama"))) is None
    assert not sees(open_checkpoint(tiny("llama")).config)
    assert sees(open_checkpoint(seeing("qwen2-vl")).config)


def test_long_and_narrow(seeing: Folder) -> None:
    processor = make_processor(open_checkpoint(seeing("qwen2-vl")))
    assert processor is not None
    with pytest.raises(ValueError, match="one side up to 200 times"):
        processor.prepare([Image.new("RGB", (1000, 4))], True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 30, "width": 30}}, "size is .*; allowed: the tower's 28 x 28"),
        ({"size": "large"}, "size is"),
        ({"resample": 9}, "resample is 9"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"image_mean": [1, 2]}, "image_mean is"),
        ({"image_std": [0, 1, 1]}, "image_std is"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_resize": 1}, "do_resize is 1"),
        ({"image_grid_pinpoints": [[28, 28]]}, "image_grid_pinpoints is .*; allowed: those of the model config"),
        ({"image_grid_pinpoints": [[28]]}, "image_grid_pinpoints"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, seeing: Folder) -> None:
    checkpoint = open_checkpoint(seeing("llava"))
    checkpoint.config["processor"] = settings
    with pytest.raises(ConfigError, match=message):
        make_processor(checkpoint)


def test_places_of_patches() -> None:
    """As transformers finds them, rounding included."""
    for side in range(1, 80):
        found = buckets(side).view(side, side)
        assert found.shape == (side, side)
        assert (found.diff(dim=0) >= 0).all()
    assert buckets(4).tolist() == list(range(16))


@pytest.mark.parametrize("size", [(600, 512), (1, 1), (5, 900), (384, 384), (2304, 2304), (333, 1001)])
def test_anyres_counts(size: tuple[int, int]) -> None:
    """Tokens as transformers counts them, for the published model."""
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    whole = {"vision_config": {}}
    anyres = Anyres.read(whole)

    class Counting:
        num_image_tokens = 729
        vision_aspect_ratio = "anyres_max_9"
        _get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features

        class image_processor:
            image_grid_pinpoints = [list(p) for p in anyres.pinpoints]  # noqa: RUF012

    want = LlavaOnevisionProcessor._get_number_of_features(Counting(), *size, 384, 384)  # type: ignore[arg-type]
    assert anyres.tokens(*size) == want


def test_windows_hold_each_token_once() -> None:
    for rows, columns, side in ((5, 7, 2), (4, 4, 4), (1, 9, 3), (3, 3, 8)):
        order, counts = qwen_vl.window_order(rows, columns, side)
        assert sorted(order.tolist()) == list(range(rows * columns))
        assert sum(counts) == rows * columns
        assert np.max(counts) <= side**2
