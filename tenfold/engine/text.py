"""Text: prompts become token ids, token ids become text while they arrive.

Invariant: however an answer is cut into tokens, the pieces `Detokenizer.feed` and `flush` return join to what
`Text.decode` gives for all of its tokens at once, up to the stop string; no piece ever ends inside a character.

Speed: pieces are turned into bytes by a table, not by decoding a window of tokens, so a token costs about a microsecond
whatever the length of the context.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import PurePath
from typing import Any, Protocol

from tokenizers import Tokenizer

from tenfold.base.table import entry
from tenfold.engine import defaults, template
from tenfold.engine.request import Pictured, Request
from tenfold.models.picture import Picture
from tenfold.models.table import make_processor
from tenfold.weights.checkpoint import Checkpoint

# With Pillow, which few need.
PICTURES = {"open": "tenfold.base.pictures:open_picture", "blank": "tenfold.models.prepare:blank"}
PATHS = (str, PurePath)  # a stranger's text must open no file
MOST_SEEN = 192 << 20  # bytes of pixels in one prompt, which go to the engine in one message
REPLACEMENT = "\ufffd"
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space


def _replace_bytewise(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each undecodable byte, as byte-fallback decoders give; "replace" gives one for several."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("tenfold-bytewise", _replace_bytewise)
_utf8 = codecs.getincrementaldecoder("utf-8")


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

# What a token says: bytes, perhaps part of a character, or whole text, which ends any unfinished character before it.
Piece = bytes | str


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[c] for c in token])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


def _sentencepiece_piece(token: str) -> Piece:
    if BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE_MARK, " ")


class Stream(Protocol):
    """Tokens in, whole characters out. `end` gives what is left of an unfinished character."""

    def feed(self, token: int) -> str: ...

    def end(self) -> str: ...


class Text:
    """The tokenizer of a checkpoint, and its chat template. Safe to use from several threads.

    special: names such as "bos_token" to strings. eos_ids: tokens that end an answer. template: the Jinja source of
    chats, or None. recommended: sampling parameters the model comes with. processor: what prepares pictures, None where
    the model sees none.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Tokenizer = checkpoint.tokenizer()
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.special = dict(checkpoint.special)
        self.eos_ids = tuple(checkpoint.eos_ids)
        self.template = checkpoint.chat_template
        self.recommended = defaults.recommended(checkpoint.path)
        self.processor = make_processor(checkpoint)
        self.vocab_size: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self._skipped = frozenset(i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special)
        self._pieces: dict[int, Piece] = {}
        self._read_decoder()

    def _read_decoder(self) -> None:
        """Which table the tokenizer's decoder amounts to; with None, windows of tokens go through the decoder."""
        self._make_piece: Callable[[str], Piece] | None = None
        self._errors = "replace"
        self._strip = 0  # spaces taken off the start of a text
        decoder = self.tokenizer.decoder
        steps: list[dict[str, Any]] = [json.loads(decoder.__getstate__())] if decoder is not None else []
        if steps and steps[0]["type"] == "Sequence":
            steps = steps[0]["decoders"]
        kinds = [s["type"] for s in steps]
        if kinds == ["ByteLevel"]:
            self._make_piece = _byte_level_piece
        elif kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == _REPLACE_SPACE_MARK:
            rest = steps[3:]
            if rest and not (
                len(rest) == 1 and rest[0]["type"] == "Strip" and rest[0]["content"] == " " and rest[0]["stop"] == 0
            ):
                return
            self._make_piece = _sentencepiece_piece
            self._errors = "tenfold-bytewise"
            self._strip = rest[0]["start"] if rest else 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens` also those the model expects around every text, such as a
        begin token.

        Raises ValueError for a text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text has half of a surrogate pair ({text[error.start]!a}) at character {error.start}; "
                "send valid Unicode, characters beyond U+FFFF whole."
            ) from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens. Ids the tokenizer does not know give nothing; bytes that are not UTF-8 give U+FFFD.

        This is what the tokenizer's own decoder gives, except in a run of byte-fallback tokens of which only some are
        valid: that gives U+FFFD for the invalid ones, where the decoder would throw all of the run away.
        """
        stream = self._stream(skip_special_tokens, self._strip)
        return "".join([stream.feed(i) for i in ids]) + stream.end()

    def detokenizer(self, request: Request) -> "Detokenizer":
        """For one sequence of a request. A leading space is text wherever visible prompt tokens stand before it."""
        params = request.params
        # A grammar speaks of every character; without one, a text does not begin with the space of its first word.
        inside = params.grammar is not None or any(
            not (params.skip_special_tokens and i in self._skipped) for i in request.prompt
        )
        stream = self._stream(params.skip_special_tokens, 0 if inside else self._strip, params.grammar is not None)
        return Detokenizer(stream, params.stop, params.include_stop, params.min_tokens)

    def token_text(self, token: int) -> str:
        """What one token says, for lists of log-probabilities; U+FFFD where it is a part of a character."""
        piece = self._piece(token)
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, in UTF-8; those of a text's tokens join to the text's bytes."""
        piece = self._piece(token)
        return piece.encode() if isinstance(piece, str) else piece

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text, such as an end token."""
        return self._skipped

    def certain_bytes(self, token: int) -> bytes:
        """As `token_bytes`, but b"" for a token whose text depends on those around it, or is only part of a character
        in a way that this decoder does not tell.
        """
        if self._make_piece is not None:
            return self.token_bytes(token)
        if not self._known(token):
            return b""
        before = self._before
        text = self.tokenizer.decode([*before, token], skip_special_tokens=False)
        start = self.tokenizer.decode(before, skip_special_tokens=False)
        text = text[len(start) :] if text.startswith(start) else REPLACEMENT
        return b"" if REPLACEMENT in text else text.encode()

    @cached_property
    def _before(self) -> list[int]:
        """Some text, for tokens to stand after."""
        return self.encode("a", add_special_tokens=False)

    def token_id(self, content: str) -> int | None:
        """The id of a token by its exact content, such as "<|im_end|>"."""
        found: int | None = self.tokenizer.token_to_id(content)
        return found

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> str:
        """The prompt of a conversation. `settings` are those of `template.apply`. Raises TemplateError."""
        source = self.template or self._default_template()
        if self.processor is not None:
            settings = {"reads": self._reads, "mark": self.processor.placeholder, **settings}
        return template.apply(source, messages, tools=tools, special=self.special, **settings)

    def encode_pictured(
        self, text: str, pictures: Sequence[Any], add_special_tokens: bool = True, limits: Any = None
    ) -> Pictured:
        """Token ids of a text in which the model's mark stands for each of the pictures: bytes of files, or pictures
        that are open. limits: `PictureLimits` other than the usual. Raises ValueError where they do not match, and
        PictureError for a picture that cannot be used.
        """
        if self.processor is None:
            if pictures:
                raise ValueError(f"There are {len(pictures)} pictures, and this model reads text only.")
            return Pictured(tuple(self.encode(text, add_special_tokens)))
        parts = text.split(self.processor.placeholder)
        if len(parts) - 1 != len(pictures):
            raise ValueError(
                f"The prompt has the mark {self.processor.placeholder} {len(parts) - 1} times, and there are "
                f"{len(pictures)} pictures; it must stand once for each, and nowhere else."
            )
        if any(isinstance(picture, PATHS) for picture in pictures):
            raise ValueError("A picture is a path; give its bytes, or a picture that is open.")
        open_picture = entry(PICTURES, "open", "part")
        prepared, size = [], 0
        opened = (open_picture(picture, *([limits] if limits else [])) for picture in pictures)
        for picture in self.processor.prepare(opened, len(pictures) == 1):
            prepared.append(picture)
            size += len(picture.pixels)
            if size > MOST_SEEN:
                raise ValueError(
                    f"The pictures have more than {MOST_SEEN} bytes as the model sees them, which is the most allowed "
                    "together; send fewer or smaller ones."
                )
        written = [*map(self.processor.written, prepared), ""]
        whole = "".join(part + own for part, own in zip(parts, written))
        return Pictured(tuple(self.encode(whole, add_special_tokens)), tuple(prepared))

    def sample_pictures(self) -> list[Picture]:
        """A small picture, prepared; none where the model sees none."""
        return self.processor.prepare([entry(PICTURES, "blank", "part")()], True) if self.processor is not None else []

    def encode_chat_pictured(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        limits: Any = None,
        **settings: Any,
    ) -> Pictured:
        """As `encode_chat`, of a conversation in which there may be pictures: parts of content of type "image", with
        the bytes of a file, or a picture that is open, as "image".
        """
        pictures: list[Any] | None = [] if self.processor is not None else None
        text = self.render_chat(messages, tools=tools, pictures=pictures, **settings)
        return self.encode_pictured(text, pictures or (), self.template is None, limits)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> list[int]:
        """Token ids of a conversation. A checkpoint's template writes the special tokens, so none are added."""
        return self.encode(
            self.render_chat(messages, tools=tools, **settings), add_special_tokens=self.template is None
        )

    @cached_property
    def _reads(self) -> str:
        """Of what kind the content of messages must be, where there may be pictures."""
        assert self.processor is not None
        source = self.template or self._default_template()
        return template.reads_of(source, self.special, self.processor.placeholder)

    @property
    def chat_stop(self) -> tuple[str, ...]:
        """Stop strings that answers in a chat need: none where the template ends them with a token."""
        plain = self.template is None and self._default_template() == template.PLAIN
        return template.PLAIN_STOP if plain else ()

    def _default_template(self) -> str:
        return template.default(self.token_id("<|im_start|>") is not None)

    def _piece(self, token: int) -> Piece:
        piece = self._pieces.get(token)
        if piece is None:
            content = self.tokenizer.id_to_token(token) if token >= 0 else None
            make = self._make_piece or _sentencepiece_piece
            piece = self._pieces[token] = make(content) if content is not None else b""
        return piece

    def _stream(self, skip_special_tokens: bool, strip: int, inside: bool = False) -> Stream:
        """inside: whether a text goes on before the first token, where that is not said by `strip`."""
        skipped = self._skipped if skip_special_tokens else frozenset()
        if self._make_piece is None:
            before = self._before if inside else []
            return _WindowStream(
                lambda ids: self.tokenizer.decode(ids, skip_special_tokens=False), self._known, skipped, before
            )
        return _PieceStream(self._piece, skipped, self._errors, strip)

    def _known(self, token: int) -> bool:
        return self.tokenizer.id_to_token(token) is not None


_REPLACE_SPACE_MARK = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}


class _PieceStream:
    """Joins the pieces of tokens into characters."""

    __slots__ = ("_decoder", "_pending", "_piece", "_skipped", "_strip")

    def __init__(self, piece: Callable[[int], Piece], skipped: frozenset[int], errors: str, strip: int) -> None:
        self._piece = piece
        self._skipped = skipped
        self._decoder = _utf8(errors)
        self._pending = False  # the decoder may hold a part of a character
        self._strip = strip

    def feed(self, token: int) -> str:
        if token in self._skipped:
            return ""
        piece = self._piece(token)
        if isinstance(piece, bytes):
            text = self._decoder.decode(piece)
            self._pending = True
        elif self._pending:
            text = self._decoder.decode(b"", True) + piece
            self._pending = False
        else:
            text = piece
        return self._stripped(text) if self._strip else text

    def end(self) -> str:
        text = self._decoder.decode(b"", True)
        return self._stripped(text) if self._strip else text

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _WindowStream:
    """For decoders without a table: decodes the last tokens with and without the new one, and gives the difference."""

    BEFORE = 4  # tokens of context, enough for a character of four byte tokens
    HELD = 4  # tokens after which an unfinished character is taken to be broken

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        known: Callable[[int], bool],
        skipped: frozenset[int],
        before: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._known = known
        self._skipped = skipped
        self._tokens = list(before)  # the window; its first `_shown` tokens have been given out
        self._shown = len(self._tokens)

    def feed(self, token: int) -> str:
        if token in self._skipped or not self._known(token):
            return ""
        self._tokens.append(token)
        text = self._new()
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._shown < self.HELD:
            return ""
        self._advance()
        return text

    def end(self) -> str:
        text = self._new()
        self._advance()
        return text

    def _new(self) -> str:
        if self._shown == len(self._tokens):
            return ""
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._shown])) :]

    def _advance(self) -> None:
        del self._tokens[: -self.BEFORE]
        self._shown = len(self._tokens)


@lru_cache(maxsize=128)
def _failures(pattern: str) -> tuple[int, ...]:
    """How long a beginning of the pattern ends at each of its places; kept, for the sequences of a request share it."""
    fail = [0] * len(pattern)
    for i in range(1, len(pattern)):
        k = fail[i - 1]
        while k and pattern[k] != pattern[i]:
            k = fail[k - 1]
        fail[i] = k + (pattern[k] == pattern[i])
    return tuple(fail)


class _StopString:
    """Finds a string in a text that arrives in pieces (Knuth, Morris, Pratt 1977). `state`: how much was seen."""

    __slots__ = ("_fail", "pattern", "state")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._fail = _failures(pattern)

    def find(self, text: str, passed_over: bool) -> int:
        """The index in `text` after the first full match, or -1. A match that is to be passed over is no match."""
        pattern, fail, state = self.pattern, self._fail, self.state
        if state == 0 and pattern[0] not in text:
            return -1
        for i, c in enumerate(text):
            while state and pattern[state] != c:
                state = fail[state - 1]
            if pattern[state] == c:
                state += 1
                if state == len(pattern):
                    if not passed_over:
                        return i + 1
                    state = fail[state - 1]
        self.state = state
        return -1


class Detokenizer:
    """The text of one sequence while its tokens arrive. Of several stop strings the one that is complete first ends the
    text (of those complete together, the longest), so the result does not depend on where tokens begin and end.

    Stop strings completed before token number `min_tokens` are text like any other.
    """

    def __init__(
        self, stream: Stream, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self.stop: str | None = None  # the stop string that ended the text
        self._stream = stream
        self._stops = [_StopString(s) for s in dict.fromkeys(stop)]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._fed = 0
        self._held = ""  # could be the beginning of a stop string

    def feed(self, token: int) -> tuple[str, str | None]:
        """Takes the next token; returns the text that is now safe to show, and the stop string if one is complete.
        After that there is no more text."""
        if self.stop is not None:
            return "", self.stop
        text = self._stream.feed(token)
        if not self._stops:
            return text, None
        self._fed += 1
        return self._search(text), self.stop

    def flush(self) -> str:
        """What is left when the sequence ends: withheld text, and U+FFFD for an unfinished character."""
        if self.stop is not None:
            return ""
        text = self._stream.end()
        if self._stops:
            text = self._search(text) + self._held
            self._held = ""
        return text

    def _search(self, text: str) -> str:
        passed_over = self._fed < self._min_tokens
        end, found = -1, ""
        for stop in self._stops:
            at = stop.find(text, passed_over)
            if at != -1 and (end == -1 or at < end or (at == end and len(stop.pattern) > len(found))):
                end, found = at, stop.pattern
        known = self._held + text
        if end == -1:
            keep = max(stop.state for stop in self._stops)
            self._held = known[len(known) - keep :]
            return known[: len(known) - keep]
        self.stop = found
        end += len(self._held)
        self._held = ""
        return known[: end if self._include_stop else end - len(found)]
