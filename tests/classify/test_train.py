"""Training: it learns, goes on after an interruption as if there had been none, and keeps what encoders know."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tenfold.classify.batches import Shelf, varied
from tenfold.classify.checkpoint import Checkpoint
from tenfold.classify.data import table
from tenfold.classify.data.posts import DataSet, Post
from tenfold.classify.encoder import SPECIAL, Size, begin, fewer, words_of
from tenfold.classify.pickled import CONVERT
from tenfold.classify.recipe import Recipe
from tenfold.classify.train import Run, Trainer, initial, train
from tenfold.models.sentiment.config import ImageShape, Parts
from tenfold.models.sentiment.folder import open_folder, save
from tenfold.models.sentiment.text import Bert
from tenfold.serve.cli.commands import app
from tenfold.weights.safetensors import serialize
from tests.models.sentiment import small

SMALL = Recipe(size=Size(200, 32, 1), image=ImageShape("small", 24), epochs=3, batch=16, max_tokens=16, seed=3)


@pytest.fixture(scope="module")
def tiny_set():
    return table.read("incongruity-tiny")


def plain_set(count=64):
    """Of which the text alone tells the label, so that little has to be learnt."""
    posts = [Post(("good sun", "bad rain")[i % 2], None, i % 2) for i in range(count)]
    return DataSet("plain", ("glad", "sad"), tuple(posts), tuple(posts[:16]), tuple(posts[:16]))


def weights(classifier):
    return {name: t for name, t in classifier.model.state_dict().items() if not name.endswith("tracked")}


@pytest.mark.parametrize("parts", [Parts(), Parts(contrastive=True, cross=1), Parts(bilstm=0, cnn=False, cbam="none")])
def test_it_learns(parts):
    made = train(replace(SMALL, parts=parts, epochs=8, rate=3e-3), plain_set())
    assert made.card["test"]["accuracy"] == 1.0
    assert made.card["history"][0]["loss"] > made.card["history"][-1]["loss"]
    assert made.temperature == made.card["temperature"]
    assert made.card["data"]["counts"]["train"] == {"glad": 32, "sad": 32}
    json.dumps(made.card)


def test_the_same_seed_makes_the_same_classifier(tiny_set):
    first, again = (train(replace(SMALL, epochs=1), tiny_set) for _ in range(2))
    other = train(replace(SMALL, epochs=1, seed=4), tiny_set)
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(first).items())
    assert any(not torch.equal(t, weights(other)[name]) for name, t in weights(first).items())


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tiny_set, tmp_path):
    whole = train(SMALL, tiny_set)
    told = []

    def say(line):
        told.append(line)
        if len(told) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(SMALL, tiny_set, at=tmp_path / "run", say=say)
    again = train(SMALL, tiny_set, at=tmp_path / "run", say=told.append)
    assert len(told) == 3
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(whole).items())
    assert again.card["history"] == whole.card["history"]
    assert len(list((tmp_path / "run").glob("epoch-*"))) == 1


def test_a_run_of_another_recipe_is_not_gone_on_with(tiny_set, tmp_path):
    train(replace(SMALL, epochs=1), tiny_set, at=tmp_path)
    with pytest.raises(ValueError, match="other settings or data"):
        train(replace(SMALL, epochs=1, rate=1.0), tiny_set, at=tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no run that can go on"):
        train(replace(SMALL, epochs=1), tiny_set, at=tmp_path)


def test_training_ends_where_nothing_gets_better():
    trainer = Trainer(replace(SMALL, epochs=50, patience=2, rate=0.0), plain_set())
    run = trainer.train()
    assert (run.epoch, run.best_epoch) == (3, 0)


def test_the_best_epoch_is_kept():
    run = Run()
    trainer = Trainer(SMALL, plain_set())
    good = trainer.judge("dev")
    states = iter([{"w": torch.tensor(1)}, {"w": torch.tensor(2)}, {"w": torch.tensor(3)}])
    for accuracy, nll in ((0.5, 1.0), (0.7, 2.0), (0.7, 1.5), (0.6, 0.1)):
        run.take(replace(good, accuracy=accuracy, nll=nll), 0.0, lambda: next(states))
    assert (run.best_epoch, run.best_accuracy, int(run.best["w"])) == (2, 0.7, 3)


def test_an_encoder_that_knows_something_waits(tmp_path):
    folder = small.folder(tmp_path, bilstm=0)
    recipe = replace(SMALL, text=str(folder), size=Size(), image_weights=str(folder), frozen=1, epochs=1)
    trainer = Trainer(recipe, plain_set())
    known = open_folder(folder).model.text.state_dict()
    assert all(torch.equal(t, known[name]) for name, t in trainer.model.text.state_dict().items())
    trainer.train()
    assert all(torch.equal(t, known[name]) for name, t in trainer.model.text.state_dict().items())
    unfrozen = Trainer(replace(recipe, frozen=0), plain_set())
    unfrozen.train()
    assert any(not torch.equal(t, known[name]) for name, t in unfrozen.model.text.state_dict().items())


def test_weights_of_a_picture_encoder_are_frozen(tmp_path):
    encoder = small.classifier().model.image.encoder
    state = {name: t for name, t in encoder.state_dict().items() if not name.endswith("tracked")}
    (tmp_path / "w.safetensors").write_bytes(serialize(state))
    trainer = Trainer(
        replace(SMALL, image_weights=str(tmp_path / "w.safetensors"), epochs=1), table.read("incongruity-tiny")
    )
    trainer.train()
    after = trainer.model.image.encoder.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in state.items())
    with pytest.raises(ValueError, match="no place for"):
        Trainer(
            replace(SMALL, image=ImageShape("resnet18", 64), image_weights=str(tmp_path / "w.safetensors")), plain_set()
        )


def make_bert(folder, layers=3):
    transformers = pytest.importorskip("transformers")
    told = transformers.BertConfig(
        vocab_size=len(small.WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = transformers.BertModel(told)
    model.save_pretrained(folder)
    small.tokenizer().save(str(folder / "tokenizer.json"))
    return folder, model


def test_a_bert_whole_and_made_small(tmp_path):
    folder, theirs = make_bert(tmp_path)
    whole = begin(str(folder), Size(), ())
    ours = Bert(whole.shape, 0.0).eval()
    ours.load_state_dict(dict(whole.state))
    ids = torch.tensor([[2, 4, 5, 7, 3]])
    with torch.no_grad():
        expected = theirs.eval()(ids).last_hidden_state
        torch.testing.assert_close(ours(ids, torch.ones(1, 5, dtype=torch.bool)), expected, atol=1e-5, rtol=1e-5)
    fewer_layers = begin(str(folder), Size(layers=1), ())
    assert fewer_layers.shape.layers == 1
    assert not any(name.startswith("blocks.1") for name in fewer_layers.state)
    narrow = begin(str(folder), Size(width=8, layers=2), ())
    assert (narrow.shape.width, narrow.shape.layers) == (8, 2)
    assert not any(name.startswith("blocks") for name in narrow.state)


def test_the_directions_that_are_kept_keep_words_apart(tmp_path):
    """Words lie in a plane: two directions keep all their distances, but for a common factor."""
    folder, model = make_bert(tmp_path, 1)
    plane = torch.randn(len(small.WORDS), 2) @ torch.randn(2, 32)
    model.embeddings.word_embeddings.weight.data.copy_(plane)
    model.save_pretrained(folder)
    kept = begin(str(folder), Size(width=2, layers=0), ()).state["words.weight"]
    before, after = torch.cdist(plane, plane), torch.cdist(kept, kept)
    factor = (after.sum() / before.sum()).item()
    torch.testing.assert_close(after, before * factor, atol=1e-3, rtol=1e-3)


def test_fewer_word_pieces_spell_every_word():
    vocabulary = [*SPECIAL, "a", "b", "##a", "##b", "ab", "##ab", "ba"]
    from tenfold.classify.encoder import word_pieces

    made, kept = fewer(word_pieces(vocabulary), 10)
    assert [vocabulary[i] for i in kept] == [*SPECIAL, "a", "b", "##a", "##b", "ab"]
    assert made.encode("ba").tokens == ["[CLS]", "b", "##a", "[SEP]"]
    assert made.token_to_id("[PAD]") == 0


def test_a_new_vocabulary_has_the_most_frequent_words():
    found = words_of(["b b b aa aa", "aa cc"], len(SPECIAL) + 6 + 1)
    assert found == [*SPECIAL, "a", "b", "c", "##a", "##b", "##c", "aa"]


def test_views_leave_ends_and_labels_alone():
    reader = small.classifier().reader
    picture = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    shelf = Shelf([Post("a good day", picture, 1), Post("bad", None, 0)], reader)
    posts, labels = shelf.batch([0, 1])
    seen = varied(posts, torch.Generator().manual_seed(1), unknown=1, share=0.99)
    assert seen.ids[0].tolist() == [2, 1, 1, 1, 3]
    assert seen.ids[1].tolist() == [2, 1, 3, 0, 0]
    assert labels.tolist() == [1, 0]
    assert seen.pictures.shape == posts.pictures.shape
    assert torch.equal(varied(posts, torch.Generator().manual_seed(1), 1, 0.0).ids, posts.ids)


def test_posts_in_order_are_all_there():
    shelf = Shelf(plain_set(10).train, small.classifier().reader)
    counted = [labels for _, labels in shelf.in_order(4)]
    assert [len(labels) for labels in counted] == [4, 4, 2]
    assert sum(int(labels.sum()) for labels in counted) == 5


def test_shuffled_posts_are_all_there_with_others_as_long():
    posts = [Post(" ".join(["day"] * (1 + i % 5)), None, i % 2) for i in range(50)]
    shelf = Shelf(posts, small.classifier().reader)
    found = [batch for batch, _ in shelf.shuffled(10, torch.Generator().manual_seed(0))]
    assert sorted(length for batch in found for length in batch.lengths.tolist()) == sorted(
        3 + i % 5 for i in range(50)
    )
    assert all(batch.lengths.max() - batch.lengths.min() <= 1 for batch in found)
    again = [batch for batch, _ in shelf.shuffled(10, torch.Generator().manual_seed(0))]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": 0}, "batch"),
        ({"rate": -1.0}, "rate"),
        ({"dropout": 1.0}, "dropout"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"parts": Parts(cbam="x")}, "cbam is 'x'"),
        ({"image": ImageShape("alexnet")}, "image encoder is 'alexnet'"),
        ({"text": "/nope", "size": Size()}, r"no /nope/config\.json; allowed: 'new', 'default', .* BERT"),
        ({"text": "default"}, "leave them out"),
        ({"image_weights": "nope.safetensors"}, r"There is no nope\.safetensors"),
    ],
)
def test_recipes_that_make_no_classifier(change, word):
    with pytest.raises(ValueError, match=word):
        Trainer(replace(SMALL, **change), plain_set())


@pytest.mark.parametrize("kind", ["roberta", "distilbert", None])
def test_other_text_encoders_are_told_that_a_bert_is_read(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"model_type {kind!r}; allowed: .*BERT \(model_type bert\)"):
        begin(str(tmp_path), Size(), ())
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        begin(str(tmp_path), Size(), ())


PIECES = [*SPECIAL, "a", "good", "Good", "day", "##s", "e", "é", "!"]


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_bert_with_a_vocabulary_only(tmp_path, cased, end):
    transformers = pytest.importorskip("transformers")
    folder, _ = make_bert(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_bytes("".join(piece + end for piece in PIECES).encode())
    if cased:
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    ours = begin(str(folder), Size(), ()).tokenizer
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    theirs = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=not cased)
    for text in ("A Good days!", "é good", "", "好 good"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    small_one = begin(str(folder), Size(tokens=12), ()).tokenizer
    assert ("Good" in small_one.encode("Good").tokens) == cased


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, r"neither tokenizer\.json nor vocab\.txt"),
        (b"a\nb\n", r"vocab\.txt .* lacks \[PAD\]"),
        (b"\xff", r"vocab\.txt is not UTF-8"),
        ("\n".join([*PIECES, *map(str, range(99))]).encode(), "has 112 tokens, the text encoder 16"),
    ],
)
def test_vocabularies_that_are_none(tmp_path, content, word):
    folder, _ = make_bert(tmp_path)
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        begin(str(folder), Size(), ())


def test_files_of_pytorch_are_told_how_they_are_converted(tmp_path):
    """With the line of the message, which the document shows too."""
    encoder = small.classifier().model.image.encoder
    path = tmp_path / "the weights.pth"
    torch.save(encoder.state_dict(), path)
    with pytest.raises(ValueError, match=r"which is not read.*\.safetensors") as told:
        Trainer(replace(SMALL, image_weights=str(path)), plain_set())
    line = str(told.value).splitlines()[-1]
    assert CONVERT in line
    assert CONVERT in (Path(__file__).parents[2] / "docs" / "sentiment.md").read_text(encoding="utf-8")
    _, *words = shlex.split(line)
    subprocess.run([sys.executable, *words], check=True)
    made = Trainer(replace(SMALL, image_weights=words[-1]), plain_set()).model.image.encoder.state_dict()
    assert all(torch.equal(t, made[name]) for name, t in encoder.state_dict().items())
    torch.save({}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="which is not read"):
        Trainer(replace(SMALL, image_weights=str(path)), plain_set())
    folder, _ = make_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a file of torch\.save"):
        begin(str(folder), Size(), ())


def test_weights_of_another_kind_are_told(tmp_path):
    """Nothing of them would have a place, and a picture encoder that knows nothing would be frozen."""
    (tmp_path / "w.safetensors").write_bytes(serialize({"blocks.0.query.weight": torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=r"w\.safetensors as weights of a small lacks .* conv1\.weight"):
        Trainer(replace(SMALL, image_weights=str(tmp_path / "w.safetensors")), plain_set())
    folder, _ = make_bert(tmp_path)
    with pytest.raises(ValueError, match="as a classifier lacks"):
        Trainer(replace(SMALL, image_weights=str(folder)), plain_set())


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "7.jpg").write_bytes(b"\xff\xd8\xff broken")
    shelf = Shelf([Post("a good day", tmp_path / "7.jpg", 1)], small.classifier().reader)
    with pytest.raises(ValueError, match=r"7\.jpg: The picture begins like a JPEG"):
        shelf.item(0)


def test_initial_weights_must_fit(tmp_path):
    trainer = Trainer(SMALL, plain_set())
    wrong = replace(trainer.beginning, state={"words.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"words\.weight of shape \(3, 3\)"):
        initial(trainer.config, wrong, "")


def test_the_command(tmp_path):
    out = tmp_path / "made"
    line = ["train", "sentiment", str(out), "--data", "incongruity-tiny", "--text", "new", "--tokens", "200"]
    sizes = ["--width", "32", "--layers", "1", "--size", "24", "--epochs", "1", "--device", "cpu", "--half"]
    done = CliRunner().invoke(app, [*line, *sizes])
    assert done.exit_code == 0, done.output
    assert "calibration error" in done.output
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "card.json"}
    card = json.loads((out / "card.json").read_text())
    assert sum(map(sum, card["test"]["confusion"])) == 32
    told = CliRunner().invoke(app, ["classify", "--classifier", str(out), "a good day", "--device", "cpu", "--json"])
    assert sum(json.loads(told.output)["probabilities"].values()) == pytest.approx(1)
    again = CliRunner().invoke(app, [*line, *sizes])
    assert isinstance(again.exception, ValueError)
    assert "holds a classifier already" in str(again.exception)


def test_a_classifier_made_here_opens_there(tmp_path):
    made = train(replace(SMALL, epochs=1), plain_set())
    save(tmp_path, made)
    posts = made.reader.batch([made.reader.read("good sun")])
    assert torch.equal(open_folder(tmp_path).model(posts).logits, made.model(posts).logits)
    assert Checkpoint(tmp_path / "none", "").exists() is False
