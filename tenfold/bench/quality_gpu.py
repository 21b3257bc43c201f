"""How near a GPU's kernels are to transformers in float32 on the same GPU, with real weights:

`python -m tenfold.bench.quality_gpu --model FILE --text FILE --out FILE` needs a checkpoint and a text on disk. Greedy
answers in float32 must be equal, or differ only where transformers itself has a tie; the perplexities of the bfloat16
and float16 paths, of their prefill kernels and of their decode kernels, must be within 0.1 %. What transformers loses
in the same type stands beside them.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.bench.claims import Claim, claim, signed
from tenfold.bench.command import again, save
from tenfold.bench.correctness import PROMPTS, TOKENS, continuations
from tenfold.bench.hardware import machine
from tenfold.bench.peers.hugging_face import reference_model
from tenfold.bench.quality import Quality, compare, windows
from tenfold.bench.quality_run import decoded, describe, forward
from tenfold.engine.core import Engine
from tenfold.engine.memory import DTYPES
from tenfold.engine.text import Text

QUESTION = "What is the capital of France?"
HALVES = ("bfloat16", "float16")
BATCH = 32  # windows decoded together
EXACT = 8  # windows of which float32 is judged

Forward = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer first leaves transformers': gap is how much higher its logit of its own token is, in float32."""

    prompt: int
    place: int
    gap: float


@dataclass(slots=True)
class Result:
    """greedy: differences by path, none where all answers are equal. quality: by path."""

    model: str
    text: str
    machine: dict[str, str]
    command: str
    prompts: int
    kernels: dict[str, str] = field(default_factory=dict)
    greedy: dict[str, list[Difference]] = field(default_factory=dict)
    quality: dict[str, Quality] = field(default_factory=dict)
    chat: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        found = [f"{name}: {why}" for name, why in self.kernels.items()]
        for name, apart in self.greedy.items():
            gaps = "".join(f"; prompt {d.prompt} from token {d.place} on, gap {d.gap:.3g}" for d in apart)
            found.append(f"{name}: {self.prompts - len(apart)} of {self.prompts} greedy answers equal{gaps}")
        found += [describe(name, quality) for name, quality in self.quality.items()]
        return found + [f"{QUESTION} {name}: {answer!r}" for name, answer in self.chat.items()]

    def plain(self) -> dict[str, Any]:
        return {"suite": "quality", "lines": self.lines()} | asdict(self)


def first_differences(
    reference: Forward, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[Difference]:
    """Follow each answer with the reference for as long as it would have said the same."""
    found = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers)):
        for place, token, logits in along(reference, prompt, answer):
            if int(logits.argmax()) != token:
                found.append(Difference(number, place, float(logits.max() - logits[token])))
                break
    return found


def along(reference: Forward, prompt: list[int], answer: list[int]) -> list[tuple[int, int, Tensor]]:
    """(place, token, the logits it was to be chosen from) of every token of an answer: one forward has them all."""
    if not answer:
        return []
    logits = reference([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    return list(zip(range(len(answer)), answer, logits))


def transformers(model: str, device: str, dtype: str) -> Forward:
    """Logits [T, vocabulary] of a sequence, in float32."""
    reference = reference_model(model, device, DTYPES[dtype])

    def run(ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = reference(torch.tensor([list(ids)], device=device)).logits[0].float()
            return logits

    return run


def engine_of(model: str, device: str, dtype: str, longest: int, count: int) -> Engine:
    config = EngineConfig(model, device, dtype, weights="dense", max_model_len=longest, max_batch=max(32, count))
    return Engine.load(config)


def run(
    model: str,
    text: Path,
    device: str,
    window: int = 512,
    count: int = 128,
    prompts: Sequence[str] = PROMPTS,
    say: Callable[[str], None] = print,
    command: str = "",
) -> Result:
    """Judge float32, bfloat16 and float16 on prompts and on the first windows of a text. Raises ValueError for a text
    too short.
    """
    result = Result(Path(model).name, text.name, machine(device), command, len(prompts))
    expected = transformers(model, device, "float32")
    for dtype in ("float32", *HALVES):
        engine = engine_of(model, device, dtype, max(window, 256), count)
        assert isinstance(engine.text, Text)
        result.kernels[dtype] = f"{engine.kernels.name} kernels, {engine.kernels.reason}"
        pieces = list(windows(engine.text.encode(text.read_text(errors="replace")), window, count))
        judged = pieces[:EXACT] if dtype == "float32" else pieces  # whose answers are compared token by token
        say(f"{dtype}: {len(prompts)} prompts and {len(judged)} windows")
        judge(result, dtype, engine, expected, judged, [engine.text.encode(prompt) for prompt in prompts])
        del engine
        free()
    for dtype in HALVES:
        say(f"transformers in {dtype}")
        own = transformers(model, device, dtype)
        result.quality[f"transformers {dtype}"] = compare(expected, own, pieces)
        del own
        free()
    for line in result.lines():
        say(line)
    return result


def judge(
    result: Result,
    dtype: str,
    engine: Engine,
    expected: Forward,
    pieces: Sequence[Sequence[int]],
    prompts: Sequence[list[int]],
) -> None:
    """Everything about one path."""
    result.greedy[dtype] = first_differences(expected, prompts, continuations(engine, prompts))
    with torch.inference_mode():
        result.quality[f"{dtype} prefill"] = compare(expected, lambda ids: forward(engine, ids), pieces)
        result.quality[f"{dtype} decode"] = compare(expected, together(engine, pieces), pieces)
    if isinstance(engine.text, Text):
        chat = engine.text.encode_chat([{"role": "user", "content": QUESTION}])
        (answer,) = continuations(engine, [chat])
        result.chat[dtype] = engine.text.decode(answer[:12])


def together(engine: Engine, pieces: Sequence[Sequence[int]], size: int = BATCH) -> Forward:
    """Logits of pieces asked for in their order, decoded `size` at a time."""
    places = {tuple(piece): i for i, piece in enumerate(pieces)}
    known: dict[tuple[int, ...], Tensor] = {}

    def run(ids: Sequence[int]) -> Tensor:
        if tuple(ids) not in known:
            known.clear()
            start = places[tuple(ids)]
            group = pieces[start : start + size]
            known.update(zip(map(tuple, group), decoded(engine, group)))
        return known[tuple(ids)]

    return run


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def claims_of(result: Result) -> list[Claim]:
    """F8: equal greedy answers in float32, perplexities of the half types within 0.1 %."""
    apart, command = result.greedy["float32"], result.command
    what = f"greedy answers of {TOKENS} tokens equal transformers float32 on the same GPU, {result.model}, float32"
    note = "; ".join(f"prompt {d.prompt} differs from token {d.place} on by a logit gap of {d.gap:.2g}" for d in apart)
    value = result.prompts - len(apart)
    found = [claim("F8", what, value, "prompts", command, at_least=result.prompts, kind="correctness", note=note)]
    for name, quality in result.quality.items():
        if not name.startswith(HALVES):
            continue
        same = result.quality[f"transformers {name.partition(' ')[0]}"]
        note = f"{quality.perplexity:.4f} against {quality.reference_perplexity:.4f} over {quality.tokens} tokens of "
        note += f"{result.text}; transformers in the same type is {100 * same.perplexity_change:+.3f} % off; roundings "
        note += f"alone move it by about {100 * chance(quality):.3f} %"
        what = f"perplexity change, {result.model}, {name} kernels against transformers float32 on the same GPU"
        change = 100 * abs(quality.perplexity_change)
        found.append(claim("F8", what, change, "%", command, at_most=0.1, kind="correctness", note=note))
    return [signed(made, result.machine) for made in found]


def chance(quality: Quality) -> float:
    """Standard deviation of the relative change where a path errs at random: for small and symmetric differences a
    token's log-probability has a variance of twice the divergence.
    """
    return math.sqrt(2 * quality.kl / quality.tokens)


def loaded(data: dict[str, Any]) -> Result:
    """The result that `plain` made."""
    own = {name: data[name] for name in Result.__slots__}
    own["greedy"] = {name: [Difference(**d) for d in found] for name, found in data["greedy"].items()}
    own["quality"] = {name: Quality(**found) for name, found in data["quality"].items()}
    return Result(**own)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.quality_gpu", description=__doc__)
    parser.add_argument("--model", required=True, help="a .gguf file or a folder with real weights and a tokenizer")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument(
        "--count", type=int, default=128, help="windows; roundings alone move the perplexity of few tokens"
    )
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu/quality.json"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    sizes = (given.window, given.count)
    result = run(given.model, given.text, given.device, *sizes, command=again(parser, given))
    save(given.out, result.plain(), given.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
