"""Tokenizers built from vocabularies: the same ids as the libraries they come from, on varied text."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tenfold.weights import tokenizer_gguf
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.gguf import GGUFFile
from tenfold.weights.sentencepiece import parse_model, read_model, sentencepiece_tokenizer
from tenfold.weights.tokenizer_gguf import build_tokenizer
from tests.weights.gguf_files import tokenizer_metadata

PATH = Path("m.gguf")
TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024; we've 1234567 things.",
    "  leading, trailing  \n\n\n and\ttabs \r\n",
    "def f(x):\n    return x**2  # squared\n\n\nclass A:\n\tpass\n",
    "naïve café, Straße, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "日本語のテキストと中文混排,한국어도",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 zero\u200bwidth e\u0301 \u2028 line",
    "CamelCaseWords HTTPServer2 snake_case don't DON'T I'LL",
    "<tag attr='1'>&amp;</tag> {\"k\": [1, 2.5e-3, null]} \\n $x^2$ ///",
    "\x00\x01\x7f odd bytes",
]


def test_byte_level_vocabulary_equals_the_tokenizer_it_came_from(tiny):
    folder = tiny("llama")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = build_tokenizer(PATH, tokenizer_metadata(folder))
    for text in [*TEXTS, "and the land <s> then</s>"]:
        for special in (True, False):
            assert (
                ours.encode(text, add_special_tokens=special).ids == theirs.encode(text, add_special_tokens=special).ids
            )
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Tokenizer:
    return build_tokenizer(smollm2, GGUFFile(smollm2).metadata)


@pytest.mark.real_model
@pytest.mark.parametrize("text", TEXTS)
def test_real_vocabulary_gives_every_text_back(real, text):
    assert real.decode(real.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


# The vocabulary has no tokens for the bytes of these control characters and of planes without any character.
KNOWN = st.characters(max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", exclude_categories=["Cs"])


@pytest.mark.real_model
@settings(max_examples=200, deadline=None)
@given(text=st.text(KNOWN, max_size=40))
def test_real_vocabulary_gives_any_text_back(real, text):
    assert real.decode(real.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.real_model
def test_real_markers_are_single_tokens_and_hidden_when_asked(real):
    ids = real.encode("<|im_start|>user\nhi<|im_end|>\n", add_special_tokens=False).ids
    assert ids == [1, 4093, 198, 6004, 2, 198]
    assert real.decode(ids, skip_special_tokens=True) == "user\nhi\n"
    assert real.encode("12", add_special_tokens=True).ids == [33, 34]  # digits apart, no begin token


@pytest.mark.real_model
def test_real_vocabulary_equals_what_llama_cpp_makes_of_it(real, smollm2):
    """An independent tokenizer of the same file. It drops NUL, so that text is left out."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    for text in TEXTS:
        if text and "\x00" not in text:
            assert real.encode(text, add_special_tokens=False).ids == model.tokenize(text.encode(), add_bos=False), text


# How named splits cut a text: what each was made to do differently.
WORDS = {
    "gpt-2": ["x", " =", " 12345", ";", " don", "'t", " DON", "'", "T", "  ", " a", "\n\n", " b"],
    "smollm": ["x", " =", " ", *"12345", ";", " don", "'t", " DON", "'", "T", "  ", " a", "\n\n", " b"],
    "llama-bpe": ["x", " =", " ", "123", "45", ";", " don", "'t", " DON", "'T", "  ", " a", "\n\n", " b"],
    "qwen2": ["x", " =", " ", *"12345", ";", " don", "'t", " DON", "'T", "  ", " a", "\n\n", " b"],
    "gpt-4o": ["x", " =", " ", "123", "45", ";", " don't", " DON'T", "  ", " a", "\n\n", " b"],
    "tekken": ["x", " =", " ", *"12345", ";", " don", "'t", " DON", "'T", "  ", " a", "\n\n", " b"],
    "deepseek-llm": ["x", " =", " ", *"12345", ";", " don", "'", "t", " DON", "'", "T", "  ", " a", *"\n\n", " b"],
    "deepseek-coder": ["x", " = ", *"12345", ";", " don", "'", "t", " DON", "'", "T", "  ", " a", *"\n\n", " b"],
    "deepseek-v3": ["x", " =", " ", "123", "45", ";", " don", "'t", " DON", "'T", "  ", " a", "\n\n", " b"],
}


@pytest.mark.parametrize("name", WORDS)
def test_named_splits(name):
    text = "x = 12345; don't DON'T   a\n\n b"
    cuts = tokenizer_gguf.splitter(tokenizer_gguf.SPLITS[name]).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cuts] == WORDS[name]


ALPHABETS = {  # each expression cuts what those before it have left, words too
    "deepseek-llm": ["na", "ï", "ve", " Ωμέγα", " слово", " ", "აბ", " ֆՙֈ 𝐀𝐁 ", "漢字かな", " ", "한글", "。"],
    "deepseek-coder": ["naïve", " Ωμέγα", " слово", " ", "აბ", " ֆՙֈ", " 𝐀𝐁", " ", "漢字かな", " ", "한글", "。"],
    "deepseek-v3": ["naïve", " Ωμέγα", " слово", " აბ", " ֆՙֈ", " 𝐀𝐁", " ", "漢字かな", " 한글", "。"],
}


@pytest.mark.parametrize("name", ALPHABETS)
def test_alphabets_of_deepseek(name):
    text = "".join(ALPHABETS[name])
    cuts = tokenizer_gguf.splitter(tokenizer_gguf.SPLITS[name]).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cuts] == ALPHABETS[name]
    code = "x=a.b\r\n/path 2024 "
    cuts = tokenizer_gguf.splitter(tokenizer_gguf.SPLITS[name]).pre_tokenize_str(code)
    words = [code[start:end] for _, (start, end) in cuts]
    newest = ["x", "=a", ".b", "\r\n", "/path", " ", "202", "4", " "]
    assert words == (newest if name == "deepseek-v3" else ["x", "=", *"a.b\r\n", "/", "path", " ", *"2024", " "])


def test_flags_decide_about_begin_and_end_tokens(tiny):
    metadata = tokenizer_metadata(tiny("llama"))
    silent = {key: value for key, value in metadata.items() if not key.endswith("add_bos_token")}
    assert build_tokenizer(PATH, silent).encode("a").ids == build_tokenizer(PATH, metadata).encode("a").ids[1:]
    llama3 = build_tokenizer(PATH, {**silent, "tokenizer.ggml.pre": "llama-bpe"})
    assert llama3.encode("a").ids[0] == 1
    both = build_tokenizer(PATH, {**metadata, "tokenizer.ggml.add_eos_token": True})
    ids = both.encode("a").ids
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert both.encode("a", add_special_tokens=False).ids == ids[1:-1]


BROKEN: dict[str, tuple[Any, str]] = {
    "tokenizer.ggml.model": ("rwkv", "'rwkv', known are gpt2 and llama"),
    "tokenizer.ggml.pre": ("unheard-of", "'unheard-of', known are"),
    "tokenizer.ggml.tokens": (7, "not a list of strings"),
    "tokenizer.ggml.token_type": ([1, 1, 1], "one number for each of 320"),
    "tokenizer.ggml.merges": (["a b c"], "merges are broken"),
    "tokenizer.ggml.bos_token_id": (320, "not one of its 320 tokens"),
    "tokenizer.ggml.add_bos_token": (1, "not true or false"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_broken_vocabularies_get_a_sentence(tiny, key):
    value, message = BROKEN[key]
    with pytest.raises(CheckpointError, match=rf"m\.gguf: its tokenizer cannot be used.*{message}"):
        build_tokenizer(PATH, {**tokenizer_metadata(tiny("llama")), key: value})


def test_merges_of_tokens_that_do_not_exist_get_a_sentence(tiny):
    metadata = tokenizer_metadata(tiny("llama"))
    with pytest.raises(CheckpointError, match="merges are broken"):
        build_tokenizer(PATH, {**metadata, "tokenizer.ggml.merges": ["zebra crossing"]})


CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps",
    "there is nothing in this text that is not there in other texts, or so they said",
    "def function(argument): return argument + 1 if argument else 0",
    "größere Wörter über Straßen und Plätze, naïve café",
    "1234567890 numbers 2024 and 1999 and 3.14159",
    "これは日本語のテキストです。日本語は難しい。",
]


def train(**options: Any) -> bytes:
    """A SentencePiece BPE model with byte fallback and no normalisation, as Llama, Mistral and Gemma have them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["prefix", "plain"])
def trained(request: pytest.FixtureRequest) -> bytes:
    """With a space before the text (Llama 2), and without but with user-defined runs of spaces (Gemma)."""
    if request.param == "prefix":
        return train(allow_whitespace_only_pieces=True)
    runs = ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "<table>"]
    return train(add_dummy_prefix=False, user_defined_symbols=runs, control_symbols=["<end_of_turn>"])


SIMPLE = st.text(alphabet="the quickdog  ,.ü日本語1234\n\t🙂", max_size=40)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=SIMPLE)
def test_sentencepiece_vocabularies_equal_sentencepiece(trained, text):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained)
    ours = sentencepiece_tokenizer(parse_model(trained))
    ids = theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False).ids == ids
    assert ours.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_vocabularies_give_texts_back(trained, text):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained)
    ours = sentencepiece_tokenizer(parse_model(trained))
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def spm_metadata(model: bytes, **more: Any) -> dict[str, Any]:
    pieces = parse_model(model)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces.texts,
        "tokenizer.ggml.scores": pieces.scores,
        "tokenizer.ggml.token_type": pieces.kinds,
        "tokenizer.ggml.add_space_prefix": pieces.add_prefix,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def test_a_gguf_vocabulary_equals_its_tokenizer_model(trained):
    theirs = sentencepiece_tokenizer(parse_model(trained))
    ours = build_tokenizer(PATH, spm_metadata(trained))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).ids == [1, *ids]


def test_markers_are_found_before_spaces_are_written_as_signs():
    ours = build_tokenizer(PATH, spm_metadata(train(control_symbols=["<|user|>", "<|end|>"])))
    assert [ours.id_to_token(i) for i in ours.encode("<|user|>the<|end|>", add_special_tokens=False).ids] == [
        "<|user|>",
        "▁the",
        "<|end|>",
    ]
    phi3 = spm_metadata(train(control_symbols=["<|user|>", "<|end|>"]), **{"general.architecture": "phi3"})
    ids = build_tokenizer(PATH, phi3).encode("<|user|>\nthe<|end|>\n", add_special_tokens=False).ids
    assert [ours.id_to_token(i) for i in ids] == ["<|user|>", "▁the", "<|end|>"]


def test_model_files_that_are_damaged_or_of_another_kind_get_a_sentence(tmp_path):
    unigram = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=unigram, vocab_size=90, minloglevel=2, hard_vocab_limit=False
    )
    path = tmp_path / "tokenizer.model"
    for content, message in (
        (unigram.getvalue(), "only the BPE kind"),
        (b"", "only the BPE kind"),
        (b"\x0a\xff\xff\xff\xff\x0f", "past the end"),
        (b"\xff" * 20, "does not end"),
        (b"\x0b", "wire type 3"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"tokenizer\.model.*{message}"):
            read_model(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_model_files_never_raise_anything_else(tmp_path, trained, data):
    content = bytearray(trained[:600])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content + trained[600:] if data.draw(st.booleans()) else content)
    try:
        pieces = read_model(path)
    except CheckpointError:
        return
    sentencepiece_tokenizer(pieces)
