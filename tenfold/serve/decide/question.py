"""What is asked: a question with named options, whatever the API called it, in which orders they are shown, and how
carefully to ask.
"""

from dataclasses import dataclass

YES, NO = "Yes", "No"
MAX_OPTIONS = 255
ORDERS = 2  # averaged where nobody says otherwise


@dataclass(frozen=True, slots=True)
class Option:
    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """kind: "predicate" (options YES and NO), "choice", or "score" (options from the first level to the last)."""

    kind: str
    instructions: str
    options: tuple[Option, ...]

    @classmethod
    def predicate(cls, statement: str) -> "Question":
        return cls("predicate", statement, (Option(YES), Option(NO)))


@dataclass(frozen=True, slots=True)
class Manner:
    """How carefully to ask. orders: of the options, to average. prior: divide out what the model says without an
    input. temperature: None for the model's own.
    """

    orders: int = ORDERS
    prior: bool = True
    temperature: float | None = None


Order = tuple[int, ...]  # option numbers as they are shown, first to last


def orders(question: Question, count: int) -> list[Order]:
    """Up to `count` orders in which every option stands in different places, the given order first.

    A choice is rotated in steps as even as can be; what has a direction, levels and yes or no, is only turned around.
    """
    size = len(question.options)
    given = tuple(range(size))
    if question.kind != "choice":
        return [given, given[::-1]][: max(1, count)]
    count = max(1, min(count, size))
    shifts = [i * size // count for i in range(count)]
    return [given[shift:] + given[:shift] for shift in shifts]
