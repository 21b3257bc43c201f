"""What a request with pictures is answered does not depend on who else is served, on chunks, on what is cached, or on
preemption; and no picture is taken for another.
"""

import base64
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.base.config import EngineConfig
from tenfold.engine import core
from tenfold.engine.core import Engine
from tenfold.engine.llm import LLM
from tenfold.engine.memory import check_sight, plan_memory
from tenfold.engine.request import Pictured, QueueFull, Request, SamplingParams
from tenfold.engine.template import reads_of
from tenfold.engine.text import Text
from tenfold.models.picture import Picture
from tenfold.models.table import Model, build_model, model_config
from tenfold.ops.table import make_kernels
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests import vision
from tests.engine import fake

ANSWER = 8
CLEAR = 1e-3  # a best token this far ahead of the second, rounding cannot dethrone
PARAMS = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=2)
LONGEST = 512


def prompts(text: Text) -> list[Pictured]:
    """Texts with no picture, one, two and three; alike but for a picture; alike up to a picture; alike throughout but
    for the end.
    """
    assert text.processor is not None
    mark = text.processor.placeholder
    one, two, three = (image.resize((60, 44)) for image in vision.pictures()[:3])
    wide = vision.pictures()[1].resize((90, 33))
    cases: list[tuple[str, list[Image.Image]]] = [
        ("the end of it all, and then some more", []),
        (f"{mark}What is it?", [one]),
        (f"{mark}What is it?", [two]),
        (f"{mark}What is that?", [one]),
        (f"a long beginning {mark} then {mark} and no end", [one, wide]),
        (f"a long beginning {mark} then {mark} and no end", [one, two]),
        (f"a long beginning {mark}{mark}{mark}", [wide, three, one]),
        (f"{mark}", [wide]),
    ]
    return [text.encode_pictured(words, images, add_special_tokens=False) for words, images in cases]


@dataclass
class Case:
    """A model, its prompts, and what it answers to each alone, in one chunk."""

    model: Model
    kernels: Any
    prompts: list[Pictured]
    kv_cache: str = "auto"
    answers: list[list[int]] = field(default_factory=list)

    def engine(self, pages: int = 128, **sizes: Any) -> Engine:
        sizes = {"page_size": 8, "max_model_len": LONGEST, "max_step_tokens": LONGEST, "picture_cache": 1 << 20} | sizes
        engine = Engine(
            self.model, self.kernels, fake.settings(kv_cache=self.kv_cache, **sizes), pages=pages, eos_ids=()
        )
        engine.kv.fill(float("nan"))  # reading what was never written shows
        return engine

    def request(self, name: str, number: int, **values: Any) -> Request:
        asked = self.prompts[number]
        return Request(name, asked.tokens, replace(PARAMS, **values), pictures=asked.pictures)


CASES = (
    "llava",
    "qwen2-vl",
    "qwen2.5-vl-native",
    "internvl",
    "idefics3-native",
    "llava int4",
    "qwen2-vl fp8",
    "smolvlm k2v2g16w9s1",
)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, seeing: Callable[[str], Path]) -> Case:
    kind, _, kv_cache = request.param.partition(" ")
    name = kind.removesuffix("-native")
    try:
        kernels = make_kernels("native" if name != kind else "torch", torch.device("cpu"), torch.float32, 1)
    except ValueError as error:
        pytest.skip(str(error))
    checkpoint = open_checkpoint(seeing(name))
    model = build_model(checkpoint.config, Weights(checkpoint, kernels), LONGEST)
    case = Case(model, kernels, prompts(Text(checkpoint)), kv_cache or "auto")
    for number in range(len(case.prompts)):
        engine = case.engine()
        engine.add(case.request("alone", number))
        outputs = fake.drain(engine)
        assert all(o.logprobs[0].top[0][1] - o.logprobs[0].top[1][1] > CLEAR for o in outputs)
        case.answers.append([t for o in outputs for t in o.tokens])
    return case


def answer(case: Case, engine: Engine, order: list[int], *lives: Any, **values: Any) -> None:
    """Ask for the prompts in this order, and compare. lives: as in `fake.check_lives`."""
    requests = [case.request(str(i), number, **values) for i, number in enumerate(order)]
    fake.check_lives(engine, requests, [case.answers[number] for number in order], *lives)


def test_pictures_count(case: Case) -> None:
    assert len({tuple(a) for a in case.answers}) == len(case.answers)


@pytest.mark.parametrize("chunk", [1, 5, 8, 19])
def test_any_chunk_size(case: Case, chunk: int) -> None:
    for number in range(len(case.answers)):
        answer(case, case.engine(max_step_tokens=chunk, prefix_cache=False), [number])


@pytest.mark.parametrize("lookahead", [0, 1])
def test_any_batch(case: Case, lookahead: int) -> None:
    answer(case, case.engine(max_batch=8, lookahead=lookahead, prefix_cache=False), list(range(8)))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_after_a_prefix_hit(case: Case, lookahead: int) -> None:
    """Equal tokens with other pictures never hit: 1 and 2 differ by their picture only, as do 4 and 5 by their last."""
    engine = case.engine(max_batch=3, lookahead=lookahead)
    answer(case, engine, [1, 2, 4])
    looked = engine.sight.looked if engine.sight else 0
    answer(case, engine, [5, 3, 1, 2, 4, 6])
    assert engine.stats().prefix_hit_tokens > 60 or engine.rooms is not None  # there only the third time hits
    assert engine.sight is not None
    assert engine.sight.looked <= looked + 2  # the pictures 6 has and none before had


def test_equal_text_and_other_pictures_share_nothing(case: Case) -> None:
    engine = case.engine()
    answer(case, engine, [1])
    before = engine.stats().prefix_hit_tokens
    answer(case, engine, [2])
    shown = case.prompts[1].tokens.index(engine.sight.tower.token_id)  # type: ignore[union-attr]
    assert engine.stats().prefix_hit_tokens - before <= shown
    answer(case, engine, [1])
    assert engine.stats().prefix_hit_tokens - before >= len(case.prompts[1]) - 8 or engine.rooms is not None


@pytest.mark.parametrize("lookahead", [0, 1])
def test_after_preemption(case: Case, lookahead: int) -> None:
    longest = max(map(len, case.prompts)) + ANSWER
    engine = case.engine(pages=-(-longest // 8) + 2, max_batch=5, lookahead=lookahead, prefix_cache=False)
    rng = random.Random(3)
    answer(case, engine, [rng.randrange(8) for _ in range(12)])
    assert engine.stats().preemptions > 0


def test_several_answers(case: Case) -> None:
    answer(case, case.engine(max_batch=6), [4, 1], n=3)


@pytest.mark.parametrize("apart", [False, True])
def test_guessed_ahead(case: Case, apart: bool) -> None:
    """apart: as on a GPU, where a token and its drafts are decodes of one row."""
    engine = fake.speculating(case.engine(max_batch=5, speculate="ngram", prefix_cache=False))
    if apart and (case.kv_cache != "auto" or case.kernels.name != "torch"):
        pytest.skip("the meaning of the operations is enough to see where tokens stand")
    engine.runner.rows.apart = apart
    answer(case, engine, [0, 1, 2, 3, 4, 5, 6], max_tokens=ANSWER)


def test_nothing_is_kept_beyond_the_limit(case: Case) -> None:
    engine = case.engine(picture_cache=1, max_step_tokens=9, prefix_cache=False)
    answer(case, engine, [4, 6])
    assert engine.sight is not None
    assert engine.sight.bytes == 0
    engine = case.engine()
    answer(case, engine, [4, 6])
    assert engine.sight is not None
    assert engine.sight.looked == len({p.key for n in (4, 6) for p in case.prompts[n].pictures})


@settings(max_examples=15, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    pauses=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    aborts=st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=6, max_size=6),
    page_size=st.sampled_from([1, 3, 8, 16]),
    max_batch=st.integers(1, 4),
    max_step_tokens=st.integers(4, 60),
    lookahead=st.integers(0, 1),
    prefix_cache=st.booleans(),
    picture_cache=st.sampled_from([1, 9000, 1 << 20]),
)
def test_any_schedule(
    case: Case, order: list[int], pauses: list[int], aborts: list[int | None], page_size: int, **sizes: Any
) -> None:
    pages = -(-(max(map(len, case.prompts)) + ANSWER) // page_size) + 3
    answer(case, case.engine(pages, page_size=page_size, **sizes), order, pauses, aborts)


# Refusals


def test_pictures_and_tokens_must_match(case: Case) -> None:
    engine, asked = case.engine(), case.prompts[1]
    with pytest.raises(ValueError, match="tokens for parts of pictures, and its 0 pictures need 0"):
        engine.add(Request("a", asked.tokens))
    with pytest.raises(ValueError, match="its 2 pictures need"):
        engine.add(Request("a", asked.tokens, pictures=asked.pictures * 2))
    broken = replace(asked.pictures[0], pixels=b"")
    with pytest.raises(ValueError, match="allowed: what the model's own preparation makes"):
        engine.add(Request("a", asked.tokens, pictures=(broken,)))
    assert engine.stats().waiting == 0


def test_a_model_of_text_sees_nothing() -> None:
    picture = Picture(1, 1, 1, 1, bytes(3)).keyed()
    engine = fake.make_engine()
    with pytest.raises(ValueError, match="pictures has 1 entries, and this model reads text only"):
        engine.add(Request("a", (1, 2), pictures=(picture,)))


def test_a_picture_that_cannot_be_looked_at_ends_its_request_alone(case: Case) -> None:
    engine, tower = case.engine(max_batch=4), case.model.tower
    assert tower is not None
    wrong = case.prompts[2].pictures[0].key

    class Broken:
        token_id = tower.token_id

        def encode(self, picture: Picture) -> torch.Tensor:
            if picture.key == wrong:
                raise RuntimeError("a fault in the tower")
            return tower.encode(picture)

    assert engine.sight is not None
    engine.sight.tower = Broken()  # type: ignore[assignment]
    for i in (0, 1, 2, 3):
        engine.add(case.request(str(i), i))
    outputs = fake.drain(engine)
    errors = {o.request_id: o.error for o in outputs if o.error}
    assert list(errors) == ["2"]
    assert "a fault in the tower" in errors["2"]
    told = fake.answers([o for o in outputs if o.request_id != "2"])
    assert told == {(str(i), 0): case.answers[i] for i in (0, 1, 3)}
    assert engine.pool.used == 0


def test_pictures_of_those_who_wait_are_bounded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(case.prompts[1].pictures[0].pixels)
    monkeypatch.setattr(core, "MOST_PICTURES", 2 * size)
    engine = case.engine(max_batch=1)
    engine.add(case.request("a", 1))
    engine.add(case.request("b", 1, n=2))
    with pytest.raises(QueueFull, match="pictures of"):
        engine.add(case.request("c", 1))
    engine.add(case.request("text", 0))
    engine.abort("a")
    engine.add(case.request("c", 1))
    fake.drain(engine)
    assert engine._pictures == 0
    assert engine.stats().pictures == 1


# From Python


@pytest.fixture(scope="module")
def llm(seeing: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(str(seeing("idefics3")), kernels="torch", max_model_len=LONGEST, kv_memory=4 << 20) as made:
        yield made


def test_a_look_before_the_first_request(seeing: Callable[[str], Path]) -> None:
    for name in vision.FAMILIES:
        engine = Engine.load(EngineConfig(str(seeing(name)), kernels="torch", max_model_len=256, kv_memory=2 << 20))
        engine._look_once()
        assert engine.sight is not None
        assert engine.sight.looked == 1
        assert engine.sight.bytes == 0


def test_chats_from_python(llm: LLM, tmp_path: Path) -> None:
    """A picture is the same as an image, a file, bytes and a data URL."""
    image = vision.photograph().resize((60, 44))
    path = tmp_path / "photo.png"
    image.save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    forms: list[Any] = [
        {"type": "image", "image": image},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path.read_bytes()},
        {"type": "image", "path": path},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ]
    asked = [[{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}] for part in forms]
    answers = llm.chat(asked, PARAMS)
    assert len({a.tokens for a in answers}) == 1
    (other,) = llm.chat([{"role": "user", "content": "What is it?"}], PARAMS)
    assert other.tokens != answers[0].tokens
    streamed = [t for output in llm.chat_stream(asked[0], PARAMS) for t in output.tokens]
    assert tuple(streamed) == answers[0].tokens


def test_texts_from_python(llm: LLM) -> None:
    image = vision.photograph().resize((60, 44))
    asked = llm.pictured("Look: <image> It is", [image])
    one, two = llm.generate([asked, "Look: It is"], PARAMS)
    assert one.tokens != two.tokens
    assert llm.generate(asked, PARAMS)[0].tokens == one.tokens
    with pytest.raises(ValueError, match="has the mark <image> 0 times, and there are 1 pictures"):
        llm.pictured("Look", [image])
    with pytest.raises(ValueError, match="tokens for parts of pictures"):
        llm.generate("Look: <image>", PARAMS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", vision.FAMILIES)
def test_on_a_gpu(name: str, seeing: Callable[[str], Path]) -> None:
    """Plain PyTorch in float32 gives the tokens of the CPU; the kernels in bfloat16, graphs and steps ahead the same
    for the same request, alone and among others, with and without a prefix that is cached.
    """
    folder, settings = str(seeing(name)), {"max_model_len": LONGEST, "kv_memory": 64 << 20}
    image = vision.photograph().resize((60, 44))
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": t}]}] for t in "abc"
    ]
    found = []
    for device in ("cpu", "cuda"):
        with LLM(folder, kernels="torch", device=device, dtype="float32", **settings) as made:
            found.append([c.tokens for c in made.chat(asked, PARAMS)])
    assert found[0] == found[1]
    with LLM(folder, device="cuda", **settings) as made:
        first = made.chat(asked[0], PARAMS)[0]
        again = made.chat(asked[0], PARAMS)[0]
        assert made.stats().prefix_hit_tokens > 0  # type: ignore[union-attr]
        assert len(first.tokens) == len(again.tokens) == ANSWER
        assert all(len(c.tokens) == ANSWER for c in made.chat(asked, PARAMS))


def test_what_is_no_picture(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for source, message in (
        (str(tmp_path / "text.png"), "in no format that is read"),
        (str(tmp_path / "absent.png"), "cannot be read"),
        ("https://pictures.example/a.png", "not fetched here"),
        (7, "A picture is a int"),
        (None, "has no picture"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat([{"role": "user", "content": [{"type": "image", "image": source}]}], PARAMS)


def test_strangers_name_no_files(llm: LLM, tmp_path: Path) -> None:
    """The way of a server: what is not bytes is not opened, even where there is such a file."""
    path = tmp_path / "photo.png"
    vision.photograph().resize((60, 44)).save(path)
    for source in (str(path), path):
        with pytest.raises(ValueError, match="A picture is a path; give its bytes"):
            llm.pictured_chat([{"role": "user", "content": [{"type": "image", "image": source}]}])


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (vision.PARTS, "parts"),
        (vision.EITHER, "either"),
        (vision.STRINGS, "text"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "text"),
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", "text"),
        ("{{ messages }}", "text"),
    ],
)
def test_what_templates_read(template: str, reads: str) -> None:
    assert reads_of(template.replace("MARK", "<image>"), {}, "<image>") == reads


def test_settings_that_cannot_be(seeing: Callable[[str], Path]) -> None:
    shape = model_config(open_checkpoint(seeing("qwen2-vl")).config)
    plain = model_config(open_checkpoint(seeing("llava")).config)
    for change, message in (
        ({"schedule": "phases"}, "schedule is 'phases', and this model sees pictures"),
        ({"schedule": "disaggregated"}, "schedule is 'disaggregated'"),
        ({"speculate": "small"}, "speculate is 'small', and this model sees pictures"),
        ({"kv_cache": "k2v2g16w9s1"}, "keeps keys as they are before they turn"),
        ({"max_step_tokens": 1 << 15}, "max_step_tokens is 32768"),
    ):
        config = fake.settings(**change)
        with pytest.raises(ValueError, match=message):
            check_sight(shape, config)
        if not set(change) & {"kv_cache", "max_step_tokens"}:
            with pytest.raises(ValueError, match=message):
                check_sight(plain, config)
        else:
            check_sight(plain, config)
        check_sight(replace(plain, tower=None), config)
    for change in ({"kv_cache": "fp8"}, {"kv_cache": "int4"}, {"speculate": "ngram"}, {"schedule": "prefill-first"}):
        check_sight(shape, fake.settings(**change))


def test_the_memory_plan_counts_what_sees(seeing: Callable[[str], Path]) -> None:
    shape = model_config(open_checkpoint(seeing("llava")).config)
    config = fake.settings(picture_cache=64 << 20, max_batch=4)
    seen, blind = (plan_memory(s, 1 << 20, config, 1 << 30) for s in (shape, replace(shape, tower=None)))
    assert seen.pictures == 64 << 20
    assert blind.pictures == 0
    assert seen.workspace > blind.workspace
    assert "what was seen" in str(seen)
    tight = plan_memory(shape, 1 << 20, replace(config, picture_cache=1 << 30), 1 << 30)
    assert not tight.fits
    assert any("picture_cache=1M" in change for change in tight.changes)
