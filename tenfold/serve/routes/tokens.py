"""POST /tokenize and /detokenize, GET /tokenizer_info: text to tokens and back, without running the model."""

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenfold.serve import sight
from tenfold.serve.errors import invalid
from tenfold.serve.prompts import check_count, check_tokens
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from tenfold.serve.reply import ERROR_RESPONSES, body_schema
from tenfold.serve.service import DEFAULT_NAME, Served, service_of

router = APIRouter()


@router.post(
    "/tokenize",
    response_model=None,
    responses={200: {"model": TokenizeResponse}, **ERROR_RESPONSES},
    openapi_extra=body_schema(TokenizeRequest),
)
async def tokenize(http: Request) -> Response:
    """The tokens of a text or a conversation."""
    body = parse(TokenizeRequest, await http.body())
    body.check()
    served = service_of(http).served(body.model or DEFAULT_NAME)
    check_count(body.messages or (), served.settings.max_messages, "messages", "max_messages")
    ids = await asyncio.to_thread(_tokens, body, served)
    told = TokenizeResponse(count=len(ids), max_model_len=served.llm.max_model_len, tokens=ids)
    if body.return_token_strs:
        spell = served.llm.text.tokenizer.id_to_token
        told.token_strs = [spell(token) or "" for token in ids]
    return JSONResponse(told.model_dump())


def _tokens(body: TokenizeRequest, served: Served) -> list[int]:
    try:
        if body.prompt is not None:
            return served.llm.text.encode(body.prompt, body.add_special_tokens is not False)
        messages = [message.plain(i) for i, message in enumerate(body.messages or ())]
        for part in sight.shown(messages):
            message = f"{part['where']} is an image; here texts become tokens. Ask /v1/messages/count_tokens about it."
            raise invalid(message, part["where"], "unsupported_content")
        if body.add_special_tokens:
            rendered = served.llm.text.render_chat(messages, **body.template_settings())
            return served.llm.text.encode(rendered)
        return served.llm.chat_prompt(messages, **body.template_settings())
    except ValueError as error:
        raise invalid(str(error), "messages" if body.prompt is None else "prompt") from None


@router.post(
    "/detokenize",
    response_model=None,
    responses={200: {"model": DetokenizeResponse}, **ERROR_RESPONSES},
    openapi_extra=body_schema(DetokenizeRequest),
)
async def detokenize(http: Request) -> Response:
    """The text of tokens, special ones included."""
    body = parse(DetokenizeRequest, await http.body())
    served = service_of(http).served(body.model or DEFAULT_NAME)
    check_tokens(body.tokens, served, "tokens")
    text = await asyncio.to_thread(served.llm.text.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


@router.get("/tokenizer_info", response_model=None, responses={200: {"model": TokenizerInfo}, **ERROR_RESPONSES})
async def tokenizer_info(http: Request, model: str = DEFAULT_NAME) -> Response:
    """What tokenizer a model has."""
    served = service_of(http).served(model)
    text = served.llm.text
    told = TokenizerInfo(
        tokenizer_class=type(text.tokenizer.model).__name__,
        vocab_size=text.vocab_size,
        model_max_length=served.llm.max_model_len,
        special_tokens=text.special,
        eos_token_ids=list(text.eos_ids),
        has_chat_template=text.template is not None,
    )
    return JSONResponse(told.model_dump())
