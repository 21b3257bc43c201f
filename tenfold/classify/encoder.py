"""Where a text encoder begins: anew, with that of a classifier, or with a BERT, whole or made small.

A BERT is made small by keeping its most frequent word pieces, the directions in which their vectors differ most
(principal components), and its first blocks; blocks are kept only where the width is, as they mean nothing in another.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.classify.pickled import refuse
from tenfold.models.sentiment.folder import CONFIG, DEFAULT, TOKENIZER, WEIGHTS, place, read_object, read_tensors
from tenfold.models.sentiment.prepare import check_size, open_tokenizer
from tenfold.models.sentiment.text import TextShape, from_bert

NEW = "new"
FRESH = TextShape(4096, 128, 2, 4, 512, positions=256)  # where nothing is begun with
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SOURCE_PREFIX = "text."  # of a classifier's tensors
VOCABULARY, SPELLING = "vocab.txt", "tokenizer_config.json"  # of a BERT without a tokenizer.json
PICKLED = "pytorch_model.bin"  # weights of an older one
ALLOWED = "allowed: 'new', 'default', or a folder of a classifier or of a Hugging Face BERT (model_type bert)"


@dataclass(frozen=True, slots=True)
class Size:
    """What is kept of a BERT, or what a new one has; None: as it is."""

    tokens: int | None = None
    width: int | None = None
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class Beginning:
    """state: of a `Bert`, as far as there is one. tokenizer: a `tokenizers.Tokenizer`. source: for people."""

    shape: TextShape
    tokenizer: Any
    state: Mapping[str, Tensor]
    source: str


def begin(source: str, size: Size, texts: Iterable[str]) -> Beginning:
    """source: "new", "default", a folder of a classifier, or one of a Hugging Face BERT. texts: whose words a new
    vocabulary has. Raises ValueError.
    """
    if source == NEW:
        return fresh(size, texts)
    path = place(DEFAULT) if source == DEFAULT else Path(source).expanduser()
    if not (path / CONFIG).is_file():
        raise ValueError(f"{source!r} is no text encoder: there is no {path / CONFIG}; {ALLOWED}.")
    told = read_object(path / CONFIG)
    kind = told.get("model_type")
    if kind == "bert":
        return of_bert(path, told, size)
    if kind != "tenfold_sentiment":
        raise ValueError(f"{source!r} has the model_type {kind!r}; {ALLOWED}.")
    if size != Size():
        raise ValueError("tokens, width and layers are for a new text encoder or a BERT; leave them out.")
    return of_classifier(path)


def fresh(size: Size, texts: Iterable[str]) -> Beginning:
    """A vocabulary of the most frequent words, and an encoder that knows nothing."""
    vocabulary = words_of(texts, size.tokens or FRESH.vocab)
    width = size.width or FRESH.width
    shape = replace(FRESH, vocab=len(vocabulary), width=width, inner=4 * width, layers=_or(size.layers, FRESH.layers))
    return Beginning(shape, word_pieces(vocabulary), {}, "new")


def of_classifier(path: Path) -> Beginning:
    from tenfold.models.sentiment.config import SentimentConfig

    config = SentimentConfig.from_json(read_object(path / CONFIG))
    tensors = read_tensors(path / WEIGHTS)
    state = {n.removeprefix(SOURCE_PREFIX): t.float() for n, t in tensors.items() if n.startswith(SOURCE_PREFIX)}
    return Beginning(config.text, open_tokenizer(path / TOKENIZER, config.text.vocab), state, "classifier")


def of_bert(path: Path, told: Mapping[str, Any], size: Size) -> Beginning:
    shape = TextShape.of_bert(told)
    if not (path / WEIGHTS).is_file() and (path / PICKLED).is_file():
        refuse(path / PICKLED, path / WEIGHTS)
    state = from_bert(read_tensors(path / WEIGHTS))
    tokenizer = tokenizer_of(path, shape.vocab)
    made = f"bert of {shape.layers} layers, {shape.width} wide"
    if size.tokens is not None and size.tokens < shape.vocab:
        tokenizer, kept = fewer(tokenizer, size.tokens)
        state["words.weight"] = state["words.weight"][kept]
        shape = replace(shape, vocab=len(kept))
    layers = min(_or(size.layers, shape.layers), shape.layers)
    if size.width is not None and size.width != shape.width:
        shape, state = narrower(shape, state, size.width)
        layers = _or(size.layers, FRESH.layers)
    state = {name: t for name, t in state.items() if not _is_beyond(name, layers)}
    return Beginning(replace(shape, layers=layers), tokenizer, state, made)


def fewer(tokenizer: Any, count: int) -> tuple[Any, Tensor]:
    """A tokenizer with about `count` of the word pieces, and their old numbers [tokens]. A BERT's vocabulary is ordered
    by how frequent pieces are; every single character stays, so that any word can still be spelled.
    """
    told = json.loads(tokenizer.to_str())
    by_number = sorted(told["model"]["vocab"].items(), key=lambda item: item[1])
    must = [p for p, _ in by_number if p in SPECIAL or len(p.removeprefix("##")) == 1]
    rest = [p for p, _ in by_number if p not in set(must) and not p.startswith("[unused")]
    kept = set(must) | set(rest[: max(0, count - len(must))])
    pieces = [*SPECIAL, *(p for p, _ in by_number if p in kept and p not in SPECIAL)]
    numbers = torch.tensor([told["model"]["vocab"][piece] for piece in pieces])
    return word_pieces(pieces, (told["normalizer"] or {}).get("lowercase", True)), numbers


def narrower(shape: TextShape, state: Mapping[str, Tensor], width: int) -> tuple[TextShape, dict[str, Tensor]]:
    """Word vectors and positions in the `width` directions in which words differ most. Blocks are left behind."""
    words = state["words.weight"].double()
    centred = words - words.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    turn = axes[:, -width:].flip(1)  # the largest come last
    turn = turn * _signs(turn)
    vectors = centred @ turn
    scale = 0.5 / vectors.square().mean().sqrt()  # a spread that the norm behind it can learn with
    made = {
        "words.weight": (vectors * scale).float(),
        "places.weight": (state["places.weight"].double() @ turn * scale).float(),
    }
    heads = max(1, width // 32)
    return replace(shape, width=width, heads=heads, inner=4 * width), made


def _signs(axes: Tensor) -> Tensor:
    """Of each column's largest entry, so that the same axes come out on every machine."""
    return axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def words_of(texts: Iterable[str], count: int) -> list[str]:
    """Special tokens, every character at a word's start and inside, then the most frequent words."""
    from tokenizers import normalizers, pre_tokenizers

    normal, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    found: Counter[str] = Counter()
    for text in texts:
        found.update(word for word, _ in split.pre_tokenize_str(normal.normalize_str(text)))
    letters = sorted({letter for word in found for letter in word})
    must = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((word for word in found if len(word) > 1), key=lambda word: (-found[word], word))
    return [*must, *words[: max(0, count - len(must))]]


def tokenizer_of(path: Path, tokens: int) -> Any:
    """That of a BERT's folder: tokenizer.json, else vocab.txt, a word piece a line, spelled as tokenizer_config.json
    says. tokens: that the encoder knows. Raises ValueError.
    """
    if (path / TOKENIZER).is_file():
        return open_tokenizer(path / TOKENIZER, tokens)
    pieces = path / VOCABULARY
    if not pieces.is_file():
        raise ValueError(f"{path} has neither {TOKENIZER} nor {VOCABULARY}; put there the one that belongs to it.")
    told = read_object(path / SPELLING) if (path / SPELLING).is_file() else {}
    made = word_pieces(_lines(pieces), lowercase=told.get("do_lower_case") is not False)
    check_size(pieces, made, tokens)
    return made


def _lines(path: Path) -> list[str]:
    """Of a vocab.txt. Raises ValueError."""
    try:
        found = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # no other character ends a line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None
    if lacking := [piece for piece in SPECIAL if piece not in found]:
        raise ValueError(f"{path} is no vocabulary of a BERT: it lacks {', '.join(lacking)}.")
    return found


def word_pieces(vocabulary: list[str], lowercase: bool = True) -> Any:
    """A WordPiece tokenizer with BERT's ends. lowercase: and without accents."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(end, vocabulary.index(end)) for end in ("[SEP]", "[CLS]")]
    made.post_processor = processors.BertProcessing(*ends)
    return made


def _is_beyond(name: str, layers: int) -> bool:
    return name.startswith("blocks.") and int(name.split(".")[1]) >= layers


def _or(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given
