"""SentencePiece vocabularies (Llama 2, Mistral, Phi-3, Gemma) as a `tokenizers.Tokenizer`.

SentencePiece's BPE joins, again and again, the neighbours whose union scores best. The library's BPE works through a
ranked list of pairs: all pairs whose union is a piece, ranked by its score, give the same result.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tenfold.weights.checkpoint import CheckpointError

# Kinds of pieces; GGUF files use the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
MAX_MODEL_BYTES = 1 << 28
BPE_MODEL = 2  # TrainerSpec.ModelType


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary: texts, scores and kinds of equal length. add_prefix: a text starts as if after a space.
    strip_after: markers like <|end|> swallow white space that follows."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    add_prefix: bool = True
    strip_after: bool = False


def sentencepiece_tokenizer(pieces: Pieces) -> Tokenizer:
    """Byte fallback where the vocabulary has bytes; the caller sets the post-processor."""
    ids: dict[str, int] = {}
    for number, text in enumerate(pieces.texts):
        ids.setdefault(text, number)
    unknown = next((text for text, kind in zip(pieces.texts, pieces.kinds) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=ranked_pairs(pieces, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in pieces.kinds,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if pieces.add_prefix else spaces)
    chain: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if pieces.add_prefix else chain)
    add_markers(tokenizer, pieces)
    return tokenizer


def add_markers(tokenizer: Tokenizer, pieces: Pieces) -> None:
    special, user = [], []
    for text, kind in zip(pieces.texts, pieces.kinds):
        if kind in (CONTROL, UNKNOWN) and text:
            marker = pieces.strip_after and text.startswith("<|") and text != "<|endoftext|>"
            special.append(AddedToken(text, special=True, normalized=False, rstrip=marker))
        elif kind == USER_DEFINED and text:
            # Runs of spaces are user-defined pieces in Gemma: they are found after spaces became their sign.
            user.append(AddedToken(text, special=False, normalized=not pieces.add_prefix))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(user)


def surround(tokenizer: Tokenizer, ids: Mapping[str, int], bos: str | None, eos: str | None) -> None:
    """Put `bos` before and `eos` behind a text that is encoded with special tokens."""
    ends = [token for token in (bos, eos) if token]
    if not ends:
        return
    begin, end = ([bos] if bos else []), ([eos] if eos else [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *begin, "$B", *end],
        special_tokens=[(token, ids[token]) for token in dict.fromkeys(ends)],
    )


def ranked_pairs(pieces: Pieces, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All ways to make a normal piece of two pieces, best score first; of one piece, the longer left part first."""
    normal = [number for number, kind in enumerate(pieces.kinds) if kind == NORMAL and len(pieces.texts[number]) > 1]
    normal.sort(key=lambda number: -pieces.scores[number])
    pairs = []
    for number in normal:
        text = pieces.texts[number]
        for cut in range(len(text) - 1, 0, -1):
            if (left := text[:cut]) in ids and (right := text[cut:]) in ids:
                pairs.append((left, right))
    return pairs


def read_model(path: Path) -> Pieces:
    """The vocabulary of a tokenizer.model file. Raises CheckpointError when it is damaged or not of the BPE kind."""
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_MODEL_BYTES} bytes, which no vocabulary is; not read.")
        return parse_model(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, struct.error, IndexError) as error:
        raise CheckpointError(f"{path} is not a usable SentencePiece model ({error}); download it again.") from error


def parse_model(content: bytes) -> Pieces:
    """A ModelProto: field 1 pieces (1 text, 2 score, 3 kind), 2 trainer (3 model kind), 3 normaliser (3 add prefix)."""
    texts, scores, kinds = [], [], []
    model_kind, add_prefix = 1, True
    for number, value in proto_fields(content):
        if number == 1 and isinstance(value, bytes):
            fields = dict(proto_fields(value))
            texts.append(as_bytes(fields.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", as_bytes(fields.get(2, b"\0\0\0\0")))[0])
            kinds.append(as_int(fields.get(3, NORMAL)))
        elif number == 2 and isinstance(value, bytes):
            model_kind = as_int(dict(proto_fields(value)).get(3, 1))
        elif number == 3 and isinstance(value, bytes):
            add_prefix = bool(as_int(dict(proto_fields(value)).get(3, 1)))
    if model_kind != BPE_MODEL:
        raise ValueError("only the BPE kind is supported; use the tokenizer.json of this model")
    if not texts:
        raise ValueError("it holds no pieces")
    return Pieces(texts, scores, kinds, add_prefix)


def proto_fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: (number, integer or bytes). Raises ValueError past the end of the message."""
    position = 0
    while position < len(content):
        key, position = varint(content, position)
        kind = key & 7
        if kind == 0:
            value, position = varint(content, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = varint(content, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field has the unknown wire type {kind}")
        if size > len(content) - position:
            raise ValueError("a field reaches past the end")
        yield key >> 3, content[position : position + size]
        position += size


def varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number does not end")


def as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where text is needed")
    return value


def as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text stands where a number is needed")
    return value
