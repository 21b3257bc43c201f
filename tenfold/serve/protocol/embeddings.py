"""POST /v1/embeddings: its request and its response."""

from typing import Literal

from pydantic import BaseModel

from tenfold.serve.protocol.body import Body, Terms, honoured


class EmbeddingRequest(Body):
    """POST /v1/embeddings"""

    model: str = honoured(..., "a name from /v1/models, or 'default'")
    input: str | list[str] | list[int] | list[list[int]] = honoured(
        ..., "a text, a list of token ids, or up to --max-prompts (64) of either"
    )
    encoding_format: Literal["float", "base64"] | None = honoured(
        None, "float (where absent), or base64 of little-endian 32-bit floats, which OpenAI's client asks for"
    )
    dimensions: int | None = honoured(
        None,
        "the model's own number or absent; any other is refused, since no model served was trained so that the first "
        "part of a vector stands for all of it",
        ge=1,
        le=2**20,
    )
    user: str | None = honoured(None, "whose share of the machine this counts against", max_length=512)
    pooling: Literal["mean", "last"] | None = honoured(
        None, "extension: the mean of the final hidden states (where absent), or the last one"
    )
    priority: int | None = honoured(None, "extension: smaller runs first; 0 where absent", ge=-(2**31), lt=2**31)

    def terms(self) -> Terms:
        """On what terms it runs. Pooled prompts are never cached, so a salt would change nothing."""
        return Terms(self.priority or 0, self.user or "")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
