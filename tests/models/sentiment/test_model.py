"""The sentiment classifier as a whole: every switch, batches and padding, and its files."""

import json

import pytest
import torch

from tenfold.models.sentiment.config import ImageShape, Parts, SentimentConfig
from tenfold.models.sentiment.folder import open_folder, place, save
from tenfold.models.sentiment.model import SentimentModel
from tenfold.models.sentiment.prepare import fit
from tests.models.sentiment import small

VARIANTS = (
    *({"bilstm": layers} for layers in (0, 1, 2)),
    *({"cbam": which} for which in ("none", "channel", "spatial")),
    *({"layout": "picture", "cnn": cnn} for cnn in (True, False)),
    {"bilstm": 0, "cnn": False, "cbam": "none"},
    {"cross": 2, "contrastive": True},
    {"modalities": "text"},
    {"modalities": "image"},
)
TEXTS = ("A good day!", "bad", "the rain is not very good .")


def pictures():
    torch.manual_seed(1)
    return torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)


@pytest.mark.parametrize("parts", VARIANTS, ids=str)
def test_a_batch_tells_what_each_post_alone_is_told(parts):
    made = small.classifier(**parts)
    first, second = pictures()
    given = (first, second, first) if parts.get("modalities") == "image" else (first, None, second)
    items = [made.reader.read(text, picture) for text, picture in zip(TEXTS, given)]
    told = made.model(made.reader.batch(items, length=30)).logits
    for item, own in zip(items, told):
        alone = made.model(made.reader.batch([item])).logits[0]
        torch.testing.assert_close(own, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("parts", VARIANTS, ids=str)
def test_every_part_that_is_there_learns(parts):
    shape = small.config(**parts)
    model = SentimentModel(shape)
    made = small.classifier(**parts)
    items = [made.reader.read(text, picture) for text, picture in zip(TEXTS, (*pictures(), pictures()[0]))]
    told = model(made.reader.batch(items))
    loss = told.logits.logsumexp(-1).sum() + (0 if told.contrast is None else told.contrast[:, 0].sum())
    loss.backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    unused = {"text": "image.", "image": "text."}.get(parts.get("modalities", ""), "nothing")
    assert not [name for name in still if not name.startswith((unused, "bilstm" if unused == "text." else unused))]


def test_both_modalities_matter():
    made = small.classifier()
    one, other = pictures()
    read = made.reader.read

    def logits(*items):
        return made.model(made.reader.batch(items)).logits

    told = logits(read(TEXTS[0], one), read(TEXTS[0], other), read(TEXTS[1], one), read(TEXTS[0]))
    assert len({tuple(row) for row in told.tolist()}) == 4


def test_what_a_model_cannot_read_is_told():
    both, text, image = (small.classifier(modalities=m).reader for m in ("both", "text", "image"))
    with pytest.raises(ValueError, match="text is empty; give a text or a picture"):
        both.read("  ")
    assert both.read("", pictures()[0]).picture is not None
    with pytest.raises(ValueError, match=r"text is empty; give a text\."):
        text.read("", pictures()[0])
    assert text.read("a", pictures()[0]).picture is None
    with pytest.raises(ValueError, match="no picture"):
        image.read("a day")
    with pytest.raises(ValueError, match="1048577 characters"):
        both.read("a" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="1 x 65"):
        both.read("a", torch.zeros(3, 65, 1, dtype=torch.uint8))


@pytest.mark.parametrize(("text", "place"), [("\ud800", 0), ("a good \udcff day", 7)])
def test_half_of_a_surrogate_pair_is_told(text, place):
    with pytest.raises(ValueError, match=rf"half of a surrogate pair .* at character {place}"):
        small.classifier().reader.read(text)


@pytest.mark.parametrize("text", [5, None, b"a day"])
def test_what_is_no_text_is_told(text):
    with pytest.raises(ValueError, match=f"text is a {type(text).__name__}; allowed: str"):
        small.classifier().reader.read(text)


def test_long_texts_keep_both_ends():
    ids = small.classifier().reader.read("good " * 500).ids
    assert len(ids) == 64
    assert (ids[0], ids[-1]) == (2, 3)


def test_the_middle_of_a_picture_is_seen():
    picture = torch.zeros(3, 10, 30, dtype=torch.uint8)
    picture[:, :, 10:20] = 200
    assert fit(picture, 10).eq(200).all()
    assert fit(picture, 5).eq(200).all()
    assert fit(picture, 20).float().sub(200).abs().max() <= 1
    assert fit(picture.transpose(1, 2), 10).eq(200).all()


def test_a_folder_is_the_model_that_was_saved(tmp_path):
    made = small.classifier()
    save(tmp_path, made)
    again = open_folder(tmp_path)
    assert (again.config, again.temperature, again.card) == (made.config, 1.5, {"data": "none"})
    posts = made.reader.batch([made.reader.read("a good day", pictures()[0])])
    assert torch.equal(again.model(posts).logits, made.model(posts).logits)
    probabilities = again.probabilities(made.model(posts).logits)
    torch.testing.assert_close(probabilities, (made.model(posts).logits / 1.5).softmax(-1))
    save(tmp_path, made, torch.float16)
    torch.testing.assert_close(
        open_folder(tmp_path).model(posts).logits, made.model(posts).logits, atol=0.01, rtol=0.01
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda told: told.update(model_type="llama"), "model_type is 'llama'"),
        (lambda told: told.update(labels=["a"]), "labels are"),
        (lambda told: told.update(temperature=0), "temperature 0; allowed"),
        (lambda told: told["parts"].update(cbam="some"), "cbam is 'some'; allowed: none"),
        (lambda told: told["parts"].update(other=1), "not complete"),
        (lambda told: told.pop("image"), "not complete"),
        (lambda told: told["image"].update(size=30), "a multiple of 8"),
        (lambda told: told["parts"].update(bilstm=0), "of another shape"),
        (lambda told: told["text"].update(vocab=15), "has 16 tokens, the text encoder 15|words.weight"),
        (lambda told: told["text"].update(width=30), "multiple of twice"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, match):
    small.folder(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    change(told)
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=match):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff{]", b"[1]"])
def test_damaged_files_are_refused(tmp_path, name, content):
    small.folder(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        open_folder(tmp_path)


def test_a_name_that_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="no classifier"):
        place(str(tmp_path))
    assert place(str(small.folder(tmp_path / "one"))) == tmp_path / "one"


@pytest.mark.parametrize(
    ("field", "value"), [("bilstm", 3), ("cbam", ""), ("layout", "x"), ("cross", 4), ("modalities", "audio")]
)
def test_switches_that_do_not_exist(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; allowed"):
        small.config(**{field: value}).check()


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"dropout": "much"}, {"max_tokens": 1}, {"text": {"vocab": "a"}}])
def test_settings_that_are_damaged(change):
    with pytest.raises(ValueError, match=r"dropout is 1|max_tokens is 1|not complete"):
        SentimentConfig.from_json(small.config().as_json() | change)


def test_settings_survive_json():
    shape = SentimentConfig(("x", "y"), small.config().text, ImageShape("vit", 32), Parts(cross=3), 0.2, 10)
    assert SentimentConfig.from_json(json.loads(json.dumps(shape.as_json()))) == shape
