"""Classifiers as they are served: the same bits alone and beside others, folded norms, rooms, and the LSTM without
packing.
"""

import random

import pytest
import torch
from torch import nn

from tenfold.models.sentiment.config import ImageShape
from tenfold.models.sentiment.folder import Classifier, open_folder, place
from tenfold.models.sentiment.image import ResNet
from tenfold.models.sentiment.prepare import Item
from tenfold.models.sentiment.served import BUCKETS, MOST_ROOMS, Rooms, Served, bucket_of, fold_norms
from tenfold.models.sentiment.text import BiLstm
from tests.models.sentiment import small

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


class Capturer:
    """Graphs of a CPU: what was run is run again, and its results go to where they were first."""

    def __init__(self, works: bool = True) -> None:
        self.works, self.asked, self.replays = works, 0, 0

    def capture(self, run):
        self.asked += 1
        if not self.works:
            return None
        results = run()
        results.fill_(torch.nan)  # nothing was run yet
        told = self

        class Graph:
            def replay(self) -> None:
                told.replays += 1
                results.copy_(run())

        return Graph(), results


def posts(count, seed=0, pictures=True, size=24, longest=64):
    draw = torch.Generator().manual_seed(seed)

    def picture():
        return torch.randint(0, 256, (3, size, size), generator=draw, dtype=torch.uint8)

    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [
        Item(
            torch.randint(4, len(small.WORDS), (n,), generator=draw).tolist(),
            picture() if pictures and i % 3 != 1 else None,
        )
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(params=[1, 2])
def threads(request):
    """CPU threads of an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ARCHITECTURES = {
    "packaged": None,
    "small": {},
    "one layer": {"bilstm": 1, "width": 48},
    "cross, ViT": {"bilstm": 0, "cross": 2, "image": ImageShape("vit", 24, 8, 32, 2, 4, 64)},
    "picture": {"bilstm": 1, "layout": "picture", "cnn": False, "cbam": "channel"},
    "text": {"modalities": "text"},
    "large stem": {"bilstm": 0, "image": ImageShape("resnet18", 32)},
}


def architecture(name) -> Classifier:
    parts = ARCHITECTURES[name]
    return open_folder(place("default")) if parts is None else small.classifier(**parts)


def assert_same_bits(served, items, seed):
    """Batches of any posts, any number of them and in any order, tell each what it is told alone."""
    alone = [served([item])[0] for item in items]
    assert len(set(map(tuple, alone))) > len(items) // 2
    draw = random.Random(seed)
    for count in (1, 2, 3, 8, len(items), 33):
        places = draw.choices(range(len(items)), k=count) if count > 8 else draw.sample(range(len(items)), count)
        assert served([items[i] for i in places]) == [alone[i] for i in places]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_post_is_told_the_same_bits_whatever_is_beside_it(name, threads):
    made = architecture(name)
    assert_same_bits(Served(made), posts(17, seed=threads, size=made.config.image.size), seed=threads)


def test_what_need_not_be_exact_is_one_batch():
    made, sizes = small.classifier(), []
    exact, together = Served(made), Served(made, exact=False)
    made.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0].ids)))
    items = posts(9)
    found, expected = together(items), exact(items)
    assert sizes == [9, *[1] * 9]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=0)
    assert (exact.alone, together.alone) == (True, False)
    assert exact([]) == []


def test_posts_of_an_exact_room_would_be_in_its_like_alone():
    made = small.classifier()
    served, rooms = Served(made), Rooms(made, torch.device("cpu"), Capturer().capture, size=4)
    items = posts(23)
    groups = rooms.groups(items)
    assert sorted(i for places in groups for i in places) == [*range(23)]
    kinds = [(bucket_of(len(item.ids)), item.picture is not None) for item in items]
    with torch.inference_mode():
        for places in groups:
            own = [items[i] for i in places]
            assert len(own) <= 4
            assert {(4, *kinds[i]) for i in places} == {rooms._key(own)}
            torch.testing.assert_close(rooms(own), torch.tensor(served(own)), atol=1e-6, rtol=0)
    assert all(
        rooms.alike(items[i], items[k]) == (kinds[i] == kinds[k]) for i in range(len(items)) for k in range(len(items))
    )


@pytest.mark.parametrize(
    "dtype", [pytest.param(kind, marks=ON_GPU) for kind in (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("name", ["packaged", "one layer", "cross, ViT", "large stem"])
def test_full_rooms_of_a_gpu_tell_the_same_bits(name, dtype):
    made = architecture(name)
    made.model.to("cuda", dtype)
    served = Served(made, exact=True, most=16)
    items = posts(17, size=made.config.image.size, longest=min(64, made.config.max_tokens))
    for seed in range(3):
        assert_same_bits(served, items, seed)


def test_buckets():
    assert [bucket_of(n) for n in (1, 16, 17, 512, 513)] == [16, 16, 32, 512, 513]
    assert list(BUCKETS) == sorted(BUCKETS)


@pytest.mark.parametrize(
    "parts", [{}, {"modalities": "text"}, {"modalities": "image"}, {"cross": 1}, {"bilstm": 0}], ids=str
)
def test_rooms_tell_what_batches_do_whatever_they_held_before(parts):
    made, capturer = small.classifier(**parts), Capturer()
    rooms = Rooms(made, torch.device("cpu"), capturer.capture)
    with torch.inference_mode():
        for round in range(3):
            for count in (1, 3, 4, 7, 2):
                items = posts(count, seed=10 * round + count, pictures=round != 1 or count != 3)
                if parts.get("modalities") == "image":
                    items = [Item(item.ids, torch.full((3, 24, 24), 9 * count, dtype=torch.uint8)) for item in items]
                expected = made.probabilities(made.model(made.reader.batch(items)).logits)
                torch.testing.assert_close(rooms(items), expected, atol=1e-5, rtol=0)
    assert capturer.replays


def test_a_room_is_captured_the_second_time_and_forgotten_when_there_are_many():
    made, capturer = small.classifier(), Capturer()
    rooms = Rooms(made, torch.device("cpu"), capturer.capture)
    items = posts(2)
    with torch.inference_mode():
        found = [rooms(items).clone() for _ in range(4)]
        assert (capturer.asked, capturer.replays) == (1, 3)
        assert all(torch.equal(each, found[0]) for each in found)
        for i in range(MOST_ROOMS):
            rooms._known[i, i, False] = rooms._known[2, 64, True]
        rooms(posts(1))
    assert len(rooms._known) <= MOST_ROOMS + 1
    assert next(iter(rooms._known)) != (2, 64, True)


def test_what_cannot_be_captured_runs_plainly():
    made, capturer = small.classifier(), Capturer(works=False)
    rooms = Rooms(made, torch.device("cpu"), capturer.capture)
    items = posts(3)
    with torch.inference_mode():
        expected = rooms(items).clone()
        assert torch.equal(rooms(items), expected)
    assert capturer.asked == 1


@pytest.mark.parametrize("kind", ["small", "resnet18", "resnet50"])
def test_folded_norms_are_the_same_map(kind):
    torch.manual_seed(0)
    model = ResNet(kind).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for part, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1),
            ):
                part.uniform_(low, high)
            module.bias.uniform_(-1, 1)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    fold_norms(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "layers"), [(8, 2), (40, 1), (48, 2)])
def test_an_lstm_without_packing_is_the_packed_one(device, width, layers):
    lstm = pytest.importorskip("tenfold.ops.lstm")
    torch.manual_seed(width)
    packed = BiLstm(width, layers, 0.0).eval().requires_grad_(False)
    x, lengths = torch.randn(18, 7, width), torch.randint(1, 8, (18,))
    lengths[3] = 7
    expected = packed(x, lengths)
    weights = [lstm.Layer(*(part.to(device) for part in layer)) for layer in lstm.layers_of(packed.lstm)]
    for i, length in enumerate(lengths.tolist()):
        x[i, length:] = torch.nan  # nobody may look
    out = lstm.bidirectional(x.to(device), lengths.to(device), weights)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtype", [pytest.param(kind, marks=ON_GPU) for kind in (torch.float32, torch.bfloat16, torch.float16)], ids=str
)
def test_graphs_of_a_gpu_tell_what_a_cpu_does(dtype):
    made = small.classifier(cross=1)
    batches = [posts(count, seed) for seed in range(3) for count in (1, 3, 4, 7, 2)]
    expected = [made.probabilities(made.model(made.reader.batch(items)).logits).tolist() for items in batches]
    made.model.to("cuda", dtype)
    served = Served(made)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for _ in range(2):
        for items, told in zip(batches, expected):
            for ours, theirs in zip(served(items), told):
                assert ours == pytest.approx(theirs, abs=tolerance)
    assert served._rooms is not None
    assert any(room.graph is not None for room in served._rooms._known.values())
