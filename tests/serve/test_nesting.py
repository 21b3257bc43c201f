"""Nesting is counted as a parser would, however the text is cut."""

import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.serve.nesting import Nesting, brackets

TEXT = st.text(st.sampled_from('ab"\\[]{}:,\n é'), max_size=8)
VALUES = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3),
    max_leaves=20,
)


def depth_of(value):
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth_of, inside), default=0)


def measured(text, cuts=()):
    nesting = Nesting()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return max(nesting.feed(text[a:b]) for a, b in itertools.pairwise(places))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(VALUES, st.lists(st.integers(0, 200), max_size=5), st.booleans())
def test_like_a_parser(value, cuts, ascii):
    text = json.dumps(value, ensure_ascii=ascii).encode()
    assert measured(text, cuts) == depth_of(value)
    assert brackets(text) >= depth_of(value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_any_bytes_are_counted_the_same_however_they_are_cut(text, cuts):
    assert measured(text, cuts) == measured(text)


def test_examples():
    assert measured(b"") == 0
    assert measured(b"[" * 1000) == 1000
    assert measured(b'["' + b"[" * 1000) == 1
    assert measured(rb'["\"[[[", []]') == 2
    assert measured(rb'["\\", [[]]]') == 3
    assert measured(b"]]]][[") == 0
