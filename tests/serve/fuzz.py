"""What the tests that send anything have in common: values to send, and what a refusal must look like."""

from collections.abc import Sequence
from typing import Any

import httpx
from hypothesis import strategies as st

OPENAI = frozenset({"message", "type", "param", "code"})
LONGEST = 2000  # characters of a message


def scalars(words: Sequence[str]) -> st.SearchStrategy[Any]:
    """Any scalar of JSON, and often one of `words`."""
    whole = st.integers(-(2**70), 2**70) | st.integers(-2, 20)
    return st.one_of(st.none(), st.booleans(), whole, st.floats(), st.text(max_size=6), st.sampled_from(words))


def values(words: Sequence[str], widest: int = 3, leaves: int = 100) -> st.SearchStrategy[Any]:
    """Any JSON, with `words` among its keys and values. widest: keys of an object."""
    keys = st.sampled_from(words) | st.text(max_size=4)
    return st.recursive(
        scalars(words),
        lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=widest),
        max_leaves=leaves,
    )


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The body of a 4xx that tells its client something."""
    assert 400 <= response.status_code < 500, response.text
    told: dict[str, Any] = response.json()
    assert 0 < len(told["error"]["message"]) < LONGEST
    return told


def check_openai(response: httpx.Response) -> None:
    """A success, or a refusal in OpenAI's shape."""
    if response.status_code != 200:
        assert set(refusal(response)["error"]) == OPENAI
