"""Lengths of real conversations, as `bench.phases` draws them: of each its first question and the answer to it.

    python -m tenfold.bench.conversations --file CONVERSATIONS.json --tokenizer MODEL --out PAIRS.json

The file is a JSON list of records as ShareGPT has them, `{"conversations": [{"from": "human", "value": ...}, ...]}`;
one that is cut off is read as far as it goes. Nothing but numbers of tokens is written down.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

LEAST, MOST_PROMPT, MOST = 4, 1024, 2048  # tokens: of either, of a prompt, of both; others are left out
SPEAKERS = ("human", "gpt")


def records(text: str) -> Iterator[Any]:
    """The elements of a JSON list, of one that is cut off those that are whole. Raises ValueError for anything else."""
    decode, at = json.JSONDecoder().raw_decode, len(text) - len(text.lstrip())
    if text[at : at + 1] != "[":
        raise ValueError("The file of conversations is no JSON list; allowed: a list of records as ShareGPT has them.")
    while True:
        at += 1
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at == len(text) or text[at] == "]":
            return
        try:
            found, after = decode(text, at)
        except json.JSONDecodeError:
            return
        yield found
        at = after - 1


def first_exchange(record: Any) -> tuple[str, str] | None:
    """The question that begins a conversation and its answer; None: it has none."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    if tuple(turn.get("from") for turn in turns[:2]) != SPEAKERS:
        return None
    question, answer = (turn.get("value") for turn in turns[:2])
    return (question, answer) if isinstance(question, str) and isinstance(answer, str) else None


def pairs_of(text: str, count: Callable[[str], int], most: int) -> list[tuple[int, int]]:
    """[prompt, answer] in tokens of the first `most` conversations that are neither very short nor very long."""
    found: list[tuple[int, int]] = []
    for record in records(text):
        if len(found) == most:
            break
        exchange = first_exchange(record)
        if exchange is None or max(map(len, exchange)) > 20 * MOST:
            continue
        prompt, answer = map(count, exchange)
        if min(prompt, answer) >= LEAST and prompt <= MOST_PROMPT and prompt + answer <= MOST:
            found.append((prompt, answer))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.conversations", description=__doc__.split("\n\n")[0])
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--tokenizer", default="default", help="model whose tokenizer counts")
    parser.add_argument("--most", type=int, default=4000, help="conversations that are taken")
    parser.add_argument("--out", type=Path, required=True, help="JSON: a list of [prompt, answer]")
    given = parser.parse_args(arguments)
    tokenizer = open_checkpoint(resolve(given.tokenizer)).tokenizer()
    text = given.file.read_text(encoding="utf-8", errors="replace")
    found = pairs_of(text, lambda part: len(tokenizer.encode(part, add_special_tokens=False).ids), given.most)
    given.out.write_text(json.dumps(found))
    each = [sorted(column) for column in zip(*found)]
    told = ", ".join(
        f"{name} {c[len(c) // 2]} (p90 {c[len(c) * 9 // 10]})" for name, c in zip(("prompt", "answer"), each)
    )
    print(f"{len(found)} pairs, medians in tokens: {told}")


if __name__ == "__main__":
    main()
