"""Text: pieces join to the full decode, characters stay whole, stop strings cut where they are complete first."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tenfold.engine.request import Request, SamplingParams
from tenfold.engine.text import BYTE_OF_CHARACTER, Text

CHARACTER_OF_BYTE = {b: c for c, b in BYTE_OF_CHARACTER.items()}
WORDS = ["Hello", " world", " stop", "END", "\n\n", "naïve", "日本", "👩‍👩‍👧", "ab", "abc", "<", "|"]


def make_text(tokenizer: Tokenizer, template: str | None = None) -> Text:
    checkpoint = SimpleNamespace(
        config={},
        path=Path("none"),
        tokenizer=lambda: tokenizer,
        special={"eos_token": "<|end|>"},
        eos_ids=(0,),
        chat_template=template,
    )
    return Text(checkpoint)


def byte_level() -> Tokenizer:
    """All 256 bytes as tokens, some words, parts of words that cut characters in two, special and added tokens."""
    whole = ["".join(CHARACTER_OF_BYTE[b] for b in w.encode()) for w in WORDS]
    cut = ["".join(CHARACTER_OF_BYTE[b] for b in "é👩日".encode()[i:j]) for i, j in [(1, 4), (3, 8), (0, 1), (6, 9)]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*CHARACTER_OF_BYTE.values(), *whole, *cut]))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|é|>", special=True)])
    tokenizer.add_tokens(["<tool 工具>", "ü"])
    return tokenizer


def sentencepiece(strip: int = 1) -> Tokenizer:
    """Like Llama 2 (strip 1) and Gemma (strip 0): a space mark, byte-fallback tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁▁", "▁▁▁", *(w.replace(" ", "▁") for w in WORDS), *"Helo wrdabcé日👩.", "▁Paris", "▁is", "<0xZZ>"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", strip, 0)] if strip else []))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens(["<tool▁x>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def words() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    return Tokenizer(models.WordLevel({"a": 0, "bc": 1, "d": 2}, unk_token="a"))


MAKERS = {
    "byte-level": byte_level,
    "llama": sentencepiece,
    "gemma": lambda: sentencepiece(0),
    "metaspace": metaspace,
    "words": words,
}
TEXTS = {name: make_text(make()) for name, make in MAKERS.items()}


def stream(text: Text, ids, prompt=(), **params) -> tuple[list[str], str | None]:
    detokenizer = text.detokenizer(Request("r", tuple(prompt), SamplingParams(**params)))
    pieces = []
    for i in ids:
        piece, stop = detokenizer.feed(i)
        pieces.append(piece)
        if stop is not None:
            break
    return [*pieces, detokenizer.flush()], detokenizer.stop


def byte_runs_are_whole(text: Text, ids) -> bool:
    """Whether each run of byte tokens is valid UTF-8 throughout, the case in which byte-fallback decoders keep it."""
    run = b""
    for i in [*ids, -1]:
        token = text.tokenizer.id_to_token(i) if i >= 0 else ""
        if token is not None and token.startswith("<0x") and token != "<0xZZ>":
            run += bytes.fromhex(token[3:5])
            continue
        if run and token is not None:
            try:
                run.decode()
            except UnicodeDecodeError:
                return False
            run = b""
    return True


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_full_decode(name, data):
    text = TEXTS[name]
    ids = data.draw(st.lists(st.integers(0, text.vocab_size + 2), max_size=24))
    skip = data.draw(st.booleans())
    pieces, stop = stream(text, ids, skip_special_tokens=skip)
    assert stop is None
    full = text.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) == full
    if name == "byte-level" or (
        name in ("llama", "gemma") and byte_runs_are_whole(text, [i for i in ids if not (skip and i in text._skipped)])
    ):
        assert full == text.tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.binary(max_size=5), max_size=12))
@settings(max_examples=200, deadline=None)
def test_bytes_cut_anywhere_decode_like_the_whole(parts):
    text = TEXTS["byte-level"]
    ids = [text.token_id(CHARACTER_OF_BYTE[b]) for part in parts for b in part]
    pieces, _ = stream(text, ids)
    assert "".join(pieces) == b"".join(parts).decode(errors="replace") == text.tokenizer.decode(ids)


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_piece_ends_inside_a_character(string):
    for name in ("byte-level", "llama", "gemma"):
        text = TEXTS[name]
        marks = CHARACTER_OF_BYTE if name == "byte-level" else [f"<0x{b:02X}>" for b in range(256)]
        ids = [text.token_id(marks[b]) for b in string.encode()]
        pieces, _ = stream(text, ids, prompt=[text.token_id("a")])
        assert "".join(pieces) == string
        assert not any("\ufffd" in p for p in pieces) or "\ufffd" in string


def test_a_character_comes_with_its_last_byte():
    for name in ("byte-level", "llama"):
        text = TEXTS[name]
        marks = CHARACTER_OF_BYTE if name == "byte-level" else [f"<0x{b:02X}>" for b in range(256)]
        ids = [text.token_id(marks[b]) for b in "👩".encode()]
        assert stream(text, ids)[0] == ["", "", "", "👩", ""]


def test_a_broken_character_is_shown_once_it_cannot_be_completed():
    text = TEXTS["llama"]
    ids = [text.token_id(t) for t in ("<0xE2>", "<0x82>", "▁is")]
    assert stream(text, ids)[0] == ["", "", "\ufffd\ufffd is", ""]
    assert stream(text, ids[:2])[0] == ["", "", "\ufffd\ufffd"]
    assert text.tokenizer.decode(ids[:2]) == "\ufffd\ufffd"


def test_partly_valid_byte_runs_keep_what_is_valid():
    text = TEXTS["llama"]
    ids = [text.token_id(t) for t in ("<0x0A>", "<0xE2>", "▁is")]
    assert text.decode(ids) == "\n\ufffd is"


@pytest.mark.parametrize(("name", "alone"), [("llama", "Paris is"), ("gemma", " Paris is")])
def test_leading_space(name, alone):
    """A decoder that strips does so at the start of a text, not where an answer continues a prompt."""
    text = TEXTS[name]
    ids = [text.token_id("▁Paris"), text.token_id("▁is")]
    assert "".join(stream(text, ids)[0]) == alone == text.tokenizer.decode(ids)
    assert "".join(stream(text, ids, prompt=[text.token_id("<s>")])[0]) == alone
    assert "".join(stream(text, ids, prompt=[text.token_id("<s>"), text.token_id("▁is")])[0]) == " Paris is"
    assert "".join(stream(text, ids, prompt=[text.token_id("<s>")], skip_special_tokens=False)[0]) == " Paris is"


def test_special_tokens_are_skipped_unless_wanted():
    text = TEXTS["byte-level"]
    ids = [text.token_id(t) for t in ("a", "<|end|>", "<tool 工具>", "<|é|>", "b")]
    assert "".join(stream(text, ids)[0]) == "a<tool 工具>b"
    assert "".join(stream(text, ids, skip_special_tokens=False)[0]) == text.tokenizer.decode(
        ids, skip_special_tokens=False
    )


def cut(full: str, stops, include: bool) -> tuple[str, str | None]:
    """The meaning of stop strings, character by character."""
    for end in range(1, len(full) + 1):
        hits = [s for s in stops if full[:end].endswith(s)]
        if hits:
            found = max(hits, key=len)
            return full[: end if include else end - len(found)], found
    return full, None


@given(data=st.data(), include=st.booleans())
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_they_are_complete_first(data, include):
    text = TEXTS["byte-level"]
    alphabet = [text.token_id(t) for t in ("a", "b", "c", "ab", "abc")] + [
        text.token_id(CHARACTER_OF_BYTE[b]) for b in "é".encode()
    ]
    ids = data.draw(st.lists(st.sampled_from(alphabet), max_size=30))
    stops = data.draw(st.lists(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=4))
    pieces, stop = stream(text, ids, stop=tuple(stops), include_stop=include)
    assert ("".join(pieces), stop) == cut(text.decode(ids), stops, include)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_text_shown_is_never_taken_back(data):
    """What could begin a stop string is withheld, and nothing more than that."""
    text = TEXTS["byte-level"]
    ids = data.draw(st.lists(st.sampled_from([text.token_id(t) for t in ("a", "b", "ab", "abc")]), max_size=20))
    stops = data.draw(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=3))
    detokenizer = text.detokenizer(Request("r", (), SamplingParams(stop=tuple(stops))))
    shown = ""
    for n, i in enumerate(ids, 1):
        piece, stop = detokenizer.feed(i)
        shown += piece
        if stop is not None:
            break
        so_far = text.decode(ids[:n])
        withheld = max((k for s in stops for k in range(len(s)) if so_far.endswith(s[:k])), default=0)
        assert shown == so_far[: len(so_far) - withheld]


def test_a_stop_string_over_many_tokens():
    text = TEXTS["byte-level"]
    ids = [text.token_id(t) for t in ("a", "<", "|", "END", "|", "b")]
    assert stream(text, ids, stop=("<|END|",)) == (["a", "", "", "", "", ""], "<|END|")
    assert "".join(stream(text, ids, stop=("<|END|",), include_stop=True)[0]) == "a<|END|"
    assert stream(text, ids, stop=("<|END>",)) == (["a", "", "", "", "<|END|", "b", ""], None)
    assert stream(text, ids[:3], stop=("<|END>",)) == (["a", "", "", "<|"], None)


def test_after_a_stop_string_there_is_no_more_text():
    text = TEXTS["byte-level"]
    detokenizer = text.detokenizer(Request("r", (), SamplingParams(stop=("ab",))))
    assert detokenizer.feed(text.token_id("abc")) == ("", "ab")
    assert detokenizer.feed(text.token_id("a")) == ("", "ab")
    assert detokenizer.flush() == ""


def test_stop_strings_before_min_tokens_are_text():
    text = TEXTS["byte-level"]
    ids = [text.token_id(t) for t in "abaabcab"]
    assert "".join(stream(text, ids, stop=("ab",), min_tokens=3)[0]) == "aba"
    assert "".join(stream(text, ids, stop=("ab",), min_tokens=2)[0]) == ""
    assert "".join(stream(text, ids, stop=("ab",), min_tokens=6)[0]) == "abaabc"


def test_long_repetitive_stop_strings_stay_cheap():
    """Each character of the text is looked at a bounded number of times, also where nearly all of it could begin the
    stop string.
    """
    text = TEXTS["byte-level"]
    stop = "a" * 20000 + "b"
    ids = [text.token_id("a")] * 30000
    pieces, _ = stream(text, ids, stop=(stop,))
    assert "".join(pieces) == "a" * 30000


def test_sequences_share_what_is_known_of_their_stop_strings():
    one, other = (TEXTS["byte-level"].detokenizer(Request("r", (), SamplingParams(n=2, stop=("abab",)))) for _ in "ab")
    assert one._stops[0]._fail is other._stops[0]._fail
    assert one._stops[0]._fail == (0, 0, 1, 2)


def test_logprob_names_of_tokens():
    text = TEXTS["byte-level"]
    half = text.token_id(CHARACTER_OF_BYTE[0xC3])
    assert (text.token_text(half), text.token_bytes(half)) == ("\ufffd", b"\xc3")
    assert text.token_text(text.token_id("<|end|>")) == "<|end|>"
    assert TEXTS["llama"].token_bytes(TEXTS["llama"].token_id("▁Paris")) == b" Paris"
    assert text.token_text(10**6) == "" == text.token_text(-1)


def test_encode_adds_special_tokens_only_when_asked():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", end)])
    tokenizer.enable_truncation(2)
    text = make_text(tokenizer)
    assert text.encode("héé", add_special_tokens=False) == text.encode("héé")[1:]
    assert text.encode("héé")[0] == end
    assert text.decode(text.encode("héé")) == "héé"


def test_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"surrogate pair .* at character 2"):
        TEXTS["byte-level"].encode("ab\ud83d")


def test_chat_without_a_template_is_a_plain_dialogue():
    text = TEXTS["byte-level"]
    assert text.render_chat([{"role": "user", "content": "ab"}]) == "User: ab\nAssistant:"
    assert text.decode(text.encode_chat([{"role": "user", "content": "ab"}])) == "User: ab\nAssistant:"


def test_chat_with_a_template_sees_the_special_tokens():
    text = make_text(byte_level(), "{{ messages[0].content }}{{ eos_token }}")
    ids = text.encode_chat([{"role": "user", "content": "ab"}])
    assert ids[-1] == text.token_id("<|end|>")


@pytest.mark.real_model
def test_the_real_tokenizer_streams_what_it_decodes(smollm2_text):
    sample = "Grüße, 世界! 👩‍👩‍👧‍👦 e\u0301 ﷽ \u200f{}\n\t  int main() { return 0x7F; }"
    ids = smollm2_text.encode(sample)
    pieces, _ = stream(smollm2_text, ids)
    assert "".join(pieces) == sample == smollm2_text.tokenizer.decode(ids)
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.real_model
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_real_tokenizer_on_random_tokens(smollm2_text, data):
    ids = data.draw(st.lists(st.integers(0, smollm2_text.vocab_size - 1), max_size=40))
    pieces, _ = stream(smollm2_text, ids, skip_special_tokens=False)
    assert "".join(pieces) == smollm2_text.tokenizer.decode(ids, skip_special_tokens=False)
