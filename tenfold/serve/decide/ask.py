"""How a question is put to a model: prompts that end where one token decides, and how their answers are read.

The input comes first and the question after it, so all questions about one input share its cached prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenfold.serve.decide.labels import DIGITS, LETTERS, WORDS, Labels
from tenfold.serve.decide.question import NO, YES, Order, Question

Render = Callable[[str], list[int]]  # what a user says -> the prompt's tokens, up to where the answer begins


@dataclass(frozen=True, slots=True)
class Sheet:
    """A question in one order of its options, and the labels they have there."""

    question: Question
    order: Order
    labels: tuple[str, ...]  # of the options as they are shown

    @classmethod
    def of(cls, question: Question, order: Order, labels: Labels) -> "Sheet":
        return cls(question, order, _names(question, order, labels))

    @property
    def _coded(self) -> bool:
        """Whether labels are two tokens each, a letter and a digit."""
        return self.labels[0] not in WORDS and len(self.labels[0]) == 2

    def text(self, given: str) -> str:
        """What the model is told about the input `given`."""
        return f"<input>\n{given}\n</input>\n\n{self._question()}"

    def _question(self) -> str:
        question = self.question
        if self.labels[0] in WORDS:
            first, second = self.labels
            return (
                f"Is this statement about the input true?\n{question.instructions}\n\n"
                f"Answer with one word only: {first} or {second}."
            )
        shown = [question.options[i] for i in self.order]
        lines = [
            f"{label}: {option.name}" + (f" - {option.description}" if option.description else "")
            for label, option in zip(self.labels, shown)
        ]
        what = "code" if self._coded else "letter"
        return f"{question.instructions}\n\n" + "\n".join(lines) + f"\n\nAnswer with the {what} of one option only."

    def prompts(self, given: str, render: Render, labels: Labels) -> list[list[int]]:
        """The prompts whose next token has to be read: one, and where labels have two characters, one after each
        first."""
        prompt = render(self.text(given))
        firsts = self._firsts() if self._coded else []
        return [prompt, *([*prompt, labels.token(first)] for first in firsts)]

    def read(self, asked: Sequence[Sequence[float]], labels: Labels) -> list[float]:
        """Natural-log probability of each option, in the question's own order. asked: of each of `prompts`, the
        log-probability of every token of `labels`."""
        shown = self._read_codes(asked, labels) if self._coded else labels.read(asked[0], self.labels)
        logs = [0.0] * len(shown)
        for place, option in enumerate(self.order):
            logs[option] = shown[place]
        return logs

    def _read_codes(self, asked: Sequence[Sequence[float]], labels: Labels) -> list[float]:
        """P(letter) times P(digit | letter)."""
        firsts = self._firsts()
        shown = []
        for first, log, after in zip(firsts, labels.read(asked[0], firsts), asked[1:]):
            digits = [label[1] for label in self.labels if label[0] == first]
            shown += [log + rest for rest in labels.read(after, digits)]
        return shown

    def _firsts(self) -> list[str]:
        return list(dict.fromkeys(label[0] for label in self.labels))


def reads(question: Question) -> int:
    """How many prompts one order of a question takes."""
    size = len(question.options)
    return 1 if size <= len(LETTERS) else 1 + -(-size // len(DIGITS))


def _names(question: Question, order: Order, labels: Labels) -> tuple[str, ...]:
    if question.kind == "predicate" and labels.has_words:
        return tuple((YES, NO)[i] for i in order)  # these stay with their option, whatever the order
    if len(order) <= len(LETTERS):
        return tuple(LETTERS[: len(order)])
    return tuple(LETTERS[i // len(DIGITS)] + DIGITS[i % len(DIGITS)] for i in range(len(order)))
