"""GET /v1/models: what is served."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenfold.serve.protocol.models import ModelCard, ModelList
from tenfold.serve.reply import ERROR_RESPONSES
from tenfold.serve.service import service_of

router = APIRouter()


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **ERROR_RESPONSES})
async def list_models(http: Request) -> Response:
    """The models served."""
    return JSONResponse(ModelList.of(service_of(http).cards().values()).model_dump())


@router.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelCard}, **ERROR_RESPONSES})
async def get_model(http: Request, model: str) -> Response:
    """One of them. Names may hold slashes, as those of the Hugging Face hub do."""
    service = service_of(http)
    return JSONResponse((service.cards().get(model) or service.served(model).card()).model_dump())
