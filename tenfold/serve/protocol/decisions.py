"""POST /v1/decisions and /v1/classify: their requests and responses. Types and bounds are those of OpenAI's client."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
    ValidationInfo,
    field_validator,
)

from tenfold.serve.decide.calibrate import TEMPERATURES
from tenfold.serve.decide.given import Given, Linked
from tenfold.serve.decide.question import MAX_OPTIONS, ORDERS, Manner, Option, Question
from tenfold.serve.errors import invalid
from tenfold.serve.protocol.body import Body, Terms, honoured, ignored

MOST_ORDERS = 26
CACHED = "prompts that start alike share the cache by themselves."


class Nested(BaseModel):
    """An object inside a request. Unknown keys are refused, as in `Body`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


# What parts of a content say


class DecisionText(Nested):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None

    def said(self) -> str:
        return self.text


class DecisionJson(Nested):
    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]

    def said(self) -> str:
        return json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))


class DecisionImage(Nested):
    """image_url: http, https or data:. detail: there is one resolution, that of the model."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "high", "auto", "original"] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    def said(self) -> str:
        return ""


class DecisionOutputText(Nested):
    type: Literal["output_text"]
    text: str

    def said(self) -> str:
        return self.text


class DecisionRefusal(Nested):
    type: Literal["refusal"]
    refusal: str

    def said(self) -> str:
        return self.refusal


def _type(value: Any) -> str | None:
    """Which branch of a union an object means to be. Brackets keep branches out of the paths of error messages."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


def _one_of(allowed: str, kind: Callable[[Any], str | None] = _type) -> Discriminator:
    return Discriminator(kind, custom_error_type="unknown_type", custom_error_message=f"must be {allowed}")


TextOrJson = Annotated[
    Annotated[DecisionText, Tag("<input_text>")] | Annotated[DecisionJson, Tag("<input_json>")],
    _one_of("an object of the type input_text or input_json"),
]
SaidByUser = Annotated[
    Annotated[DecisionText, Tag("<input_text>")]
    | Annotated[DecisionJson, Tag("<input_json>")]
    | Annotated[DecisionImage, Tag("<input_image>")],
    _one_of("an object of the type input_text, input_json or input_image"),
]
SaidByAssistant = Annotated[
    Annotated[DecisionOutputText, Tag("<output_text>")] | Annotated[DecisionRefusal, Tag("<refusal>")],
    _one_of("an object of the type output_text or refusal"),
]
CallStatus = Literal["in_progress", "completed", "incomplete"]


Said = DecisionText | DecisionJson | DecisionImage | DecisionOutputText | DecisionRefusal


def said(content: str | Sequence[Said]) -> str:
    """Parts joined by newlines, but for images."""
    if isinstance(content, str):
        return content
    return "\n".join(part.said() for part in content if not isinstance(part, DecisionImage))


# What an input is made of


class DecisionUserMessage(Nested):
    role: Literal["user"]
    content: str | list[SaidByUser]
    type: Literal["message"] = "message"

    def shown(self) -> str:
        return f"[{self.role}]\n{said(self.content)}"


class DecisionInstruction(Nested):
    role: Literal["system", "developer"]
    content: str | list[DecisionText]
    type: Literal["message"] = "message"

    def shown(self) -> str:
        return f"[{self.role}]\n{said(self.content)}"


class DecisionAssistantMessage(Nested):
    role: Literal["assistant"]
    content: str | list[SaidByAssistant]
    phase: Literal["commentary", "final_answer"] | None = None
    type: Literal["message"] = "message"

    def shown(self) -> str:
        return f"[{self.role}]\n{said(self.content)}"


class Call(Nested):
    call_id: str
    name: str
    id: str | None = None
    namespace: str | None = None
    status: CallStatus | None = None


class DecisionFunctionCall(Call):
    type: Literal["function_call"]
    arguments: str

    def shown(self) -> str:
        return f"[call of {self.name}]\n{self.arguments}"


class DecisionToolCall(Call):
    type: Literal["custom_tool_call"]
    input: str

    def shown(self) -> str:
        return f"[call of {self.name}]\n{self.input}"


class DecisionCallOutput(Nested):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | list[DecisionText]
    id: str | None = None
    status: CallStatus | None = None

    def shown(self) -> str:
        return f"[result]\n{said(self.output)}"


SAME_BRANCH = {
    "<developer>": "<system>",
    "<custom_tool_call_output>": "<function_call_output>",
}


def _item_type(item: Any) -> str | None:
    """As `_type`; a message may leave its type out and is told by its role."""
    kind = _type(item)
    if kind in (None, "<message>"):
        role = item.get("role") if isinstance(item, dict) else getattr(item, "role", None)
        kind = f"<{role}>" if isinstance(role, str) else None
    return SAME_BRANCH.get(kind, kind) if kind else None


Item = Annotated[
    Annotated[DecisionUserMessage, Tag("<user>")]
    | Annotated[DecisionInstruction, Tag("<system>")]
    | Annotated[DecisionAssistantMessage, Tag("<assistant>")]
    | Annotated[DecisionFunctionCall, Tag("<function_call>")]
    | Annotated[DecisionToolCall, Tag("<custom_tool_call>")]
    | Annotated[DecisionCallOutput, Tag("<function_call_output>")],
    _one_of(
        "a message with a role (user, developer, system, assistant), or of the type function_call, "
        "function_call_output, custom_tool_call or custom_tool_call_output",
        _item_type,
    ),
]


# What is asked


class Asked(Nested):
    instructions: str | list[TextOrJson]
    name: str | None = None


class PredicateQuestion(Asked):
    """How likely is it that a statement about the input is true?"""

    type: Literal["predicate"]

    def question(self) -> Question:
        return Question.predicate(said(self.instructions))


class DecisionChoice(Nested):
    value: StrictStr | StrictBool
    description: str | None = None


class ChoiceQuestion(Asked):
    """Which of the choices fits the input?"""

    type: Literal["choice"]
    choices: list[DecisionChoice] = Field(min_length=2, max_length=MAX_OPTIONS)

    @field_validator("choices")
    @classmethod
    def distinct(cls, choices: list[DecisionChoice]) -> list[DecisionChoice]:
        values = [(type(choice.value), choice.value) for choice in choices]
        if len(set(values)) < len(values):
            raise ValueError("two choices have the same value; each must be unique")
        return choices

    def question(self) -> Question:
        options = (Option(_shown(choice.value), choice.description or "") for choice in self.choices)
        return Question("choice", said(self.instructions), tuple(options))


class DecisionLevel(Nested):
    label: str
    description: str | None = None


class ScoreQuestion(Asked):
    """Where does the input stand on these levels, the lowest first?"""

    type: Literal["score"]
    levels: list[DecisionLevel] = Field(min_length=2, max_length=MAX_OPTIONS)

    def question(self) -> Question:
        options = (Option(level.label, level.description or "") for level in self.levels)
        return Question("score", said(self.instructions), tuple(options))


AnyQuestion = Annotated[
    Annotated[PredicateQuestion, Tag("<predicate>")]
    | Annotated[ChoiceQuestion, Tag("<choice>")]
    | Annotated[ScoreQuestion, Tag("<score>")],
    _one_of("a question of the type predicate, choice or score"),
]


def _shown(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


class Careful(Body):
    """The fields by which both endpoints say how to ask; extensions."""

    orders: int | None = honoured(
        None,
        f"extension: how many orders of the options are averaged, so that no place is preferred; {ORDERS} where absent",
        ge=1,
        le=MOST_ORDERS,
    )
    calibrate: bool | None = honoured(
        None, "extension: divide out what the model answers to inputs that say nothing; true where absent"
    )
    temperature: float | None = honoured(
        None,
        "extension: over 1 makes probabilities less certain, under 1 more; where absent that of "
        "--decision-temperatures, else 1",
        ge=TEMPERATURES[0],
        le=TEMPERATURES[1],
    )
    priority: int | None = honoured(None, "extension: smaller runs first; 0 where absent", ge=-(2**31), lt=2**31)
    cache_salt: str | None = honoured(
        None, "extension: requests with different salts never share cached prefixes", max_length=512
    )

    def manner(self) -> Manner:
        return Manner(self.orders or ORDERS, self.calibrate is not False, self.temperature)

    def terms(self) -> Terms:
        return Terms(self.priority or 0, self.payer(), self.cache_salt or "")

    def payer(self) -> str:
        """For whom it is, as far as the client says."""
        return ""


class DecisionRequest(Careful):
    """POST /v1/decisions"""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    input: str | Annotated[list[Item], Field(min_length=1)] = honoured(
        ...,
        "a text, or messages, calls of tools and their outputs; images in user messages for classifiers of "
        "--classifier that see them",
    )
    questions: list[AnyQuestion] = honoured(
        ..., "what to answer, up to --max-questions (400): predicate, choice or score", min_length=1
    )
    safety_identifier: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)
    prompt_cache_key: str | None = ignored(CACHED)
    prompt_cache_options: dict[str, Any] | None = ignored(CACHED)

    @field_validator("input", "questions", mode="before")
    @classmethod
    def no_images(cls, value: Any, info: ValidationInfo) -> Any:
        for entry, where, part in _parts(value):
            if isinstance(part, dict) and part.get("type") == "input_image" and entry.get("role") != "user":
                where = f"{info.field_name}{where}"
                message = f"{where} is an image; images are taken in the content of user messages only."
                raise invalid(message, where, "unsupported_content")
        return value

    def given(self) -> Given:
        """The input for a model that judges posts: what user messages say and show. Raises ApiError (400) for anything
        else.
        """
        if isinstance(self.input, str):
            return Given(self.input)
        texts: list[str] = []
        pictures: list[Linked] = []
        for i, item in enumerate(self.input):
            if not isinstance(item, DecisionUserMessage):
                raise invalid(f"input[{i}] is no user message; this model reads nothing else.", f"input[{i}]")
            texts.append(said(item.content))
            pictures += _linked(item.content, f"input[{i}].content")
        return Given("\n".join(filter(None, texts)), tuple(pictures))

    def check_text(self) -> None:
        """Raises ApiError (400) for an image, which language models do not see."""
        for i, item in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(item, DecisionUserMessage):
                for picture in _linked(item.content, f"input[{i}].content"):
                    message = f"{picture.where} is an image; this model reads text."
                    raise invalid(message, picture.where, "unsupported_content")

    def text(self) -> str:
        """The input as one text. Raises ApiError (400) for an output without its call."""
        if isinstance(self.input, str):
            return self.input
        called: set[str] = set()
        for i, item in enumerate(self.input):
            if isinstance(item, Call):
                called.add(item.call_id)
            elif isinstance(item, DecisionCallOutput) and item.call_id not in called:
                raise invalid(f"input[{i}].call_id names no call before it.", f"input[{i}].call_id")
        return "\n\n".join(item.shown() for item in self.input)

    def payer(self) -> str:
        return self.safety_identifier or ""


def _linked(content: str | Sequence[Said], where: str) -> list[Linked]:
    parts = () if isinstance(content, str) else content
    return [Linked(part.image_url, f"{where}[{j}]") for j, part in enumerate(parts) if isinstance(part, DecisionImage)]


def _parts(value: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Everything in a list of messages or questions that could be a part of a content: its entry, where it stands, and
    itself.
    """
    for i, entry in enumerate(value if isinstance(value, list) else ()):
        for name in ("content", "output", "instructions"):
            content = entry.get(name) if isinstance(entry, dict) else None
            for j, part in enumerate(content if isinstance(content, list) else ()):
                yield entry, f"[{i}].{name}[{j}]", part


# What is answered


class PredicateAnswer(BaseModel):
    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class ChoiceProbability(BaseModel):
    value: StrictStr | StrictBool
    probability: float


class ChoiceAnswer(BaseModel):
    """confidence: the probability of `choice`."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(BaseModel):
    label: str
    value: int
    probability: float


class ScoreAnswer(BaseModel):
    """score: the mean of the levels' values, from 0 for the first. confidence: the likeliest level's probability."""

    type: Literal["score"] = "score"
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer


def answer(question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, probabilities: list[float]) -> Answer:
    """A question's answer from the probability of each of its options."""
    name = question.name
    if isinstance(question, PredicateQuestion):
        return PredicateAnswer(name=name, probability=probabilities[0])
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    confidence = probabilities[best]
    if isinstance(question, ChoiceQuestion):
        each = [ChoiceProbability(value=c.value, probability=p) for c, p in zip(question.choices, probabilities)]
        choice = question.choices[best].value
        return ChoiceAnswer(name=name, choice=choice, confidence=confidence, probabilities=each)
    levels = [
        LevelProbability(label=level.label, value=i, probability=p)
        for i, (level, p) in enumerate(zip(question.levels, probabilities))
    ]
    score = sum(level.value * level.probability for level in levels)
    return ScoreAnswer(name=name, score=score, confidence=confidence, probabilities=levels)


class DecisionInputDetails(BaseModel):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class DecisionOutputDetails(BaseModel):
    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    """Of all prompts that were computed: one for each question and order, and those that calibrate."""

    input_tokens: int
    input_tokens_details: DecisionInputDetails
    output_tokens: int
    output_tokens_details: DecisionOutputDetails = DecisionOutputDetails()
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "DecisionUsage":
        details = DecisionInputDetails(cached_tokens=cached)
        return cls(
            input_tokens=prompt,
            input_tokens_details=details,
            output_tokens=completion,
            total_tokens=prompt + completion,
        )


class Decision(BaseModel):
    model: str
    answers: list[Answer]
    usage: DecisionUsage


# /v1/classify


class TextPart(Nested):
    type: Literal["text", "input_text"]
    text: str


class ImageLink(Nested):
    url: str
    detail: Literal["low", "high", "auto"] | None = None


class ImagePart(Nested):
    """As chat completions spell it, or as responses do."""

    type: Literal["image_url", "input_image"]
    image_url: str | ImageLink
    detail: Literal["low", "high", "auto", "original"] | None = None

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


SAME_PART = {"<input_text>": "<text>", "<input_image>": "<image_url>"}


def _part_type(value: Any) -> str | None:
    kind = _type(value)
    return SAME_PART.get(kind, kind) if kind else None


PostPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    _one_of("an object of the type text, input_text, image_url or input_image", _part_type),
]


class ClassifyRequest(Careful):
    """POST /v1/classify"""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    input: str | list[str | Annotated[list[PostPart], Field(min_length=1)]] = honoured(
        ...,
        "a text, or a list of up to --max-prompts (64); extension: in the list, a post may be a list of parts, of the "
        "type text or image_url as in chat completions, for classifiers of --classifier that see images",
    )
    labels: Annotated[list[str], Field(min_length=2, max_length=MAX_OPTIONS)] | None = honoured(
        None, "extension: the classes; needed unless the model has its own", shows={"uniqueItems": True}
    )
    instructions: str | None = honoured(None, "extension: what to decide, in words")
    user: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)

    @field_validator("labels")
    @classmethod
    def distinct(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise ValueError("two labels are the same; each must be unique")
        return labels

    def given(self) -> list[Given]:
        """Each post."""
        if isinstance(self.input, str):
            return [Given(self.input)]
        return [_post(post, f"input[{i}]") for i, post in enumerate(self.input)]

    def payer(self) -> str:
        return self.user or ""


def _post(post: str | Sequence[TextPart | ImagePart], where: str) -> Given:
    if isinstance(post, str):
        return Given(post, where=where)
    texts = [part.text for part in post if isinstance(part, TextPart)]
    pictures = [Linked(part.url, f"{where}[{j}]") for j, part in enumerate(post) if isinstance(part, ImagePart)]
    return Given("\n".join(texts), tuple(pictures), where)


class ClassOf(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Classification(BaseModel):
    """labels: whose probabilities `probs` are, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    labels: list[str]
    data: list[ClassOf]
    usage: ClassifyUsage
