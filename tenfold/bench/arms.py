"""The ablation table: every arm and switch of the engine off and on, end to end, two engines taking turns.

A case is a row of CASES: what it is called, the settings of the engine without it and with it, and the points where it
is measured. A row whose settings this version does not have is skipped with a sentence. What "auto" in a name was, the
measured table or the rule, is found out when it ran.
"""

import gc
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.bench import single
from tenfold.bench.case import Figure, paired_ratio
from tenfold.bench.command import portable
from tenfold.bench.engines import Engine, Setup, engine_config, make_engine
from tenfold.bench.fit import RESERVE, Point, Session
from tenfold.bench.floor import model_sizes
from tenfold.bench.hardware import machine
from tenfold.weights.shapes import at_least_positions, is_shape

Settings = tuple[tuple[str, Any], ...]
CALIBRATED = 1024  # tokens of a window
BY = {"table": "measured table", "rule": "rule"}
AUTO_IS_RULE = "auto is the rule"  # how a note of a result ends
CALLED_AUTO = "^measured (table|or rule,) over"  # how names of results begin that said before what "auto" would be
SETTINGS = {"gemm": "linear", "merge": "attention", "softmax": "softmax of attention"}  # and what they fix in decodes
DECODES = ((1, 1024), (8, 1024))
LONG = ((1, 8192), (8, 8192))


@dataclass(frozen=True, slots=True)
class Case:
    """One row: settings of EngineConfig without it and with it. points: (batch, context)."""

    group: str
    name: str
    off: Settings
    on: Settings
    points: tuple[tuple[int, int], ...] = DECODES


def of(name: str, value: Any) -> Settings:
    return ((name, value),)


CASES = (
    Case("kernels", "GPU kernels over plain PyTorch", of("kernels", "torch"), of("kernels", "native")),
    Case("launches", "CUDA graphs", of("graphs", False), of("graphs", True)),
    Case("launches", "a step launched ahead", of("lookahead", 0), of("lookahead", 1)),
    Case("softmax", "lazy rescale over online maximum", of("softmax", "online"), of("softmax", "lazy"), LONG),
    Case("softmax", "unified maximum, epilogue guard", of("softmax", "online"), of("softmax", "unified"), LONG),
    Case("softmax", "unified maximum, guard of the paper", of("softmax", "online"), of("softmax", "paper"), LONG),
    Case("merge", "the last split merges, over a second launch", of("merge", "launch"), of("merge", "global"), LONG),
    Case(
        "merge",
        "a cluster merges, over global memory",
        of("merge", "global"),
        of("merge", "cluster"),
        (*DECODES, *LONG),
    ),
    Case("merge", "auto over a second launch", of("merge", "launch"), of("merge", "auto"), LONG),
    Case("gemm", "flat GEMM over cuBLAS", of("gemm", "library"), of("gemm", "flat")),
    Case("gemm", "two stages over one", of("gemm", "flat-1"), of("gemm", "flat-2")),
    Case("gemm", "n stages over two", of("gemm", "flat-2"), of("gemm", "flat")),
    Case("dispatch", "auto over cuBLAS always", of("gemm", "library"), of("gemm", "auto")),
    Case("dispatch", "auto over the flat GEMM always", of("gemm", "flat"), of("gemm", "auto")),
    Case("weights", "int4 over bfloat16", (), of("weights", "int4"), ((1, 1024), (8, 1024))),
    Case("weights", "int8 over bfloat16", (), of("weights", "int8"), ((1, 1024), (8, 1024))),
    Case("weights", "fp8 over bfloat16", (), of("weights", "fp8"), ((1, 1024), (64, 512))),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def cases_of(groups: Sequence[str]) -> list[Case]:
    """The cases of these groups; none: all. Raises ValueError for a group that there is not."""
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"There is no group of arms {unknown[0]!r}; allowed: {', '.join(GROUPS)}.")
    return [case for case in CASES if not groups or case.group in groups]


def obstacle(case: Case) -> str:
    """Why this version cannot run a case, "" where it can."""
    known = {f.name: f.metadata.get("choices", ()) for f in fields(EngineConfig)}
    for name, value in (*case.off, *case.on):
        if name not in known:
            return f"there is no setting {name} in this version"
        if known[name] and value not in known[name]:
            return f"{name}={value} is not among the settings of this version ({', '.join(known[name])})"
    return ""


@dataclass(slots=True)
class Row:
    """A case at a point: milliseconds per output token, a sample a round. by: what decided the arms that its settings
    left open, "table" where any was measured, else "rule"; "" where that was not recorded.
    """

    group: str
    name: str
    off: dict[str, Any]
    on: dict[str, Any]
    batch: int
    context: int
    off_ms: list[float]
    on_ms: list[float]
    by: str = ""

    @property
    def title(self) -> str:
        """The name, with what ran in place of "auto"."""
        return re.sub("^auto(?= over)", BY.get(self.by, "auto"), self.name)

    @property
    def gain(self) -> Figure:
        """off / on, round by round: above 1 where the arm helps."""
        return paired_ratio(self.off_ms, self.on_ms)


@dataclass(slots=True)
class Result:
    model: str
    machine: dict[str, str]
    command: str = ""
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        rows = [
            f"{r.group:9} {r.title:42} {r.batch} x {r.context:<5} off {Figure(tuple(r.off_ms)).median:7.3f} ms, "
            f"on {Figure(tuple(r.on_ms)).median:7.3f} ms, {r.gain.median:.2f}x"
            for r in self.rows
        ]
        return rows + [f"{name}: skipped, {why}" for name, why in self.skipped] + self.notes

    def plain(self) -> dict[str, Any]:
        return {"suite": "arms", "lines": self.lines()} | asdict(self)


def loaded(data: Mapping[str, Any]) -> Result:
    """The result that `plain` made; one that did not record what "auto" was has said so at most for all its rows."""
    notes = data.get("notes", [])
    by = "rule" if any(note.endswith(AUTO_IS_RULE) for note in notes) else ""
    rows = [Row(**{"by": by} | row | {"name": re.sub(CALLED_AUTO, "auto over", row["name"])}) for row in data["rows"]]
    skipped = [(name, why) for name, why in data["skipped"]]
    return Result(data["model"], data["machine"], data["command"], rows, skipped, notes)


def run(
    model: str,
    device: str,
    rounds: int,
    tokens: int = single.TOKENS,
    *,
    cases: Sequence[Case] = CASES,
    common: Mapping[str, Any] | None = None,
    threads: int = 0,
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
    done: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measure the cases of one model. common: settings of all engines. done: called with the result after each case."""
    ready = [(case, points_of(case, tokens)) for case in cases if not obstacle(case)]
    room = pairs_room(model, device)
    if is_shape(model):
        model = at_least_positions(model, max((p.context + p.tokens for _, ps in ready for p in ps), default=1))
    result = Result(portable(model), machine(device))
    result.skipped = [(case.name, why) for case in cases if (why := obstacle(case))]
    for name, why in result.skipped:
        say(f"{name}: skipped, {why}")
    given = dict(common or {})
    if is_shape(model) and any(needs_phi(case) for case, _ in ready):
        result.notes.append(calibrated(model, device, given))
        given = {"softmax": "lazy"} | given  # what other rows ran before anything was measured
    result.notes += table_note(device)
    pool = Pool(model, device, threads, given)
    vocabulary = model_sizes(model, device).vocab
    for case, wanted in ready:
        points = tuple(p for p in wanted if p.cached <= room)
        large = [f"{case.name}, {p}" for p in wanted if p.cached > room]
        result.skipped += [(name, "two engines do not fit beside each other") for name in large]
        if time.monotonic() > deadline or not points:
            result.skipped += [(case.name, "the time was up")] if points else []
            continue
        try:
            found = single.Result(model)
            pair = pool.pair(case, Session(("off", "on"), points))
            single.measure(pair, points, rounds, found, lambda _: None, vocabulary=vocabulary, deadline=deadline)
        except Exception as error:
            result.skipped.append((case.name, single.brief(error)))
            say(f"{case.name}: skipped, {single.brief(error)}")
            pool.clear()
            continue
        rows = list(_rows(case, points, found, pair["on"]))
        result.rows += rows
        result.skipped += [(f"{case.name}, {s.engine}, {s.batch} x {s.context}", s.why) for s in found.skipped]
        for text in Result(model, {}, "", rows).lines():
            say(text)
        done(result)
    return result


def needs_phi(case: Case) -> bool:
    """Whether an arm subtracts a maximum that must have been measured."""
    return any(name == "softmax" and value in ("unified", "paper") for name, value in (*case.off, *case.on))


def calibrated(model: str, device: str, settings: Mapping[str, Any]) -> str:
    """Measure the attention scores of a shape's random weights on random tokens, and say how many layers they serve."""
    from tenfold.engine.calibrate import calibrate_ids
    from tenfold.engine.memory import DTYPES
    from tenfold.weights.softmax import save

    rng = random.Random(1)
    vocabulary = model_sizes(model, device).vocab
    pieces = [rng.choices(range(vocabulary), k=CALIBRATED) for _ in range(2)]
    found, opened = calibrate_ids(engine_config(settings, model=model, device=device), pieces)
    save(found, opened.checkpoint)
    phis = found.phi(DTYPES[opened.config.dtype])
    served = sum(phi is not None for phi in phis)
    return f"a unified maximum, measured on {found.tokens} random tokens, serves {served} of {len(phis)} layers"


def table_note(device: str) -> list[str]:
    """How much was measured on this GPU, which is what "auto" goes by."""
    if device == "cpu":
        return []
    import torch

    try:
        from tenfold.ops.gpu.arms import table
    except ImportError:  # without Triton there is nothing to choose from
        return []
    held = len(table(torch.cuda.get_device_name(device)))
    return [f"the table of choices held {held} measurements" + ("" if held else f": {AUTO_IS_RULE}")]


def decided_by(engine: Any, case: Case, batch: int) -> str:
    """`Row.by` of the engine of `Case.on`, in steps of so many requests."""
    from tenfold.engine.inspect import choices

    left = [name for name, value in case.on if value == "auto" and name in SETTINGS]
    own = [choice for choice in choices(engine.core) if choice["batch"] == batch]
    names = [name for name in SETTINGS if name in left or not left]
    sources = {c["source"] for c in own if any(str(c["operation"]).startswith(SETTINGS[name]) for name in names)}
    return "table" if sources & {"measured", "step"} else "rule"


def pairs_room(model: str, device: str) -> float:
    """Tokens of KV cache that two engines of a model can have each."""
    if device == "cpu":
        return float("inf")
    import torch

    sizes = model_sizes(model, device)
    left = torch.cuda.mem_get_info(device)[0] / 2 - sizes.weights - RESERVE
    return max(0.0, left) / sizes.kv_token


def points_of(case: Case, tokens: int) -> tuple[Point, ...]:
    return tuple(Point(batch, context, tokens) for batch, context in case.points)


def _rows(case: Case, points: Sequence[Point], found: single.Result, engine: Engine) -> Iterator[Row]:
    for point in points:
        off, on = (found.row(name, point.batch, point.context) for name in ("off", "on"))
        if off and on:
            samples = off.tpot_samples, on.tpot_samples
            by = decided_by(engine, case, point.batch)
            yield Row(case.group, case.name, dict(case.off), dict(case.on), point.batch, point.context, *samples, by)


class Pool:
    """At most the two engines of one case; the next case takes over what it can use."""

    def __init__(self, model: str, device: str, threads: int, common: dict[str, Any]) -> None:
        self.model, self.device, self.threads, self.common = model, device, threads, common
        self._engines: dict[tuple[Settings, Session], Engine] = {}

    def pair(self, case: Case, part: Session) -> dict[str, Engine]:
        keys = [(case.off, part), (case.on, part)]
        for key in [key for key in self._engines if key not in keys]:
            del self._engines[key]
        self._free()
        for key in keys:
            if key not in self._engines:
                self._engines[key] = self._make(key[0], part)
        return {"off": self._engines[keys[0]], "on": self._engines[keys[1]]}

    def clear(self) -> None:
        self._engines.clear()
        self._free()

    def _make(self, settings: Settings, part: Session) -> Engine:
        cached = 0 if self.device == "cpu" else part.cached
        own = self.common | dict(settings)
        setup = Setup(self.model, self.threads, part.batch, part.context, self.device, cached, own)
        return make_engine("tenfold", setup)

    def _free(self) -> None:
        import torch

        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()
