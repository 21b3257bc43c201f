"""Structured output: what an answer may say next, worked out by llguidance as a mask over the vocabulary.

Invariant: under a mask only tokens are drawn whose text the grammar can still complete, so an answer that ends with
reason "stop" is a sentence of its grammar. What cannot be promised is refused, with the reason, before anything runs.

A matcher follows one answer. Compiled grammars are kept and copied, for a copy takes microseconds.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from tenfold.engine.request import Grammar
from tenfold.engine.schema import JSON_OPTIONS, json_schema, nesting

KEPT = 64  # compiled grammars; an entry takes about 10 to 100 times its source
# Chains of references are compiled by recursion: at most 13 KiB of stack a level were seen, and a level takes at least
# 6 bytes of source in Lark (3 KiB of stack) and 32 in a schema, so this is four times what any source can use.
STACK_PER_BYTE = 2048
STACK_LEAST = 16 << 20


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost. max_bytes: of its source. max_depth: nesting of a JSON schema (llguidance reads up to
    128). compile_seconds: after which waiting for it ends; few take more than a tenth of a second.
    """

    max_bytes: int = 256 << 10
    max_depth: int = 100
    compile_seconds: float = 10.0

    def check(self, grammar: Grammar) -> None:
        """Raises ValueError for an unknown kind or too large a source. Cheap: nothing is compiled."""
        if grammar.kind not in KINDS:
            raise ValueError(f"The grammar's kind is {grammar.kind!r}; allowed: {', '.join(KINDS)}.")
        name = NAMES[grammar.kind]
        try:
            size = len(grammar.source.encode())
        except UnicodeEncodeError:
            raise ValueError(f"The {name} has half of a surrogate pair; send valid Unicode.") from None
        if size > self.max_bytes:
            raise ValueError(f"The {name} has {size} bytes; allowed: up to {self.max_bytes}. Shorten it.")
        depth = nesting(grammar.source) if grammar.kind == "json_schema" else 0
        if depth > self.max_depth:
            raise ValueError(f"The {name} is nested {depth} levels deep; allowed: up to {self.max_depth}. Flatten it.")


class Vocabulary(Protocol):
    """What grammars need of the text layer. certain_bytes: what a token adds to the text in UTF-8, b"" where that is
    not known; special_ids: tokens that are not text.
    """

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    def certain_bytes(self, token: int) -> bytes: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class Matcher:
    """Follows one answer through its grammar."""

    __slots__ = ("ll",)

    def __init__(self, ll: Any) -> None:
        self.ll = ll  # llguidance.LLMatcher

    def copy(self) -> "Matcher":
        """One at the same place that goes its own way."""
        return Matcher(self.ll.deep_copy())

    def advance(self, token: int) -> bool:
        """Take the answer's next token. False: it does not fit, or following became too costly; see `error`."""
        taken: bool = self.ll.consume_token(token)
        return taken

    def fits(self, tokens: Sequence[int]) -> int:
        """How many of these could be the answer's next, one after the other."""
        count: int = self.ll.validate_tokens(list(tokens))
        return count

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        accepting: bool = self.ll.is_accepting()
        return accepting

    @property
    def stopped(self) -> bool:
        """Whether nothing more can follow."""
        stopped: bool = self.ll.is_stopped()
        return stopped

    @property
    def error(self) -> str:
        """Why this matcher is of no more use, or ""."""
        return _sentence(self.ll.get_error()) if self.ll.is_error() else ""


class Grammars:
    """Compiles grammars for one vocabulary and keeps them.

    vocab_size: width of the logits, which may be more than the tokenizer's tokens; what is beyond is never allowed.
    eos_ids: all tokens that end an answer; allowed exactly where the grammar is satisfied. May be called from any
    thread.
    """

    def __init__(
        self, text: Vocabulary, vocab_size: int, eos_ids: Sequence[int], limits: GrammarLimits | None = None
    ) -> None:
        self.limits = limits or GrammarLimits()
        self.vocab_size = vocab_size
        self._text = text
        self._eos_ids = [i for i in eos_ids if 0 <= i < vocab_size]
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._workers = threading.Semaphore(2)  # those that compile at a time
        self._compiled: OrderedDict[Grammar, Future[Matcher]] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raises ValueError with the reason for a grammar that cannot be used. Blocks while it compiles."""
        self.start(grammar)

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of its grammar. Blocks while it compiles; raises ValueError as `check`."""
        try:
            return self.prepare(grammar).result(self.limits.compile_seconds).copy()
        except TimeoutError:
            raise ValueError(self.too_slow(grammar)) from None

    def too_slow(self, grammar: Grammar) -> str:
        limit = self.limits.compile_seconds
        return f"The {NAMES[grammar.kind]} was not compiled within {limit:g} s, which is the limit. Simplify it."

    def prepare(self, grammar: Grammar) -> "Future[Matcher]":
        """The matcher to copy, once it is compiled; its exception is a ValueError with the reason. Raises ValueError
        at once for what is over the limits.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known
        self.limits.check(grammar)
        future: Future[Matcher] = Future()
        with self._lock:
            self._compiled[grammar] = future
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._spawn(lambda: self._compile(grammar, future))
        return future

    def _spawn(self, work: Callable[[], None]) -> None:
        """Run on a thread whose stack no source within the limits can overflow."""
        with _stack_lock:
            before = threading.stack_size(max(STACK_LEAST, STACK_PER_BYTE * self.limits.max_bytes))
            try:
                threading.Thread(target=work, name="tenfold-grammar", daemon=True).start()
            finally:
                threading.stack_size(before)

    def _compile(self, grammar: Grammar, future: "Future[Matcher]") -> None:
        with self._workers:
            try:
                future.set_result(self._made(grammar))
            except ValueError as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(ValueError(f"The {NAMES[grammar.kind]} could not be compiled: {error!r}."))

    def _made(self, grammar: Grammar) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits  # 80 ms that start-up does not owe to those who never ask

        source = KINDS[grammar.kind](grammar.source)
        limits = LLParserLimits(verbose_errors=False)
        ll = LLMatcher(self.tokenizer(), source, log_level=0, limits=limits)
        if ll.is_error():
            raise ValueError(f"The {NAMES[grammar.kind]} is not supported: {_sentence(ll.get_error())}")
        first = ll.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # such as a schema that is nothing but a reference to itself
            raise ValueError(f"No answer fits the {NAMES[grammar.kind]}: {_sentence(first.get_error())}")
        return Matcher(ll)

    def tokenizer(self) -> Any:
        """llguidance's view of the vocabulary, made on first use (0.2 s for 50 thousand tokens)."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                tokens: Any = _Tokens(self._text, self.vocab_size, self._eos_ids)
                self._tokenizer = LLTokenizer(tokens, eos_token=self._eos_ids or [tokens.eos_token_id])
            return self._tokenizer


_stack_lock = threading.Lock()  # the size is one for all threads that start


class _Tokens:
    """The vocabulary as `LLTokenizer` wants it: attributes of fixed names, and a call that tokenises. There is one
    token more than logits, an end for vocabularies that have none.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, text: Vocabulary, vocab_size: int, eos_ids: Sequence[int]) -> None:
        known = min(vocab_size, text.vocab_size)
        self._text = text
        self.tokens = [text.certain_bytes(i) for i in range(known)] + [b""] * (vocab_size + 1 - known)
        self.eos_token_id = eos_ids[0] if eos_ids else vocab_size  # one is demanded; the last is never sampled
        self._special = {i for i in text.special_ids if i < vocab_size} | set(eos_ids) | {vocab_size}
        self.special_token_ids = sorted(self._special)
        for i in self._special:
            self.tokens[i] = self.tokens[i] or b"<|special-%d|>" % i
        self._ids = {t: i for i, t in reversed(list(enumerate(self.tokens))) if t and i not in self._special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text the grammar leaves no choice about: the model's usual ones where they say just that."""
        text = text.decode(errors="ignore") if isinstance(text, bytes) else text
        data = text.encode()
        for before in ("", "\n"):  # SentencePiece puts a space in front, which is then before the newline
            ids = self._after(before.encode(), before + text)
            if b"".join([self.tokens[i] for i in ids]) == data and not self._special.intersection(ids):
                return ids
        return self._greedy(data)

    def _after(self, before: bytes, text: str) -> list[int]:
        ids = self._text.encode(text, add_special_tokens=False)
        if any(i >= len(self.tokens) for i in ids):
            return []
        said = b""
        for count, i in enumerate(ids):
            if said.endswith(before):
                return ids[count:]
            said += self.tokens[i]
        return []

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token each time; a byte no token begins with is left out."""
        ids, at = [], 0
        while at < len(data):
            size = min(self._longest, len(data) - at)
            while size and data[at : at + size] not in self._ids:
                size -= 1
            if size:
                ids.append(self._ids[data[at : at + size]])
            at += max(size, 1)
        return ids


def _sentence(reason: str) -> str:
    """llguidance's reason on one line that ends with a full stop."""
    reason = " ".join(re.sub(r"\n\s*\d+ \|.*", "", reason, flags=re.DOTALL).split())
    return reason if reason.endswith(".") else f"{reason}."


def _json_schema(source: str) -> str:
    from llguidance import LLMatcher

    options: Any = JSON_OPTIONS
    made: str = LLMatcher.grammar_from_json_schema(json_schema(source), overrides=options)
    return made


def _regex(pattern: str) -> str:
    """The whole answer matches. \\d is 0 to 9, as in JSON Schema, rather than any of Unicode's 760 digits."""
    from llguidance import LLMatcher, regex_to_lark

    made: str = LLMatcher.grammar_from_regex(regex_to_lark(pattern, "d"))
    return made


def _choice(source: str) -> str:
    from llguidance import LLMatcher

    try:
        choices = json.loads(source)
    except ValueError as error:
        raise ValueError(f"The choice is not JSON: {error}.") from None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise ValueError('The choice is not a list of strings, at least one; give for example ["yes", "no"].')
    made: str = LLMatcher.grammar_from_regex("|".join(map(_literal, dict.fromkeys(choices))))
    return made


def _literal(text: str) -> str:
    """A pattern that matches this text only."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):X}}}" for c in text)


def _lark(source: str) -> str:
    from llguidance import LLMatcher

    made: str = LLMatcher.grammar_from_lark(source)
    return made


# What a grammar's source is made into for llguidance.
KINDS: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "json_object": lambda _: _json_schema('{"type": "object"}'),
    "regex": _regex,
    "choice": _choice,
    "lark": _lark,
}
NAMES = dict(zip(KINDS, ("JSON schema", "JSON object", "regex", "choice", "Lark grammar"), strict=True))
