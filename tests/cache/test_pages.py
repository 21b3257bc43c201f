import random

import pytest

from tenfold.cache.pages import PagePool


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="raise kv_memory"):
        PagePool(0)


def test_allocating_takes_free_pages_with_one_reference_each() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert len(set(pages)) == 2
    assert (pool.free, pool.used, pool.idle, pool.available) == (1, 2, 0, 1)
    pool.check(dict.fromkeys(pages, 1))


def test_allocating_more_than_there_is_changes_nothing() -> None:
    pool = PagePool(3)
    held = pool.allocate(2)
    assert pool.allocate(2) == []
    pool.check(dict.fromkeys(held, 1))


def test_a_page_is_free_when_the_last_reference_goes() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate()
    pool.retain([page])
    pool.release([page])
    assert pool.free == 0
    pool.release([page])
    assert pool.free == 1


def test_a_kept_page_turns_idle_and_comes_back_when_retained() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate()
    pool.keep(page)
    pool.release([page])
    assert (pool.free, pool.used, pool.idle) == (1, 0, 1)
    pool.retain([page])
    assert (pool.free, pool.used, pool.idle) == (1, 1, 0)


def test_free_pages_go_before_idle_ones_and_those_in_order_of_release() -> None:
    pool = PagePool(4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    a, b, c = pool.allocate(3)
    for page in (a, b, c):
        pool.keep(page)
    pool.release([b])
    pool.release([c, a])
    assert pool.allocate(3)[1:] == [b, c]
    assert evicted == [b, c]
    pool.check()


def test_giving_up_idle_pages_frees_them() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    for page in pages:
        pool.keep(page)
    pool.release(pages)
    pool.drop_idle()
    assert (pool.free, pool.idle) == (2, 0)
    pool.check({})


def test_misuse_by_the_owner_is_noticed() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate()
    pool.release([page])
    with pytest.raises(AssertionError, match="released more often"):
        pool.release([page])
    with pytest.raises(KeyError):
        pool.retain([page])
    with pytest.raises(AssertionError, match="nobody owns"):
        pool.keep(page)


def test_check_notices_a_wrong_count() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate()
    with pytest.raises(AssertionError, match="counts 1 references, 2 held"):
        pool.check({page: 2})


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_every_page_in_one_state(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(9)
    held: list[int] = []
    for _ in range(400):
        action = rng.randrange(4)
        if action == 0:
            held += pool.allocate(rng.randint(1, 3))
        elif held:
            page = rng.choice(held)
            if action == 1:
                pool.retain([page])
                held.append(page)
            elif action == 2:
                pool.keep(page)
            else:
                held.remove(page)
                pool.release([page])
        pool.check({page: held.count(page) for page in held})
        assert pool.free + pool.used + pool.idle == pool.total


def test_two_phases_that_take_pages_never_lose_an_update() -> None:
    """The race of semi-PD: prefill looks (50 of 100 pages are used), decode takes 21 and writes 71, prefill takes 10
    and writes 60. Here looking, taking and counting are one operation, so whoever looked before still ends at 81.
    """
    pool = PagePool(100)
    pool.allocate(50)
    seen_by_prefill = pool.used
    decode = pool.allocate(21)
    prefill = pool.allocate(10)
    assert seen_by_prefill == 50
    assert pool.used == 81
    assert not set(decode) & set(prefill)
    pool.release(decode)
    pool.release(prefill)
    assert pool.used == 50
