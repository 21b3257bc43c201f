"""The pool of posts: which are computed together, and that each has one end."""

import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from tenfold import LLM, Classifier, Post
from tenfold.base.pictures import PictureError
from tenfold.engine.loop import EngineDead
from tenfold.engine.pool import Entry, Pool, PoolConfig, chosen, open_pool
from tenfold.engine.request import QueueFull
from tenfold.models.sentiment.config import ImageShape
from tenfold.models.sentiment.prepare import Item
from tests.models.sentiment import small


class Slow:
    """A model of which a test decides when it goes on, and what it cannot compute."""

    def __init__(self, model):
        self.model, self.parameters, self.config = model, model.parameters, model.config
        self.sizes, self.go, self.begun = [], threading.Event(), threading.Event()
        self.poison = -1

    def __call__(self, posts):
        self.begun.set()
        assert self.go.wait(10)
        self.sizes.append(len(posts.ids))
        if (posts.ids == self.poison).any():
            raise RuntimeError("cannot")
        return self.model(posts)


@pytest.fixture(params=["off"])
def slow(request):
    """The parameter is whether it is exact."""
    made = small.classifier()
    config = PoolConfig(batch=4, exact=request.param, queue=8)
    pool = Pool(type(made)(Slow(made.model), made.reader, made.temperature), config)
    yield pool, pool.classifier.model, made
    pool.classifier.model.go.set()
    pool.close(10)


def entries(*lengths):
    return [Entry(Item([1] * length, None), None) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ((), 4, []),
        ((5,), 4, [5]),
        ((5, 60, 9), 4, [5, 9]),
        ((60, 5, 61, 9, 64), 3, [60, 64, 61]),
        ((5, 16, 17, 3, 12), 3, [5, 16, 12]),
        ((600, 601, 5), 4, [600, 5]),
        ((5, 6, 7), 1, [5]),
    ],
)
def test_who_is_computed_together(lengths, most, expected):
    assert [entry.length for entry in chosen(entries(*lengths), most)] == expected


def test_whom_a_device_computes_together():
    waiting = entries(5, 5, 6, 5)
    assert chosen(waiting, 4, lambda first, other: len(first.ids) == len(other.ids)) == [waiting[i] for i in (0, 1, 3)]


@pytest.mark.parametrize(
    "parts",
    [{}, {"bilstm": 1, "cross": 1}, {"bilstm": 0, "cross": 2, "image": ImageShape("vit", 24, 8, 32, 2, 4, 64)}],
    ids=["small", "cross", "vit"],
)
@pytest.mark.parametrize("seed", range(2))
def test_posts_are_told_the_same_bits_whoever_else_asks(parts, seed):
    """Threads that ask for one to seven posts at a time, and for each post alone."""
    draw = random.Random(seed)
    made, pictures = small.classifier(**parts), torch.randint(0, 256, (9, 3, 24, 24), dtype=torch.uint8)
    words = small.WORDS[4:]
    items = [
        made.reader.read(" ".join(draw.choices(words, k=draw.choice((1, 7, 20, 62)))), draw.choice([None, *pictures]))
        for _ in range(25)
    ]
    pool = Pool(made, PoolConfig(batch=8))
    try:
        alone = [pool.submit(item).future.result(10) for item in items]

        def ask(places):
            return [entry.future.result(30) for entry in pool.submit_all([items[i] for i in places])]

        asked = [draw.choices(range(len(items)), k=draw.randint(1, 7)) for _ in range(40)]
        with ThreadPoolExecutor(6) as threads:
            for places, told in zip(asked, threads.map(ask, asked)):
                assert told == [alone[i] for i in places]
    finally:
        pool.close()


def test_batches_that_need_not_be_exact_tell_nearly_what_single_posts_are_told():
    made = small.classifier()
    picture = torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8)
    items = [made.reader.read(text, picture) for text in ("a", "a good day", "bad !", "the rain is very bad .")]
    items += [made.reader.read("not good"), made.reader.read("", picture)]
    together, alone = Pool(made, PoolConfig(exact="off")), Pool(made, PoolConfig(exact="on"))
    try:
        first, second = together.submit_all(items), alone.submit_all(items)
        for a, b in zip(first, second):
            assert a.future.result(10) == pytest.approx(b.future.result(10), abs=1e-6)
        assert (alone.stats.batches, alone.stats.padding) == (len(items), 0)
        assert together.stats.batches < len(items)
    finally:
        together.close()
        alone.close()


@pytest.mark.parametrize("slow", ["auto", "on"], indirect=True)
def test_on_a_cpu_what_waits_is_computed_one_by_one_in_its_order(slow):
    pool, model, made = slow
    texts = ("a", "a day", "a good day is very good", "bad", "not a good day")
    first = pool.submit(made.reader.read(texts[0]))
    model.begun.wait(10)
    rest = pool.submit_all([made.reader.read(text) for text in texts[1:]])
    model.go.set()
    began = [(entry.future.result(10), entry.began)[1] for entry in (first, *rest)]
    assert began == sorted(began)
    assert model.sizes == [1] * 5
    assert (pool.stats.posts, pool.stats.batches) == (5, 5)


def test_what_waits_is_batched(slow):
    pool, model, made = slow
    read = made.reader.read
    first = pool.submit(read("a"))
    model.begun.wait(10)
    rest = pool.submit_all([read("a good day") for _ in range(5)])
    model.go.set()
    for entry in (first, *rest):
        assert sum(entry.future.result(10)) == pytest.approx(1)
        assert entry.began >= entry.arrived
    assert model.sizes == [1, 4, 1]
    assert (pool.stats.posts, pool.stats.batches, pool.stats.waiting) == (6, 3, 0)


def test_cancelled_posts_cost_nothing(slow):
    pool, model, made = slow
    first = pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    left, kept = pool.submit_all([made.reader.read("bad"), made.reader.read("good")])
    assert left.future.cancel()
    model.go.set()
    kept.future.result(10)
    first.future.result(10)
    with pytest.raises(CancelledError):
        left.future.result(0)
    assert model.sizes == [1, 1]
    assert pool.stats.cancelled == 1


def test_a_post_that_fails_fails_alone(slow):
    pool, model, made = slow
    first = pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    model.poison = 14  # "."
    good, bad, other = pool.submit_all([made.reader.read(text) for text in ("a day", "a day .", "rain")])
    model.go.set()
    assert len(good.future.result(10)) == len(other.future.result(10)) == len(first.future.result(10)) == 3
    with pytest.raises(RuntimeError, match="cannot"):
        bad.future.result(10)
    assert pool.stats.failed == 1
    assert pool.submit(made.reader.read("a")).future.result(10)


def test_late_posts_end_with_an_error(slow):
    pool, model, made = slow
    pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    late = pool.submit(made.reader.read("bad"), deadline=0.0)
    model.go.set()
    with pytest.raises(TimeoutError):
        late.future.result(10)


def test_a_full_queue_takes_all_or_none(slow):
    pool, model, made = slow
    pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    pool.submit_all([made.reader.read("bad")] * 6)
    with pytest.raises(QueueFull, match="up to 8"):
        pool.submit_all([made.reader.read("bad")] * 3)
    assert pool.stats.waiting == 6
    pool.submit_all([made.reader.read("bad")] * 2)
    with pytest.raises(ValueError, match="9 posts were given at once; allowed: up to 8"):
        pool.submit_all([made.reader.read("bad")] * 9)


def test_posts_that_were_taken_out_leave_room_at_once(slow):
    pool, model, made = slow
    pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    left = pool.submit_all([made.reader.read("bad")] * 7)
    late = pool.submit(made.reader.read("bad"), deadline=0.0)
    for entry in left[:3]:
        entry.future.cancel()
    assert len(pool.submit_all([made.reader.read("good")] * 4)) == 4
    with pytest.raises(TimeoutError):
        late.future.result(0)
    assert (pool.stats.waiting, pool.stats.cancelled, pool.stats.failed) == (8, 3, 1)
    with pytest.raises(QueueFull, match="8 posts wait"):
        pool.submit(made.reader.read("a"))


def test_nobody_waits_for_a_thread_that_ended(slow, monkeypatch):
    pool, model, made = slow
    first = pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    waiting = pool.submit(made.reader.read("bad"))
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    monkeypatch.setattr(pool, "_next", lambda: 1 / 0)
    model.go.set()
    assert first.future.result(10)
    with pytest.raises(EngineDead):
        waiting.future.result(10)
    assert not pool.alive


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_close(tmp_path, dtype):
    folder = str(small.folder(tmp_path))
    posts = ["a good day", Post("bad", Image.new("RGB", (30, 20), (9, 99, 200)))]
    with Classifier(folder, device="cpu") as exact, Classifier(folder, device="cpu", dtype=dtype) as rounded:
        for a, b in zip(exact.classify(posts), rounded.classify(posts)):
            assert a.probabilities == pytest.approx(b.probabilities, abs=0.02)


def test_closing_ends_what_waits(slow):
    pool, model, made = slow
    running = pool.submit(made.reader.read("a"))
    model.begun.wait(10)
    waiting = pool.submit(made.reader.read("bad"))
    pool.close(0)
    with pytest.raises(EngineDead):
        waiting.future.result(0)
    with pytest.raises(EngineDead):
        pool.submit(made.reader.read("a"))
    model.go.set()
    assert running.future.result(10)
    pool.close()
    assert not pool.alive


def test_many_threads_get_their_own_answers(tmp_path):
    with Classifier(str(small.folder(tmp_path)), device="cpu", batch=4) as feel:
        texts = [" ".join(small.WORDS[5 : 6 + i % 8]) for i in range(40)]
        alone = {text: feel.classify(text)[0].probabilities for text in set(texts)}
        with ThreadPoolExecutor(8) as threads:
            for text, (found,) in zip(texts, threads.map(feel.classify, texts)):
                assert found.probabilities == alone[text]


def test_posts_from_python(tmp_path):
    with Classifier(str(small.folder(tmp_path / "c")), device="cpu", queue=2) as feel:
        picture = Image.new("RGB", (30, 20), (9, 99, 200))
        picture.save(tmp_path / "p.png")
        found = feel.classify([Post("a day", picture), Post("a day", tmp_path / "p.png"), "a day", Post("", picture)])
        alone = feel.classify(Post("a day", str(tmp_path / "p.png")))[0]
        assert found[0] == found[1]
        assert found[0] == alone
        assert found[0] != found[2]
        for each in found:
            assert each.label == max(each.probabilities, key=each.probabilities.__getitem__)
            assert tuple(each.probabilities) == feel.labels
        assert feel.classify([]) == []
        with pytest.raises(ValueError, match="text is empty"):
            feel.classify("")
        with pytest.raises(PictureError):
            feel.classify(Post("a", tmp_path / "none.png"))


def test_what_is_no_post_is_told(tmp_path):
    with Classifier(str(small.folder(tmp_path)), device="cpu") as feel:
        for wrong in (5, None, b"a day", {"a": "day"}, 1.5):
            with pytest.raises(ValueError, match=f"posts are a {type(wrong).__name__}; allowed: a str, a Post, or a"):
                feel.classify(wrong)
        with pytest.raises(ValueError, match=r"posts\[1\] is a int; allowed: a str or a Post"):
            feel.classify(["a day", 5])
        with pytest.raises(ValueError, match="text is a NoneType; allowed: str"):
            feel.classify(Post(None))
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            feel.classify("\ud800")
        with pytest.raises(PictureError, match="neither bytes nor a path"):
            feel.classify(Post("a day", 5))


def test_a_language_model_classifies_beside_itself(tiny, tmp_path):
    folder = str(small.folder(tmp_path))
    with LLM(str(tiny("llama")), device="cpu", kernels="torch") as llm:
        (first,) = llm.classify("a good day", classifier=folder)
        assert llm.classify(["a good day"], classifier=folder) == [first]
    with pytest.raises(EngineDead):
        llm.classify("a good day", classifier=folder)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"queue": 0}, "queue"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"exact": "yes"}, "exact is 'yes'; allowed: auto, on, off"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, word):
    with pytest.raises(ValueError, match=word):
        open_pool(str(small.folder(tmp_path)), PoolConfig(device="cpu", **settings))
