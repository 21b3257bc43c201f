"""GET /v1/models: what is served."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tenfold"
    max_model_len: int | None = None
    input_modalities: list[str] = ["text"]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]

    @classmethod
    def of(cls, cards: Iterable[ModelCard]) -> "ModelList":
        return cls(data=list(cards))
