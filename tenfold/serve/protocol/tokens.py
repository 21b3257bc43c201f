"""POST /tokenize and /detokenize, GET /tokenizer_info: their requests and responses, as vLLM spells them."""

from typing import Any

from pydantic import BaseModel

from tenfold.serve.errors import invalid
from tenfold.serve.protocol.body import MOST, Body, honoured, refused
from tenfold.serve.protocol.chat import Message

MODEL = "a name from /v1/models; 'default' where absent"


class TokenizeRequest(Body):
    """POST /tokenize"""

    model: str | None = honoured(None, MODEL)
    prompt: str | None = honoured(None, "a text; either this or messages is needed")
    messages: list[Message] | None = honoured(None, "a conversation, for the model's chat template", min_length=1)
    add_special_tokens: bool | None = honoured(
        None, "add what the model expects around a text; where absent true for a prompt, false for messages"
    )
    add_generation_prompt: bool | None = honoured(
        None, "end a conversation with the start of an answer; true where absent"
    )
    continue_final_message: bool | None = honoured(None, "leave the last message of a conversation open")
    return_token_strs: bool | None = honoured(None, "give the tokens as the vocabulary spells them, too")
    tools: list[dict[str, Any]] | None = honoured(None, "given to the chat template, for models that read them")
    chat_template_kwargs: dict[str, Any] | None = honoured(None, "variables for the model's chat template")
    chat_template: str | None = refused("templates are programs; only the model's own is run.")
    mm_processor_kwargs: Any = refused("the models served read text only.", {})
    media_io_kwargs: Any = refused("the models served read text only.", {})

    def check(self) -> None:
        """Raises ApiError (400) unless there is one thing to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")

    def template_settings(self) -> dict[str, Any]:
        """Keywords of `chat_prompt`."""
        given = dict(self.chat_template_kwargs or {})
        for name in ("add_generation_prompt", "continue_final_message"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        return given | ({"tools": self.tools} if self.tools else {})


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = honoured(None, MODEL)
    tokens: list[int] = honoured(..., "token ids", shows={"items": {"type": "integer", "minimum": 0, "maximum": MOST}})


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """special_tokens: by role, such as bos_token. The chat template is not told: an operator's own may hold more than
    its users should read.
    """

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    special_tokens: dict[str, str]
    eos_token_ids: list[int]
    has_chat_template: bool
