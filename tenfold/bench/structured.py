"""Claim S2: of the schemas people use, which are accepted; does any answer get through that is not valid; and what do
masks cost.

Whether an instance is valid is for the package jsonschema to say, with formats checked. An instance counts as accepted
when the matcher takes it byte by byte, members of objects in some order (answers have those of `properties` in the
schema's order).
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from tenfold.base.config import EngineConfig
from tenfold.bench.case import Figure
from tenfold.bench.claims import Claim, called, claim
from tenfold.bench.schemas import Case
from tenfold.bench.vocabulary import Bytes
from tenfold.engine.core import Engine
from tenfold.engine.grammar import GrammarLimits, Grammars, Matcher
from tenfold.engine.request import Grammar, Request, SamplingParams
from tenfold.engine.text import Text

LIMITS = GrammarLimits(max_bytes=64 << 10, max_depth=32)  # as the server's defaults
WALKS = 4  # answers made up for each schema
MUTANTS = 30  # changed copies of each
LONGEST = 3000  # bytes of an answer made up
BUDGET = 400  # orders of members tried for one instance
END = 256


@dataclass(slots=True)
class Verdict:
    """Counts of one set of schemas. false_accepts: invalid and taken; false_rejects: valid and not taken in any order
    of members. Each entry names schema and instance.
    """

    schemas: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    valid: int = 0
    invalid: int = 0
    made_up: int = 0
    reordered: int = 0
    false_accepts: list[tuple[str, str]] = field(default_factory=list)
    false_rejects: list[tuple[str, str]] = field(default_factory=list)
    slowest_compile: float = 0.0

    def count(self, case: Case, matcher: Matcher, value: Any, valid: bool) -> None:
        taken = takes(matcher, value)
        self.valid += valid
        self.invalid += not valid
        self.reordered += taken == "reordered" and valid
        if bool(taken) != valid:
            wrong = self.false_accepts if taken else self.false_rejects
            wrong.append((f"{case.source} {case.name}", json.dumps(value, ensure_ascii=False)[:200]))


def judge(cases: Iterable[Case], say: Callable[[str], None], seed: int = 0) -> Verdict:
    """Compile every schema; try the instances it comes with, or answers made up from its own grammar and changed copies
    of them.
    """
    grammars = Grammars(Bytes(), END + 1, (END,), LIMITS)
    verdict = Verdict()
    for case in cases:
        verdict.schemas += 1
        begin = time.perf_counter()
        try:
            matcher = grammars.start(Grammar("json_schema", json.dumps(case.schema)))
        except ValueError as error:
            verdict.refused[reason(str(error))] += 1
            continue
        verdict.slowest_compile = max(verdict.slowest_compile, time.perf_counter() - begin)
        verdict.accepted += 1
        rng = random.Random(f"{seed} {case.source} {case.name}")
        for value, valid in case.tests or made_up(case, matcher, verdict, rng, say):
            verdict.count(case, matcher, value, valid)
    return verdict


REASONS = {  # part of a refusal, and what to count it as
    "look-around": "pattern with look-around",
    "lookarounds": "pattern with look-around",
    "backreferences": "pattern with a backreference",
    "oneOf": "oneOf whose parts may overlap",
    "not disjoint": "patternProperties that may overlap",
    "is not present in a registry": "$ref to another document",
    "bytes; allowed": "larger than 64 KiB",
    "levels deep": "nested deeper than 32",
    "regex is empty": "patterns too hard to intersect",
    "regex parse error": "pattern that is not understood",
    "invalid regex": "pattern that is not understood",
    "Unimplemented keys": "keyword",
}


def reason(message: str) -> str:
    """A refusal without what is particular to one schema."""
    message = message.removeprefix("The JSON schema is not supported: ")
    for mark, name in REASONS.items():
        if mark in message:
            return f"{name} {message.partition(': ')[2]}".rstrip(".") if name == "keyword" else name
    return message[:80]


def oracle(schema: Any) -> Any:
    """A validator with formats checked, of the draft the schema names."""
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def made_up(
    case: Case, matcher: Matcher, verdict: Verdict, rng: random.Random, say: Callable[[str], None]
) -> Iterator[tuple[Any, bool]]:
    """Instances for a schema that comes without."""
    validator = oracle(case.schema)
    for _ in range(WALKS):
        text = walk(matcher, rng)
        if text is None:
            continue
        value = json.loads(text)
        if "Infinity" in json.dumps(value):  # a number beyond 64 bits, which Python could not write again
            continue
        verdict.made_up += 1
        for changed in [value, *(mutant(value, rng) for _ in range(MUTANTS))]:
            try:
                valid = validator.is_valid(changed)
            except Exception as error:  # the oracle cannot read this schema
                say(f"jsonschema fails on {case.name}: {type(error).__name__}: {str(error)[:100]}")
                return
            yield changed, valid


def walk(start: Matcher, rng: random.Random) -> str | None:
    """A text of the grammar, drawn byte by byte with a liking for what ends things; None where it got too long."""
    matcher = start.copy()
    bits = np.zeros((END + 32) // 32, np.uint32)
    said = bytearray()
    while not matcher.stopped and len(said) < LONGEST:
        matcher.ll.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), count=END, bitorder="little")).tolist()
        if not allowed or (matcher.accepting and rng.random() < 0.5):
            break
        said.append(pick(allowed, rng, len(said)))
        matcher.advance(said[-1])
    return said.decode() if matcher.accepting else None


def pick(allowed: list[int], rng: random.Random, length: int) -> int:
    """Seldom white space; now and then, and always late, something that closes."""
    closing = [b for b in allowed if b in b'"}]']
    if closing and (rng.random() < 0.15 or length > LONGEST // 3):
        return rng.choice(closing)
    plain = [b for b in allowed if b not in b" \t\r\n"]
    simple = [b for b in plain if 32 < b < 127]
    return rng.choice((simple if rng.random() < 0.9 and simple else plain) or allowed)


STRANGE: tuple[Any, ...] = (None, True, False, 0, -1, 1.5, 10**6, "", "x", "é\n", [], {}, [None], {"a": 1})


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def mutant(value: Any, rng: random.Random) -> Any:
    """A copy with one or two changes."""
    copy = copied(value)
    for _ in range(rng.randint(1, 2)):
        copy = changed(copy, rng)
    return copy


def changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.7:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.2:
            del value[key]
        elif action < 0.35:
            value[rng.choice(("zz", "a", "", key + "x"))] = copied(rng.choice(STRANGE))
        else:
            value[key] = changed(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        action = rng.random()
        if action < 0.2:
            del value[place]
        elif action < 0.4:
            value.insert(place, copied(value[place]))
        else:
            value[place] = changed(value[place], rng)
        return value
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice((value + "x", value[:-1], value.upper(), " " + value, value * 3))
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, value * 1000, value + 0.5))
    return copied(rng.choice(STRANGE))


def takes(start: Matcher, value: Any) -> str:
    """ "as written", "reordered", or "" if no order of members that was tried is taken."""
    written = start.copy()
    if feed(written, json.dumps(value, ensure_ascii=False, separators=(",", ":"))) and written.accepting:
        return "as written"
    budget = [BUDGET]
    end = spelled(start.copy(), value, budget)
    return "reordered" if end is not None and end.accepting else ""


def feed(matcher: Matcher, text: str) -> bool:
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair cannot be written, so it is not accepted
        return False
    return bool(matcher.ll.try_consume_tokens(list(data)) == len(data))


def spelled(matcher: Matcher, value: Any, budget: list[int]) -> Matcher | None:
    """The matcher after some spelling of a value, or None."""
    if isinstance(value, dict):
        return members(matcher, list(value.items()), "{", budget) if value else after(matcher, "{}")
    if isinstance(value, list):
        if not value:
            return after(matcher, "[]")
        current = matcher
        for i, item in enumerate(value):
            start = after(current, "," if i else "[")
            end = spelled(start, item, budget) if start else None
            if end is None:
                return None
            current = end
        return after(current, "]")
    return after(matcher, json.dumps(value, ensure_ascii=False))


def members(matcher: Matcher, left: list[tuple[str, Any]], before: str, budget: list[int]) -> Matcher | None:
    if not left:
        return after(matcher, "}")
    for i, (name, value) in enumerate(left):
        budget[0] -= 1
        if budget[0] < 0:
            return None
        key = after(matcher.copy(), f"{before}{json.dumps(name, ensure_ascii=False)}:")
        here = spelled(key, value, budget) if key else None
        end = members(here, left[:i] + left[i + 1 :], ",", budget) if here else None
        if end is not None:
            return end
    return None


def after(matcher: Matcher, text: str) -> Matcher | None:
    return matcher if feed(matcher, text) else None


def table(name: str, verdict: Verdict) -> list[str]:
    """Lines that say what was found."""
    refused = ", ".join(f"{count} {why}" for why, count in verdict.refused.most_common(12))
    return [
        f"{name}: {verdict.schemas} schemas, {verdict.accepted} accepted; slowest to compile "
        f"{1e3 * verdict.slowest_compile:.0f} ms",
        f"  refused {sum(verdict.refused.values())}: {refused or 'none'}",
        f"  {verdict.invalid} invalid instances, {len(verdict.false_accepts)} of them accepted",
        f"  {verdict.valid} valid instances, {len(verdict.false_rejects)} of them rejected; "
        f"{verdict.reordered} accepted with their members in another order",
        *(f"    accepted though invalid: {schema}: {instance}" for schema, instance in verdict.false_accepts[:20]),
        *(f"    rejected though valid: {schema}: {instance}" for schema, instance in verdict.false_rejects[:20]),
    ]


def claims_of(verdicts: dict[str, Verdict], command: str) -> list[Claim]:
    return [
        claim(
            "S2",
            f"invalid instances accepted, {name}",
            len(v.false_accepts),
            "",
            command,
            at_most=0,
            kind="correctness",
            note=f"{v.invalid} invalid instances of {v.accepted} schemas; {sum(v.refused.values())} of {v.schemas} "
            f"schemas refused with a reason; {len(v.false_rejects)} of {v.valid} valid instances rejected.",
        )
        for name, v in verdicts.items()
    ]


# What masks cost


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of decode steps with all rows, free and under a grammar, one pair a round."""

    free: tuple[float, ...]
    held: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        """What grammars add, as a share of a step under them."""
        return [1 - free / held for free, held in zip(self.free, self.held)]


def cost_claim(found: Cost, batch: int, model: str, command: str) -> Claim:
    shares = Figure(tuple(100 * s for s in found.shares))
    free, held = (1e3 * Figure(samples).median for samples in (found.free, found.held))
    note = f"{free:.2f} ms a step free, {held:.2f} ms under the schema."
    what = f"share of a decode step that grammars take, batch {batch}, {called(model)}, JSON Resume's schema"
    return claim("S2", what, shares.median, "%", command, at_most=10, spread=shares.spread, note=note)


def cost(
    model: str, schema: Any, batch: int, steps: int, rounds: int, threads: int, say: Callable[[str], None]
) -> Cost:
    """Interleaved pairs: `batch` answers of `steps` tokens, free and then held to the schema, or the other way round.
    Only steps that decode all rows count, step i of one run against step i of the other.
    """
    engine = Engine.load(EngineConfig(model=model, max_model_len=256, max_batch=batch, threads=threads))
    assert isinstance(engine.text, Text)
    prompt = engine.text.encode("A person's CV as JSON, in full detail, line by line:\n")
    grammar = Grammar("json_schema", json.dumps(schema))
    numbers = count(1)
    free, held = [], []
    once(engine, prompt, grammar, batch, steps, numbers)  # compiles, and warms the caches
    for i in range(rounds):
        order = (None, grammar) if i % 2 else (grammar, None)
        times = {kind: once(engine, prompt, kind, batch, steps, numbers) for kind in order}
        both = min(map(len, times.values()))
        free.append(sum(times[None][:both]) / both)
        held.append(sum(times[grammar][:both]) / both)
        say(f"round {i + 1}: free {free[-1] * 1e3:.2f} ms a step, held {held[-1] * 1e3:.2f} ms ({both} steps)")
    return Cost(tuple(free), tuple(held))


def once(
    engine: Engine, prompt: list[int], grammar: Grammar | None, batch: int, steps: int, numbers: Iterator[int]
) -> list[float]:
    """Seconds of each step with `batch` decodes, until the first answer ends."""
    for i in range(batch):
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=steps, ignore_eos=grammar is None, grammar=grammar)
        engine.add(Request(f"cost-{next(numbers)}", tuple(prompt), params))
    times: list[float] = []
    whole = True
    while engine.has_work:
        ready = len(engine.scheduler.decoding) == batch and not engine.scheduler.waiting
        begin = time.perf_counter()
        engine.step()
        if ready and whole:
            times.append(time.perf_counter() - begin)
        whole = whole and (not times or len(engine.scheduler.decoding) == batch)
    return times
