"""The routes of the Open Inference Protocol, version 2, as KServe and Triton Inference Server have them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from engine import __version__
from engine.prediction import Prediction
from engine.serving.operation import check_ready
from engine.serving.problems import Refused, problem_of
from engine.serving.schemas import known_options
from engine.serving.service import Service
from engine.serving.tensors import (
    HEADER,
    INPUTS,
    OUTPUTS,
    InferResponse,
    read_infer,
    write_infer,
)

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

_VERSION = "1"


class ProtocolError(BaseModel):
    """Why a request was refused: `code: message`."""

    error: str


class ServerMetadata(BaseModel):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor of the model; -1 is the number of pairs."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What the model is."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(BaseModel):
    """Whether the server is live."""

    live: bool


class Ready(BaseModel):
    """Whether the server or the model is ready."""

    ready: bool


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ProtocolError} for status in statuses}


@router.get("", summary="The server", responses=_refusals(401))
async def server() -> ServerMetadata:
    """Name, version and extensions of the server."""
    return ServerMetadata(name="dgm4", version=__version__, extensions=["binary_tensor_data"])


@router.get("/health/live", summary="Whether the process answers")
async def live() -> Live:
    """200 while the event loop runs."""
    return Live(live=True)


@router.get("/health/ready", summary="Whether requests are answered", responses=_refusals(503))
async def ready(request: Request) -> Ready:
    """200 once the warm-up is done, until the process is asked to stop."""
    check_ready(request)
    return Ready(ready=True)


@router.get("/models/{name}", summary="The model", responses=_refusals(401, 404, 422))
async def model(request: Request, name: str) -> ModelMetadata:
    """The model's inputs and outputs. In JSON an element of `image` is a file in base64."""
    service = _service(request, name)
    return ModelMetadata(
        name=service.name,
        versions=[_VERSION],
        platform="dgm4",
        inputs=[
            TensorMetadata(name=tensor, datatype=datatype, shape=[-1, 4] if tensor == "box" else [-1])
            for tensor, datatype in INPUTS.items()
            if tensor != "box" or service.judges_box
        ],
        outputs=[
            TensorMetadata(name=tensor, datatype=datatype, shape=[-1, *inner])
            for tensor, (datatype, inner) in OUTPUTS.items()
        ],
    )


@router.get(
    "/models/{name}/ready", summary="Whether the model answers", responses=_refusals(401, 404, 422, 503)
)
async def model_ready(request: Request, name: str) -> Ready:
    """200 once the warm-up is done, until the process is asked to stop."""
    _service(request, name)
    check_ready(request)
    return Ready(ready=True)


@router.post(
    "/models/{name}/infer",
    summary="Predict pairs",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}},
        }
    },
    dependencies=[Depends(known_options)],
    response_model=None,
    responses={
        200: {"model": InferResponse},
        **_refusals(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
)
async def infer(request: Request, name: str) -> Response:
    """Predict the pairs of the tensors `image`, `caption` and, where the network judges one, `box`.

    One pair that fails refuses the request.
    """
    service = _service(request, name)
    asked, elements = read_infer(await request.body(), request.headers.get(HEADER))
    count = len(next(iter(elements.values())))
    columns = (elements.get(tensor, [None] * count) for tensor in INPUTS)
    pairs = [(image, caption, box) for image, caption, box in zip(*columns, strict=True)]
    predictions: list[Prediction] = []
    for i, answer in enumerate(await service.predict(request, pairs)):
        if isinstance(answer, Exception):
            problem = problem_of(answer)
            raise Refused(problem.status, problem.code, f"pair {i}: {problem.message}", problem.headers)
        predictions.append(answer)
    body, headers = write_infer(asked, service.name, _VERSION, predictions)
    return Response(body, headers=headers)


def _service(request: Request, name: str) -> Service:
    """The service, where its model has this name; raises Refused."""
    service: Service = request.app.state.service
    if name != service.name:
        raise Refused(404, "not_found", f"expected the model {service.name}, got another name")
    return service
