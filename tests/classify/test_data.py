"""Data to learn sentiment from: readers of public layouts, rules of labels, and posts made up."""

import json
import random
import tarfile

import pytest
import torch
from PIL import Image

from tenfold.classify.data import draw, emoji, everyday, hfm, incongruity, mvsa, table, tweets, words
from tenfold.classify.data.posts import NEGATIVE, NEUTRAL, POLARITIES, POSITIVE, SPLITS, DataSet, Post, divide, polarity

N, M, P = NEGATIVE, NEUTRAL, POSITIVE


@pytest.mark.parametrize(
    ("text", "image", "both"),
    [(N, N, N), (M, M, M), (P, P, P), (M, P, P), (P, M, P), (M, N, N), (N, M, N), (P, N, None), (N, P, None)],
)
def test_the_rule_of_joint_labels(text, image, both):
    assert mvsa.joint(text, image) == both


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("1\tpositive,positive", P),
        ("2\tneutral,negative", N),
        ("3\tpositive,negative", None),
        ("4\tpositive,neutral\tpositive,positive\tneutral,positive", P),
        ("5\tpositive,neutral\tnegative,positive\tneutral,positive", None),  # of the text nobody has more than half
        ("6\tneutral,neutral\tneutral,neutral\tpositive,negative", M),
        ("7\tpositive,negative\tpositive,negative\tneutral,neutral", None),
    ],
)
def test_rows_of_mvsa(row, label):
    assert mvsa.label_of(row) == (row[0], label)


@pytest.mark.parametrize("row", ["1", "1\thappy,sad", "1\tpositive", "1\tpositive,positive,positive"])
def test_rows_that_are_none(row):
    with pytest.raises(ValueError, match="no row of labels"):
        mvsa.label_of(row)


def picture(path, colour=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(path)


def make_mvsa(folder, labels):
    rows = ["ID\ttext,image"]
    for i, label in enumerate(labels):
        picture(folder / "data" / f"{i}.jpg")
        (folder / "data" / f"{i}.txt").write_bytes(f"post {i} \xe9".encode("latin-1"))
        rows.append(f"{i}\t{label}")
    (folder / "labelResultAll.txt").write_text("\n".join(rows) + "\n")


def test_mvsa_is_read(tmp_path, caplog):
    make_mvsa(tmp_path, ["positive,positive", "neutral,negative", "positive,negative"] * 10)
    found = table.read(f"mvsa-single={tmp_path}")
    assert "20 posts; the literature counts 4511" in caplog.text
    assert found.labels == POLARITIES
    assert [len(found.split(name)) for name in SPLITS] == [16, 2, 2]
    assert {post.label for name in SPLITS for post in found.split(name)} == {N, P}
    post = found.train[0]
    assert post.text.startswith("post ")
    assert post.pixels().shape == (3, 10, 12)
    before = found.digest()
    assert table.read(f"mvsa-single={tmp_path}").digest() == before
    picture(tmp_path / "data" / "0.jpg", (0, 0, 0))
    assert found.digest() != before


def test_mvsa_with_splits_of_its_own(tmp_path):
    make_mvsa(tmp_path, ["positive,positive", "negative,negative"] * 3)
    for name, ids in zip(SPLITS, (["0", "1", "2", "3"], ["4"], ["5"])):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": id} for id in ids]))
    found = mvsa.read("mvsa-multiple", tmp_path)
    assert [post.text[5] for post in found.train] == ["0", "1", "2", "3"]
    (tmp_path / "dev.json").write_text(json.dumps([{"id": "77"}]))
    with pytest.raises(ValueError, match="'77'"):
        mvsa.read("mvsa-multiple", tmp_path)


def test_splits_may_be_lists_of_ids(tmp_path):
    make_mvsa(tmp_path, ["positive,positive", "negative,negative"] * 3)
    for name, ids in zip(SPLITS, (["0", 1, 2, "3"], [4], ["5"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(ids))
    assert [post.text[5] for post in mvsa.read("mvsa-single", tmp_path).train] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"5", "holds a int"),
        (b'{"id": 4}', "holds a dict"),
        (b"null", "NoneType"),
        (b'[{"name": "4"}]', "row 0: .* has no id"),
        (b"[null]", "has no id"),
        (b"[true]", "has no id"),
        (b"[[4]]", "has no id"),
        (b"[4", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_splits_that_are_none(tmp_path, content, word):
    make_mvsa(tmp_path, ["positive,positive", "negative,negative"] * 3)
    for name in SPLITS:
        (tmp_path / f"{name}.json").write_text('["0", "1"]')
    (tmp_path / "dev.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"dev\.json.*{word}"):
        mvsa.read("mvsa-single", tmp_path)


def test_mvsa_without_a_picture_is_told(tmp_path):
    make_mvsa(tmp_path, ["positive,positive"])
    (tmp_path / "data" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"'0' lacks 0\.txt or 0\.jpg"):
        mvsa.read("mvsa-single", tmp_path)
    with pytest.raises(ValueError, match=r"labelResultAll\.txt"):
        mvsa.read("mvsa-single", tmp_path / "data")


def test_hfm_is_read(tmp_path, caplog):
    (tmp_path / "text").mkdir()
    rows = {
        "train.txt": [["1", "what a day", 0], ["2", "so much irony", 1], ["3", "great , rain", 1]],
        "valid2.txt": [["4", "ironic it is", 0, 1]],
        "test2.txt": [["5", "a 'quote'", 1, 0]],
    }
    for name, own in rows.items():
        (tmp_path / "text" / name).write_text("".join(f"{row}\n" for row in own))
        for row in own:
            picture(tmp_path / "dataset_image" / f"{row[0]}.jpg")
    found = table.read(f"hfm={tmp_path}")
    assert [post.text for post in found.train] == ["what a day", "great , rain"]
    assert [post.label for post in (*found.train, *found.dev, *found.test)] == [0, 1, 1, 0]
    assert "the literature counts 19816" in caplog.text


@pytest.mark.parametrize("line", ["", "[", "__import__('os')", "['1', 'x', 7]", "['1']", "5", "{'a': 1}"])
def test_lines_of_hfm_that_are_none(line):
    with pytest.raises(ValueError, match=r"HFM|label"):
        hfm.row_of(line)


def test_counts_of_the_literature():
    assert mvsa.ITEMS == {"mvsa-single": 4511, "mvsa-multiple": 17024}
    assert sum(hfm.ITEMS.values()) == sum(incongruity.LARGE) == 24635


def moods(text):
    """What a text says, by its last clause: an independent reading of what `Writer` writes."""
    last = text.split(" but ")[-1].split(" and ")[-1]
    found = [w for w in last.split() if w in words.GLAD or w in words.SAD]
    mood = 1 if found[-1] in words.GLAD else -1
    return -mood if any(f" {no} " in f" {last} " for no in words.NOT) else mood


@pytest.mark.parametrize("mood", [1, -1])
@pytest.mark.parametrize("split", SPLITS)
def test_texts_have_the_mood_they_should(mood, split):
    writer = words.Writer(split, random.Random(3))
    for _ in range(200):
        text = writer.text(mood)
        assert moods(text) == mood, text


def test_words_are_held_out():
    for mood in (words.GLAD, words.SAD):
        parts = [set(words.own(mood, split)) for split in SPLITS]
        assert set.union(*parts) == set(mood)
        assert sum(map(len, parts)) == len(mood)
        assert min(map(len, parts)) >= 9
    assert not set(words.GLAD) & set(words.SAD)


def test_each_modality_alone_knows_nothing_of_a_clash():
    """Moods of text and picture are independent, and labels follow from both; every combination is as frequent."""
    wish = incongruity.Wish(sizes=(400, 40, 40), noise=0.0)
    seen = []

    def sprites(mood, split, any):
        seen.append(mood)
        return draw.sprite(mood, split, any)

    found = incongruity.generate(wish, sprites)
    seen.clear()
    rows = incongruity._moods(wish, 400, random.Random(0))
    for side in (0, 1):
        for mood in (-1, 1):
            labels = [row[2] for row in rows if row[side] == mood]
            assert sum(labels) * 2 == len(labels) == 200
    assert {row[:2] for row in rows} == {(a, b) for a in (-1, 1) for b in (-1, 1)}
    assert all(label == (text != image) for text, image, label in rows)
    label_by_text = [(moods(post.text), post.label) for post in found.train]
    for mood in (-1, 1):
        own = [label for text, label in label_by_text if text == mood]
        assert sum(own) == len(own) / 2


def test_noise_turns_some_labels():
    clean = incongruity.generate(incongruity.Wish(sizes=(400, 4, 4), noise=0.0))
    assert clean.digest() == incongruity.generate(incongruity.Wish(sizes=(400, 4, 4), noise=0.0)).digest()
    assert clean.digest() != incongruity.generate(incongruity.Wish(sizes=(400, 4, 4), noise=0.0, seed=1)).digest()
    noisy = incongruity.generate(incongruity.Wish(sizes=(2000, 4, 4), noise=0.1))
    by_text = {}
    for post in noisy.train:
        by_text.setdefault(moods(post.text), []).append(post.label)
    assert all(0.4 < sum(labels) / len(labels) < 0.6 for labels in by_text.values())


def test_joint_posts_follow_the_rule_and_contradictions_are_dropped():
    rows = incongruity._moods(incongruity.Wish("joint"), 700, random.Random(0))
    assert {row[:2] for row in rows} == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)} - {(1, -1), (-1, 1)}
    assert all(label == mvsa.joint(text + 1, image + 1) for text, image, label in rows)


@pytest.mark.parametrize(
    ("wish", "word"), [({"rule": "both"}, "rule"), ({"sizes": (1, 4, 4)}, "sizes"), ({"noise": 0.5}, "noise")]
)
def test_wishes_that_make_no_sense(wish, word):
    with pytest.raises(ValueError, match=word):
        incongruity.generate(incongruity.Wish(**wish))


def test_pictures_differ_by_mood_and_split():
    for make in (draw.face, draw.weather, draw.heart):
        glad, sad = (make(mood, (255, 200, 80), random.Random(1)) for mood in (1, -1))
        assert glad.tobytes() != sad.tobytes()
    assert not set(draw.FACES["train"]) & set(draw.FACES["test"])
    assert draw.compose([draw.sprite(0, "dev", random.Random(1))], random.Random(2)).size == (draw.SIZE, draw.SIZE)


@pytest.mark.parametrize(
    ("text", "rest", "has"),
    [
        ("good day :)", "good day", True),
        (":-( why", "why", True),
        ("ratio 3:4 http://x.y", "ratio 3:4 http://x.y", False),
        ("love <3 it :D", "love it", True),
        ("see you at 8:30", "see you at 8:30", False),
    ],
)
def test_emoticons_become_pictures(text, rest, has):
    post = tweets.post_of(0.7, text)
    assert post.text == rest
    assert (post.picture is not None) == has
    assert post.label == P


def make_assets(folder, emojis=150):
    """Tiny files in the layout of the packages."""
    base = folder / emoji.PICTURES
    rows, counts = (
        [],
        ["Emoji,Unicode codepoint,Occurrences,Position,Negative,Neutral,Positive,Unicode name,Unicode block"],
    )
    for i in range(emojis):
        code = f"1f{i:03x}"
        rows.append({"unified": code.upper(), "non_qualified": None, "short_name": f"face_{i}", "image": f"{code}.png"})
        picture(base / "img" / "google" / "64" / f"{code}.png", (i, 100, 255 - i))
        neg, neu, pos = ((20, 5, 2), (3, 20, 3), (1, 5, 20))[i % 3]
        counts.append(f"x,0x{code},30,0.5,{neg},{neu},{pos},NAME,Block")
    counts.append("y,0x1ffff,9,0.5,3,3,3,WITHOUT A PICTURE,Block")
    (base / "emoji.json").write_text(json.dumps(rows))
    (folder / emoji.COUNTS).parent.mkdir(parents=True)
    (folder / emoji.COUNTS).write_text("\n".join(counts), encoding="utf-8")
    inner = folder / "hutto_ICWSM_2014"
    inner.mkdir()
    for name in everyday.RATED:
        lines = [f"{i}\t{(i % 9) - 4}\tsome words {i} {':)' if i % 2 else ''} &amp; more" for i in range(40)]
        (inner / f"{name}_GroundTruth.txt").write_text("\r\n".join(lines))
    (folder / "vader-ratings").mkdir()
    with tarfile.open(folder / "vader-ratings" / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        archive.add(inner, "hutto_ICWSM_2014")
    return folder


def test_emoji_are_split_by_emoji(tmp_path):
    found = emoji.find(make_assets(tmp_path))
    assert len(found) == 150
    assert {each.split for each in found} == set(SPLITS)
    assert [each.label for each in found if each.name in ("face_0", "face_1", "face_2")] == [N, M, P]
    data = table.read(f"emoji={tmp_path}")
    names = [{post.text for post in data.split(name)} for name in SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == 150
    assert emoji.Drawer(found)(1, "train", random.Random(0)).mode == "RGBA"
    with pytest.raises(ValueError, match="more pictures are needed"):
        emoji.Drawer(found[:3])


def test_tweets_are_read_where_they_are(tmp_path):
    data = tweets.read(make_assets(tmp_path))
    assert sum(len(data.split(name)) for name in SPLITS) == 20
    mixed = tweets.rated(tmp_path, everyday.RATED, lambda post: True, "all")
    assert {post.text for post in data.test} <= {post.text for post in mixed.test}
    assert data.train[0].text.endswith("& more")
    assert data.train[0].picture.shape == (3, draw.SIZE, draw.SIZE)


def test_the_mixture_has_all_kinds_of_posts(tmp_path, monkeypatch):
    monkeypatch.setattr(everyday, "MADE_UP", (20, 8, 8))
    data = everyday.read(make_assets(tmp_path))
    kinds = {(bool(post.text), post.picture is not None) for post in data.train}
    assert kinds == {(True, True), (True, False), (False, True)}
    for name in SPLITS:
        assert {post.label for post in data.split(name)} == {N, M, P}


@pytest.mark.parametrize("name", ["emoji", "tweets", "everyday", "incongruity-emoji"])
def test_packages_that_are_not_there(tmp_path, name):
    with pytest.raises(ValueError, match="unpack"):
        table.read(f"{name}={tmp_path}")


def test_unknown_data_is_told():
    with pytest.raises(ValueError, match="data is 'imdb'; allowed: incongruity"):
        table.read("imdb")


@pytest.mark.parametrize("name", ["mvsa-single", "mvsa-multiple", "hfm"])
@pytest.mark.parametrize("end", ["", "="])
def test_sets_that_need_a_folder(name, end):
    with pytest.raises(ValueError, match=rf"give {name}=FOLDER, whose layout is in docs/sentiment\.md"):
        table.read(name + end)


@pytest.mark.parametrize("name", ["mvsa-single", "mvsa-multiple", "hfm"])
def test_folders_of_another_layout(tmp_path, name):
    with pytest.raises(ValueError, match=r"docs/sentiment\.md has the layout"):
        table.read(f"{name}={tmp_path}")


@pytest.mark.parametrize("name", ["incongruity", "incongruity-tiny", "incongruity-joint", "incongruity-large"])
def test_sets_that_read_no_folder(name):
    with pytest.raises(ValueError, match=f"{name} is made up and reads no folder"):
        table.read(f"{name}=/x")


def test_ratings_and_splits():
    assert [polarity(r, 0.5) for r in (-4, -0.5, -0.4, 0, 0.4, 0.5, 4)] == [N, N, M, M, M, P, P]
    posts = [Post(str(i), None, i % 2) for i in range(50)]
    first, again, other = divide(posts, 1), divide(posts, 1), divide(posts, 2)
    assert [len(part) for part in first] == [40, 5, 5]
    assert first == again != other
    assert sorted(int(post.text) for part in first for post in part) == list(range(50))


def test_sets_of_no_use_are_refused():
    posts = (Post("a", None, 0), Post("b", None, 1))
    DataSet("x", ("n", "y"), posts, posts, posts).check()
    with pytest.raises(ValueError, match="no posts to dev"):
        DataSet("x", ("n", "y"), posts, (), posts).check()
    with pytest.raises(ValueError, match="one label only"):
        DataSet("x", ("n", "y"), posts[:1], posts, posts).check()
    with_picture = (Post("a", torch.zeros(3, 2, 2, dtype=torch.uint8), 0), posts[1])
    sets = [DataSet("x", ("n", "y"), train, posts, posts).digest() for train in (posts, posts[::-1], with_picture)]
    assert len(set(sets)) == 3
