from tenfold.cache.pages import PagePool
from tenfold.cache.prefix import PageKeys, PrefixCache


def keys_of(tokens: list[int], salt: str = "", page_size: int = 2) -> list[bytes]:
    return list(PageKeys(salt, page_size).extend(tokens, len(tokens) // page_size))


def test_equal_beginnings_have_equal_keys_and_no_others() -> None:
    a, b = keys_of([1, 2, 3, 4, 5, 6]), keys_of([1, 2, 3, 4, 9, 9])
    assert a[:2] == b[:2]
    assert a[2] != b[2]


def test_the_same_page_after_another_beginning_has_another_key() -> None:
    assert keys_of([1, 2, 5, 6])[1] != keys_of([3, 4, 5, 6])[1]


def test_salts_keep_apart() -> None:
    assert not set(keys_of([1, 2, 3, 4], "a")) & set(keys_of([1, 2, 3, 4], "b"))
    assert not set(keys_of([1, 2], "")) & set(keys_of([1, 2], "\0"))


def test_tokens_are_not_confused_with_their_neighbours() -> None:
    assert keys_of([1, 256])[0] != keys_of([257, 0])[0]
    assert keys_of([200_000, 1])[0] != keys_of([1, 200_000])[0]


def test_a_chain_grows_without_changing() -> None:
    chain = PageKeys("", 2)
    tokens = [1, 2, 3]
    first = list(chain.extend(tokens, 1))
    tokens += [4, 5, 6]
    assert chain.extend(tokens, 3)[:1] == first
    assert chain.keys == keys_of([1, 2, 3, 4, 5, 6])


def test_the_longest_known_beginning_is_found() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool)
    pages = pool.allocate(3)
    keys = keys_of([1, 2, 3, 4, 5, 6])
    for key, page in zip(keys, pages):
        cache.insert(key, page)
    assert cache.match(keys) == pages
    assert cache.match(keys_of([1, 2, 3, 4, 7, 7])) == pages[:2]
    assert cache.match(keys_of([7, 7, 3, 4])) == []


def test_the_older_page_of_equal_contents_stays_the_shared_one() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    old, new = pool.allocate(2)
    (key,) = keys_of([1, 2])
    cache.insert(key, old)
    cache.insert(key, new)
    assert cache.match([key]) == [old]
    pool.release([new])
    assert pool.free == 1  # it is no copy worth keeping


def test_a_page_given_away_is_forgotten() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    keys = keys_of([1, 2, 3, 4])
    for key, page in zip(keys, pages):
        cache.insert(key, page)
    pool.release(reversed(pages))
    assert cache.match(keys) == pages
    assert pool.allocate() == [pages[1]]  # the end of the chain goes first
    assert cache.match(keys) == pages[:1]
    assert len(cache) == 1


def test_clearing_keeps_pages_in_use() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    keys = keys_of([1, 2, 3, 4])
    for key, page in zip(keys, pages):
        cache.insert(key, page)
    pool.release(pages[1:])
    cache.clear()
    assert cache.match(keys) == pages[:1]
    assert pool.free == 1
