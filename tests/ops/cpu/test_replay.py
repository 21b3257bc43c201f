"""Replayed forwards against the same forwards run as usual, bit for bit, with a two-layer model of random matrices."""

import threading
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tenfold.ops.cpu import replay as module
from tenfold.ops.kernels import AttentionSpec, Heads, Norm
from tenfold.ops.matrix import RawTensor

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=16, scale=0.25, rotary_dim=16)
WIDTH, PAGE, PAGES = 64, 4, 200


class Store:
    def __init__(self):
        self.keys = [torch.zeros(PAGES, 2, PAGE, 16) for _ in range(2)]
        self.values = [torch.zeros(PAGES, 2, PAGE, 16) for _ in range(2)]


@dataclass(frozen=True)
class Step:
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    query_start: Tensor
    kv_lengths: Tensor
    logits_rows: Tensor
    max_query: int
    max_kv: int
    kv: Store


def make_step(store, starts, counts, seed=0):
    """Sequence r has the pages r*50 .. r*50+49 and gets counts[r] tokens at starts[r]."""
    g = torch.Generator().manual_seed(seed)
    ends = [s + n for s, n in zip(starts, counts)]
    columns = -(-max(ends) // PAGE)
    table = torch.stack([torch.arange(columns, dtype=torch.int32) + 50 * r for r in range(len(starts))])
    positions = torch.cat([torch.arange(s, e, dtype=torch.int32) for s, e in zip(starts, ends)])
    rows = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(counts))
    slots = table[rows, positions.long() // PAGE] * PAGE + positions % PAGE
    return Step(
        token_ids=torch.randint(0, 90, (len(positions),), generator=g),
        positions=positions,
        slots=slots,
        page_table=table,
        query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
        kv_lengths=torch.tensor(ends, dtype=torch.int32),
        logits_rows=torch.arange(len(starts)),
        max_query=max(counts),
        max_kv=max(ends),
        kv=store,
    )


class Model:
    def __init__(self, native):
        g = torch.Generator().manual_seed(1)

        def matrix(rows, cols):
            data = torch.randn(rows, cols, generator=g) / cols**0.5
            return native.matrix([RawTensor("w", "F32", (rows, cols), data)])

        self.native = native
        self.table = matrix(90, WIDTH)
        self.layers = [(matrix(128, WIDTH), matrix(WIDTH, 64), matrix(256, WIDTH), matrix(WIDTH, 128)) for _ in "ab"]
        self.norm = Norm(torch.rand(WIDTH, generator=g), 1e-5)
        angles = torch.rand(300, 8, generator=g) * 6
        self.rope = torch.cat((angles.cos(), angles.sin()), 1)
        self.runs = 0

    def forward(self, step):
        self.runs += 1
        k, x = self.native, self.native.embed(step.token_ids, self.table)
        for layer, (qkv, out, up, down) in enumerate(self.layers):
            keys, values = step.kv.keys[layer], step.kv.values[layer]
            q = k.linear(x, qkv, norm=self.norm)
            q = k.rope_write(q, Heads(SPEC, self.rope), step.positions, step.slots, keys, values)
            starts, lengths = step.query_start, step.kv_lengths
            heads = k.attend(q, keys, values, step.page_table, starts, lengths, SPEC, step.max_query, step.max_kv)
            x = k.linear(heads, out, residual=x)
            x = k.linear(k.linear(x, up, norm=self.norm, act="silu"), down, residual=x)
        return k.norm(x, self.norm)


@pytest.fixture
def model(native):
    return Model(native)


def test_decoding_replays_with_equal_bits(isa, model):
    """Contexts of three sequences grow through many pages, past the room first made for the page table."""
    run, store, other = model.native.replay(), Store(), Store()
    steps = [([i, 2 * i, 5], [1, 1, 1]) for i in range(0, 99)]
    for i, (starts, counts) in enumerate(steps):
        with torch.inference_mode(i % 2 == 0):
            want = model.forward(make_step(other, starts, counts, i))
            got = run(model.forward, make_step(store, starts, counts, i))
        assert torch.equal(got, want), i
    assert run.foreign == ""
    assert model.runs == len(steps) + 2  # the usual ones; one as usual and one recorded
    assert all(torch.equal(a, b) for a, b in zip(store.keys + store.values, other.keys + other.values))


def test_page_tables_outgrow_their_room(model, monkeypatch):
    monkeypatch.setattr(module, "FIRST_COLUMNS", 2)
    run, store, other = model.native.replay(), Store(), Store()
    for i in range(40):
        want = model.forward(make_step(other, [i], [1], i))
        assert torch.equal(run(model.forward, make_step(store, [i], [1], i)), want)
    assert model.runs == 40 + 2 * 4  # 1-2, 3-4, 5-8 and 9-10 columns


def test_mixed_shapes_have_their_own_recordings(model):
    run, store = model.native.replay(), Store()
    shapes = [([0], [5]), ([5], [1]), ([0, 3], [1, 2]), ([4, 4], [1, 1]), ([6], [3])]
    for i in range(25):
        step = make_step(store, *shapes[i % 5], i)
        assert torch.equal(run(model.forward, step), model.forward(step))


def test_results_stay_when_the_next_step_runs(model):
    run, store = model.native.replay(), Store()
    results = [run(model.forward, make_step(store, [i], [1], i)) for i in range(6)]
    other = Store()
    assert all(torch.equal(r, model.forward(make_step(other, [i], [1], i))) for i, r in enumerate(results))


def test_another_store_is_recorded_anew(model):
    run = model.native.replay()
    for _ in range(3):
        store, other = Store(), Store()
        for i in range(4):
            want = model.forward(make_step(other, [i], [1], i))
            assert torch.equal(run(model.forward, make_step(store, [i], [1], i)), want)


def test_long_steps_are_not_recorded(model):
    run, store = model.native.replay(), Store()
    for i in range(4):
        run(model.forward, make_step(store, [0], [module.MOST_TOKENS + 1], i))
    assert model.runs == 4


def test_few_recordings_are_kept(model, monkeypatch):
    monkeypatch.setattr(module, "MOST_RECORDINGS", 2)
    run, store = model.native.replay(), Store()
    for i in range(30):
        step = make_step(store, [0], [1 + i % 5], i)
        assert torch.equal(run(model.forward, step), model.forward(step))
    assert len(run._recordings) == 2


@pytest.mark.parametrize(
    "foreign",
    [
        lambda x, step: x + 1,
        lambda x, step: x.view(-1, 1).view(x.shape),
        lambda x, step: x[step.logits_rows],
        lambda x, step: torch.zeros(1, WIDTH),
    ],
    ids=["add", "view", "index", "constant"],
)
def test_other_tensor_operations_prevent_recording(model, foreign):
    run, store = model.native.replay(), Store()

    def forward(step):
        return foreign(model.forward(step), step)

    for i in range(5):
        step = make_step(store, [i], [1], i)
        assert torch.equal(run(forward, step), forward(step))
    assert run.foreign != ""


def test_a_view_of_a_result_is_not_overwritten_while_recording(model):
    """The tensor is gone but a view of it lives on: its memory must not be lent again."""
    run, store, x = model.native.replay(), Store(), torch.randn(1, WIDTH)

    def forward(step):
        view = model.native.norm(x, model.norm).view(1, WIDTH)
        return model.native.add_norm(view, model.native.norm(x * 2, model.norm), model.norm)

    want = forward(None)
    for i in range(4):
        assert torch.equal(run(forward, make_step(store, [i], [1])), want)


def test_a_result_that_is_an_input_is_not_replayed(model):
    run, store, constant = model.native.replay(), Store(), torch.ones(1, WIDTH)
    for i in range(4):
        assert run(lambda step: constant, make_step(store, [i], [1])) is constant


def test_errors_pass_and_leave_the_kernels_as_they_were(model):
    run, store = model.native.replay(), Store()

    def fails(step):
        model.forward(step)
        raise KeyError("from the model")

    for i in range(3):
        with pytest.raises(KeyError, match="from the model"):
            run(fails, make_step(store, [i], [1]))
    for i in range(4):
        step = make_step(store, [i], [1], i)
        assert torch.equal(run(model.forward, step), model.forward(step))


def test_other_threads_may_compute_while_one_records(model):
    native, store, stop, wrong = model.native, Store(), threading.Event(), []
    x = torch.randn(7, WIDTH)
    want = native.norm(x, model.norm)

    def work():
        while not stop.is_set():
            if not torch.equal(native.norm(x, model.norm), want):
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        run = native.replay()
        for i in range(4):
            step = make_step(store, [i], [1], i)
            assert torch.equal(run(model.forward, step), model.forward(step))
    stop.set()
    thread.join()
    assert not wrong


def test_a_changed_pages_store_of_the_same_shape_is_noticed(model):
    run, first = model.native.replay(), Store()
    for i in range(3):
        run(model.forward, make_step(first, [i], [1], i))
    step = replace(make_step(first, [3], [1], 3), kv=Store())
    run(model.forward, step)
    assert step.kv.keys[0].abs().sum() > 0
