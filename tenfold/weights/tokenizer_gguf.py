"""A `tokenizers.Tokenizer` from the vocabulary inside a GGUF file.

Two kinds are in use: "gpt2", byte-level BPE with merges, whose way to split text into words hides behind a name
(`SPLITS`), and "llama", a SentencePiece vocabulary. The result tokenises as the model's own tokenizer.json does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    sentencepiece_tokenizer,
    surround,
)

# Parts of the expressions that split text before merges apply; all are alternatives tried in this order.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
PUNCTUATION_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Words that start a new one at a capital letter: "camelCase" is two.
LOWER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"


@dataclass(frozen=True, slots=True)
class Split:
    """How byte-level BPE splits text. regexes: that cut it, each what those before have left, none for GPT-2's own
    expression; digits: each by itself before that; nfc: compose characters first; whole_words: a word that is a token
    needs no merges; add_bos: what a silent file means."""

    regexes: tuple[str, ...] = ()
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


GPT2 = Split()
DIGITS_GPT2 = Split(digits=True)
GPT4_REGEX = "|".join((CONTRACTION, WORD, r"\p{N}{1,3}", PUNCTUATION, BLANK))
LLAMA3 = Split((GPT4_REGEX,), whole_words=True, add_bos=True)
GPT4 = Split((GPT4_REGEX,))
QWEN2 = Split(("|".join((CONTRACTION, WORD, r"\p{N}", PUNCTUATION, BLANK)),), nfc=True)
CASED = LOWER_WORD + CONTRACTION + "?", UPPER_WORD + CONTRACTION + "?"
GPT4O = Split(("|".join((*CASED, r"\p{N}{1,3}", PUNCTUATION_SLASH, BLANK)),))
TEKKEN = Split(
    ("|".join((LOWER_WORD, UPPER_WORD, r"\p{N}", PUNCTUATION_SLASH, BLANK)),), whole_words=True, add_bos=True
)
# DeepSeek's: letters with cases, but for some blocks, which are cut into characters; and three alphabets by ranges.
LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c6}-\x{10ff}\x{1c80}-\x{1c8f}\x{2d00}-\x{2d2f}\x{a78f}-\x{ab6f}"
    r"\x{10570}-\x{105bf}\x{10d50}-\x{10d8f}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7ff}\x{1df00}-\x{1dfff}]]"
)
MARKS = r"[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]"
HAN = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
DEEPSEEK = Split((r"[\r\n]", rf"\s?{LETTERS}+", rf"\s?{MARKS}+", r"\s+$", HAN, r"\p{N}"))
DEEPSEEK_CODER = Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"))
DEEPSEEK3 = Split(
    (
        r"\p{N}{1,3}",
        r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+",
        "|".join(
            (
                r"[!-/:-@\[-`{-~][A-Za-z]+",
                r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
                r" ?[\p{P}\p{S}]+[\r\n]*",
                BLANK,
            )
        ),
    )
)

# `tokenizer.ggml.pre` to the split it means.
SPLITS = {
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "mpt": GPT2,
    "olmo": GPT2,
    "smollm": DIGITS_GPT2,
    "starcoder": DIGITS_GPT2,
    "codeshell": DIGITS_GPT2,
    "refact": DIGITS_GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "falcon3": LLAMA3,
    "dbrx": GPT4,
    "smaug-bpe": GPT4,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "deepseek-llm": DEEPSEEK,
    "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-v3": DEEPSEEK3,
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
}
# What files without a name, or with the name "default", mean.
DEFAULTS = {"qwen2": QWEN2, "qwen3": QWEN2}

# Control tokens that end an answer, whatever the file calls its end-of-sequence token.
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<|end_of_turn|>", "<|eot|>", "</s>"),
)


class Vocabulary:
    """The tokenizer part of a GGUF file's metadata, checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.tokens = self.strings("tokens")
        self.types = self.numbers("token_type", NORMAL)
        self.ids = token_ids(self.tokens)

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its tokenizer cannot be used: {problem}; use the model's Hugging Face folder."
        )

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise self.fail(f"tokenizer.ggml.{name} is not a list of strings")
        return value

    def numbers(self, name: str, default: float) -> list[Any]:
        """One number for each token."""
        value = self.get(name)
        if value is None:
            return [default] * len(self.tokens)
        kinds = (int, float) if isinstance(default, float) else int
        right = isinstance(value, list) and len(value) == len(self.tokens)
        if not right or not all(isinstance(number, kinds) for number in value):
            raise self.fail(f"tokenizer.ggml.{name} does not hold one number for each of {len(self.tokens)} tokens")
        return list(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"tokenizer.ggml.{name} is not true or false")
        return value

    def token(self, name: str) -> str | None:
        """The token whose id tokenizer.ggml.<name>_token_id holds."""
        number = self.get(f"{name}_token_id")
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise self.fail(f"tokenizer.ggml.{name}_token_id is not one of its {len(self.tokens)} tokens")
        return self.tokens[number]

    def of_type(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types and token]


def token_ids(tokens: list[str]) -> dict[str, int]:
    """Tokens to ids; a token that stands twice keeps its first."""
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        ids = {tokens[number]: number for number in range(len(tokens) - 1, -1, -1)}
    return ids


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises CheckpointError for unknown kinds and damaged vocabularies."""
    vocabulary = Vocabulary(path, metadata)
    kind = vocabulary.get("model")
    if kind == "gpt2":
        return byte_level(vocabulary)
    if kind == "llama":
        return sentencepiece(vocabulary)
    raise vocabulary.fail(f"it is of the kind {str(kind)[:40]!r}, known are gpt2 and llama")


def byte_level(vocabulary: Vocabulary) -> Tokenizer:
    split = split_of(vocabulary)
    try:
        merges = [merge_pair(merge) for merge in vocabulary.strings("merges")]
        model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=split.whole_words)
    except Exception as error:  # the library raises bare Exception for merges of unknown tokens
        raise vocabulary.fail(f"its merges are broken ({str(error)[:80]})") from error
    tokenizer = Tokenizer(model)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(split)
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, vocabulary)
    add_ends(tokenizer, vocabulary, split.add_bos)
    return tokenizer


def merge_pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def split_of(vocabulary: Vocabulary) -> Split:
    name = vocabulary.get("pre", "default")
    if name == "default":
        return DEFAULTS.get(str(vocabulary.metadata.get("general.architecture")), GPT2)
    if not isinstance(name, str) or name not in SPLITS:
        raise vocabulary.fail(f"how it splits text is called {str(name)[:40]!r}, known are {', '.join(sorted(SPLITS))}")
    return SPLITS[name]


def splitter(split: Split) -> pre_tokenizers.PreTokenizer:
    if split.regexes:
        words = [pre_tokenizers.Split(Regex(regex), behavior="isolated", invert=False) for regex in split.regexes]
        return pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]) if split.digits else gpt2


def add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens are special (can be left out of decoded text); user-defined ones are text that is never split."""
    control = vocabulary.of_type(CONTROL, UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    user = vocabulary.of_type(USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in user])


def add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
    """The post-processor that puts the file's begin and end tokens around a text when special tokens are asked for."""
    bos = vocabulary.token("bos") if vocabulary.flag("add_bos_token", add_bos) else None
    eos = vocabulary.token("eos") if vocabulary.flag("add_eos_token", False) else None
    surround(tokenizer, vocabulary.ids, bos, eos)


def sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    pieces = Pieces(
        vocabulary.tokens,
        vocabulary.numbers("scores", 0.0),
        vocabulary.types,
        add_prefix=vocabulary.flag("add_space_prefix", True),
        # Phi-3's markers swallow the line break that its chat template writes after them.
        strip_after=vocabulary.metadata.get("general.architecture") == "phi3",
    )
    tokenizer = sentencepiece_tokenizer(pieces)
    add_ends(tokenizer, vocabulary, True)
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, pad_token and unk_token, as far as the file names them."""
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    tokens = metadata.get("tokenizer.ggml.tokens")
    found = {}
    for key, name in names.items():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens):
            found[key] = tokens[number]
    return {key: token for key, token in found.items() if isinstance(token, str)}


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: those the file names, and control tokens known to end a turn."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        return ()
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = {number for number in named if isinstance(number, int) and 0 <= number < len(tokens)}
    if isinstance(types, list) and len(types) == len(tokens):
        control = (number for number, kind in enumerate(types) if kind == CONTROL)
        ends |= {number for number in control if tokens[number] in END_OF_TURN}
    return tuple(sorted(ends))
