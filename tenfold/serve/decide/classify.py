"""Posts sorted into classes: by a model made for it, or by any language model that is told the classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request as HttpRequest

from tenfold.serve.decide.decider import Case, Decider
from tenfold.serve.decide.given import Given, text_only
from tenfold.serve.decide.question import Manner, Option, Question
from tenfold.serve.protocol.body import Terms

INSTRUCTIONS = "Which of these fits the input best?"


@dataclass(frozen=True, slots=True)
class Classified:
    """probabilities [posts][labels]; prompt and completion: tokens computed."""

    probabilities: list[list[float]]
    prompt: int
    completion: int = 0


class Classifier(Protocol):
    """What /v1/classify asks. One with its own name and labels joins by `Service.classifiers[name] = it`."""

    @property
    def labels(self) -> Sequence[str]: ...

    async def classify(self, given: Sequence[Given], http: HttpRequest, terms: Terms) -> Classified:
        """Of each the probability of every label. Raises ApiError."""
        ...


@dataclass(frozen=True, slots=True)
class AnyModel:
    """A language model that is asked which label fits."""

    decider: Decider
    labels: Sequence[str]
    instructions: str
    manner: Manner

    async def classify(self, given: Sequence[Given], http: HttpRequest, terms: Terms) -> Classified:
        question = Question("choice", self.instructions, tuple(Option(label) for label in self.labels))
        cases = [Case(text_only(one), question) for one in given]
        told, counts = await self.decider.decide(http, cases, self.manner, terms, "classify")
        return Classified(told, counts.prompt, counts.completion)
