"""Questions answered by a classifier that has labels of its own: only about these, and by their probabilities."""

import re
from collections.abc import Sequence

from tenfold.serve.decide.question import NO, Question
from tenfold.serve.errors import invalid

NEGATIONS = re.compile(r"\b(not|no|never|neither|nor|without)\b|n['’]t\b", re.IGNORECASE)


def read(question: Question, labels: Sequence[str], told: Sequence[float], where: str) -> list[float]:
    """The probability of each option of a question. told: of each label. Of some of the labels, as options, the
    probabilities are those given that it is one of them. Raises ApiError (400) for another question.
    """
    if question.kind == "predicate":
        yes = told[labels.index(stated(question, labels, where))]
        return [yes if option.name != NO else 1 - yes for option in question.options]
    shown = {label.lower(): i for i, label in enumerate(labels)}
    places = [shown.get(option.name.lower()) for option in question.options]
    if None in places:
        wrong = question.options[places.index(None)].name
        raise invalid(
            f"{where} has the option {wrong[:80]!r}; allowed with this model: its labels, {', '.join(labels)}.", where
        )
    found = [told[place] for place in places if place is not None]
    total = sum(found)
    return [value / total for value in found] if total else [1 / len(found)] * len(found)


def stated(question: Question, labels: Sequence[str], where: str) -> str:
    """The one label that a statement names. Raises ApiError (400) where it names none, several, or says what is not."""
    text = question.instructions
    named = [label for label in labels if re.search(rf"\b{re.escape(label)}\b", text, re.IGNORECASE)]
    if len(named) != 1 or NEGATIONS.search(text):
        raise invalid(
            f"{where}.instructions must state one label of this model ({', '.join(labels)}), such as "
            f"'The post is {labels[-1]}.', without negation: it reads no other statement.",
            f"{where}.instructions",
        )
    return named[0]


def tempered(told: Sequence[float], temperature: float | None) -> list[float]:
    """Probabilities less certain, over 1, or more, under it."""
    if temperature is None or temperature == 1:
        return list(told)
    top = max(told)
    powers = [(value / top) ** (1 / temperature) for value in told]
    total = sum(powers)
    return [power / total for power in powers]
