"""What storing keys and values in few bits costs in quality, on a real model, on the CPU or a GPU.

The model runs in float32 with attention that sees every token as a format would have stored it when the query was
computed (`bench.kv_model`), so one forward over a text judges what decoding it token by token would. Three measures:
perplexity, mean KL divergence from the exact cache, and the share of codes found again that stood far back in a prompt;
with files of them, tasks too (`bench.kv_tasks`). Groups and clip factors come from another text than what is judged.

    python -m tenfold.bench.kv_quality --model MODEL --calibrate news.txt --text book.txt --length 4096 --out FOLDER
"""

import argparse
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tenfold.bench.command import again, save
from tenfold.bench.hardware import machine
from tenfold.bench.kv_formats import Exact, Float8, Format, Integer, Kivi, Skvq, bits_at
from tenfold.bench.kv_model import Bench
from tenfold.bench.kv_tasks import LONGEST, PREFIX, TASKS, Task, gsm8k, hellaswag
from tenfold.bench.quality import windows
from tenfold.cache.skvq.calibrate import ClipSearch, Extremes, Sample
from tenfold.ops.kv.quantize import Grouping
from tenfold.ops.kv.spec import PackedSpec
from tenfold.serve.cli.terminal import columns
from tenfold.weights.find import resolve
from tenfold.weights.kv_calibration import key_bias

LENGTH = 1024  # tokens of a window that is judged, where nothing else was asked for
LEARNED = 384  # tokens of a calibration window, where nothing else was asked for
UNJUDGED = 256  # first tokens of a window, of which window and sinks are a large part
ROWS = 128  # logits that are compared at a time: they fit into memory that was just used
WORDS = (  # noqa: SIM905
    "river table garden window yellow market silver doctor forest engine bottle winter letter camera island bridge "
    "planet orange castle mirror pencil desert rocket violin helmet candle basket turtle anchor button ladder pepper"
).split()


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table: SKVQ with parts of it left out."""

    name: str
    spec: PackedSpec
    reorder: bool = True
    clip: bool = True

    def side(self, of_keys: bool) -> "Side":
        spec = self.spec
        bits, rotary = (spec.key_bits, spec.rotary) if of_keys else (spec.value_bits, "pre")
        return Side(of_keys, bits, spec.group, spec.span, self.reorder, rotary, spec.parameters)


@dataclass(frozen=True, slots=True)
class Side:
    """What a grouping of keys, or of values, depends on."""

    of_keys: bool
    bits: float
    group: int
    span: int
    reorder: bool
    rotary: str
    parameters: str


def variants(kv_heads: int, head_dim: int) -> list[Variant]:
    """SKVQ as published, at every group size a head has, with each part left out, and rounding to nearest, which is
    none of it.

    Groups of 64 may mix the channels of neighbouring heads where heads have 64 channels or fewer: inside one there
    would be nothing to reorder, as there is nothing in groups of 128 where heads have 128.
    """
    span = next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n * head_dim > 64 or n == kv_heads))
    base = PackedSpec(2, 2, 64, span=span)
    sizes = [base, PackedSpec(2, 2, 32), *([PackedSpec(2, 2, 128)] if head_dim % 128 == 0 else [])]
    plain = [replace(size, window=0, sinks=0, rotary="post") for size in sizes]
    return [
        *(Variant(f"round to nearest 2 bit g{s.group}", s, reorder=False, clip=False) for s in plain),
        Variant("round to nearest 2 bit g64, window, sinks", replace(base, rotary="post"), reorder=False, clip=False),
        *(Variant(f"SKVQ {s}", s) for s in sizes),
        *(Variant(f"SKVQ {s}", s) for s in (replace(size, value_bits=1.5) for size in sizes)),
        *(Variant(f"SKVQ {s}", s) for s in (replace(base, key_bits=4), replace(base, key_bits=4, value_bits=4))),
        *(
            Variant(f"SKVQ {base}, {without}", spec, reorder, clip)
            for without, spec, reorder, clip in (
                ("no reorder", base, False, True),
                ("no clip", base, True, False),
                ("no window", replace(base, window=0), True, True),
                ("no sinks", replace(base, sinks=0), True, True),
                ("no window, no sinks", replace(base, window=0, sinks=0), True, True),
                ("fp16 parameters", replace(base, parameters="fp16"), True, True),
                ("keys after rotary", replace(base, rotary="post"), True, True),
            )
        ),
    ]


def calibrated(bench: Bench, wanted: Sequence[Variant], pieces: Sequence[Sequence[int]], searched: int) -> list[Skvq]:
    """The variants with groups from all pieces and clip factors from the first ones."""
    c = bench.config
    layers = range(c.layers)
    shifts = [key_bias(bench.checkpoint, layer, c.kv_size) for layer in layers]
    seen = {kind: [Extremes(c.kv_size) for _ in layers] for kind in ("pre", "post", "values")}

    def watch(layer: int, sample: Sample) -> None:
        turned = sample.turn(sample.keys.transpose(0, 1)).transpose(0, 1)
        for kind, x in (("pre", sample.keys), ("post", turned), ("values", sample.values)):
            seen[kind][layer].add(x.flatten(1))

    for piece in pieces:
        bench.run(piece, watch)

    def search(side: Side, layer: int) -> ClipSearch:
        kind = side.rotary if side.of_keys else "values"
        shift = shifts[layer] if kind == "pre" else torch.zeros(c.kv_size)
        grouping = seen[kind][layer].grouping(side.group, side.span * c.head_dim, shift, side.reorder)
        return ClipSearch(grouping, side.bits, side.parameters, side.of_keys, side.rotary)

    sides = {v.side(of_keys) for v in wanted for of_keys in (True, False)}
    clipped = {v.side(of_keys) for v in wanted if v.clip for of_keys in (True, False)}
    searches = {side: [search(side, layer) for layer in layers] for side in sides}

    def look(layer: int, sample: Sample) -> None:
        for side in clipped:
            searches[side][layer].add(sample, window=128, sinks=5)

    for piece in pieces[:searched]:
        bench.run(piece, look)

    def groupings(variant: Variant, of_keys: bool) -> list[Grouping]:
        own = searches[variant.side(of_keys)]
        return [(s.grouping() if variant.clip else s.base).to(bench.device) for s in own]

    return [Skvq(v.name, v.spec, groupings(v, True), groupings(v, False), c.kv_heads, c.head_dim) for v in wanted]


@dataclass(frozen=True, slots=True)
class Recall:
    """A prompt of pairs of a word and a code, far apart, and at its end the words again. answers: where the tokens of
    each code stand that are to be found.
    """

    ids: list[int]
    answers: list[range]


def recall(bench: Bench, filler: Sequence[int], seed: int, length: int, questions: int) -> Recall:
    """filler: tokens that stand between the pairs; at most one pair for each of WORDS. Raises ValueError."""
    draw = random.Random(seed)
    words = draw.sample(WORDS, questions)
    codes = {word: str(draw.randrange(1000, 10000)) for word in words}
    pairs = [bench.encode(f"\nThe code of {word} is {codes[word]}.\n") for word in words]
    asked = draw.sample(words, len(words))
    room = length - sum(map(len, pairs)) - sum(len(bench.encode(f"\nThe code of {w} is {codes[w]}.")) for w in words)
    if room < 0:
        raise ValueError(
            f"{questions} codes take {length - room} tokens, prompts have {length}; ask for fewer (--questions) or "
            "longer prompts (--length)."
        )
    gap = room // questions
    ids: list[int] = []
    for i, pair in enumerate(pairs):
        ids += pair + list(filler[i * gap : (i + 1) * gap])
    answers = []
    for word in asked:
        ids += bench.encode(f"\nThe code of {word} is")
        code = bench.encode(f" {codes[word]}")
        answers.append(range(len(ids), len(ids) + len(code)))
        ids += code + bench.encode(".")
    return Recall(ids, answers)


def found(bench: Bench, prompt: Recall, format: Format) -> tuple[int, float]:
    """How many codes greedy decoding would give completely, and the negative log-likelihood of a token of them, in
    nats: where few are found, or a few more are chance, it still tells formats apart.
    """
    rows = [at - 1 for answer in prompt.answers for at in answer]
    logs = bench.logits(prompt.ids, format, rows).log_softmax(-1)
    targets = torch.tensor([prompt.ids[row + 1] for row in rows], device=logs.device)
    right = (logs.argmax(-1) == targets).split([len(answer) for answer in prompt.answers])
    return sum(bool(own.all()) for own in right), -float(logs.gather(1, targets[:, None]).double().mean())


def compared(logits: Tensor, targets: Tensor, reference: Tensor | None) -> tuple[Tensor, float, float]:
    """Log-probabilities [T, vocabulary], and of all targets [T] together the negative log-likelihood, and the KL
    divergence from the reference's log-probabilities, 0 where there are none.
    """
    kept, nll, kl = [], 0.0, 0.0
    for at in range(0, len(logits), ROWS):
        own = slice(at, at + ROWS)
        logs = logits[own].log_softmax(-1)
        nll -= float(logs.gather(1, targets[own, None]).double().sum())
        if reference is None:
            kept.append(logs)
        else:
            kl += float((reference[own].exp() * (reference[own] - logs)).sum(-1).double().sum())
    return torch.cat(kept) if kept else logits, nll, kl


def judge(
    bench: Bench,
    formats: Sequence[Format],
    pieces: Sequence[Sequence[int]],
    prompts: Sequence[Recall],
    tasks: Sequence[Task] = (),
    done: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """A dict for each format, told to `done` as they come; the first one must be the exact cache."""
    length = len(pieces[0])
    rows = list(range(min(UNJUDGED, length // 2) - 1, length - 1))
    references: list[Tensor] = []
    results: list[dict[str, Any]] = []
    for format in formats:
        begin = time.monotonic()
        nll, kl, count = 0.0, 0.0, len(pieces) * len(rows)
        for i, piece in enumerate(pieces):
            targets = torch.tensor([piece[row + 1] for row in rows], device=bench.device)
            reference = references[i] if i < len(references) else None
            logs, *own = compared(bench.logits(piece, format, rows), targets, reference)
            if reference is None:
                references.append(logs)
            nll, kl = nll + own[0], kl + own[1]
        codes = [found(bench, prompt, format) for prompt in prompts]
        results.append(
            {
                "format": format.name,
                "bits": round(format.bits, 3),
                "bits_here": round(bits_at(format, length), 3),
                "perplexity": math.exp(nll / count),
                "kl": kl / count,
                "found": sum(count for count, _ in codes),
                "asked": sum(len(prompt.answers) for prompt in prompts),
                **({"codes": fmean(nats for _, nats in codes)} if codes else {}),
                **{task.name: task.measure(bench, format) for task in tasks},
            }
        )
        print(f"{format.name}: {results[-1]} ({time.monotonic() - begin:.0f} s)", flush=True)
        done(results)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Plain text; the perplexity's change is against the first row."""
    base = results[0]["perplexity"]
    tasks = [name for name in TASKS if name in results[0]]
    rows = [("format", "bits", "bits here", "perplexity", "change", "KL", "found", *(TASKS[name][0] for name in tasks))]
    for r in results:
        change = f"{r['perplexity'] / base - 1:+.1%}"
        numbers = (f"{r['bits']:.2f}", f"{r['bits_here']:.2f}", f"{r['perplexity']:.2f}", change, f"{r['kl']:.4f}")
        own = (format(r[name], TASKS[name][1]) for name in tasks)
        rows.append((r["format"], *numbers, f"{r['found']}/{r['asked']}", *own))
    return columns(rows)


def subject(data: Mapping[str, Any]) -> str:
    """What a result is of: the model, and the length of its windows where that is another than the usual one."""
    length = data["length"]
    return data["model"].removesuffix(".gguf") + ("" if length == LENGTH else f", {length} tokens")


def plain(head_dim: int) -> list[Format]:
    """What SKVQ is compared with, as far as its groups fit into a head."""
    integers = [Integer(4, 64), Integer(4, 64, turned=True)] if head_dim % 64 == 0 else []
    groups = [group for group in (32, 64, 128) if head_dim % min(group, head_dim) == 0]
    kivi = [Kivi(group, channels=0 if group <= head_dim else head_dim) for group in groups]
    return [Float8(head_dim), *integers, *kivi]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.kv_quality", description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint's folder, a .gguf file or a name")
    parser.add_argument("--text", type=Path, required=True, help="what is judged")
    parser.add_argument("--calibrate", type=Path, required=True, help="another text, for groups and clip factors")
    parser.add_argument("--out", type=Path, help="folder for the JSON, which is named after the model and the length")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window, and of a prompt of codes")
    parser.add_argument("--windows", type=int, default=4, help="windows that are judged")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of codes to find again")
    parser.add_argument("--questions", type=int, default=16, help="codes in a prompt")
    parser.add_argument("--learned", type=int, default=LEARNED, help="tokens of a calibration window")
    parser.add_argument("--searched", type=int, default=2, help="calibration windows for clip factors")
    parser.add_argument("--only", default="", help="regular expression for the names of formats")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda or cuda:N")
    parser.add_argument("--hellaswag", type=Path, help="items of HellaSwag, one JSON object a line")
    parser.add_argument("--gsm8k", type=Path, help="items of GSM8K, one JSON object a line")
    parser.add_argument("--items", type=int, default=80, help="items of each task")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    asked = [(make, file) for make, file in ((hellaswag, options.hellaswag), (gsm8k, options.gsm8k)) if file]
    longest = max(options.length, options.learned, PREFIX + LONGEST if asked else 0)
    path = resolve(options.model)
    bench = Bench(path, longest, options.device)
    c = bench.config
    if options.length > c.max_positions:
        parser.error(f"length is {options.length}; allowed for {path.name}: up to {c.max_positions} tokens.")
    tasks = [make(bench, file, options.items) for make, file in asked]
    tokens = bench.encode(options.text.read_text(encoding="utf-8", errors="replace"))
    pieces = list(windows(tokens, options.length, options.windows))
    rest = tokens[len(pieces) * options.length :]
    filler = rest if len(rest) >= options.length else tokens
    learned = bench.encode(options.calibrate.read_text(encoding="utf-8", errors="replace"))
    wanted = [v for v in variants(c.kv_heads, c.head_dim) if re.search(options.only, v.name)]
    skvq = calibrated(bench, wanted, list(windows(learned, options.learned, 8)), options.searched)
    formats: list[Format] = [Exact(), *(f for f in plain(c.head_dim) if re.search(options.only, f.name)), *skvq]
    prompts = [recall(bench, filler, seed, options.length, options.questions) for seed in range(options.prompts)]
    about = {"suite": "kv-quality", "machine": machine(options.device), "command": again(parser, options)}
    about["model"] = path.name
    sizes = {"length": options.length, "windows": len(pieces), "unjudged": UNJUDGED}
    items = {"items": {task.name: len(task.questions) for task in tasks}}

    def keep(results: list[dict[str, Any]]) -> None:  # a long run that is cut off leaves what it has
        if options.out:
            name = f"kv-quality-{path.name.removesuffix('.gguf')}-{options.length}.json"
            save(options.out / name, {**about, **sizes, **items, "rows": results}, options.commit)

    print(table(judge(bench, formats, pieces, prompts, tasks, keep)))


if __name__ == "__main__":
    main()
