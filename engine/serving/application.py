"""`create_app`: the routes of the service put together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Mount, Route

from engine import __version__
from engine.errors import Dgm4Error
from engine.predictor import Predictor
from engine.serving import operation, pages, protocol, v1
from engine.serving.gate import Gate, answer, needs_no_token
from engine.serving.metrics import Metrics
from engine.serving.problems import Refused, problem_of
from engine.serving.schemas import PairRequest, PairsRequest, ProblemResponse, explain
from engine.serving.service import Service
from engine.serving.settings import Settings
from engine.serving.tensors import InferRequest

_DESCRIPTION = (
    "Whether a news image and its caption are manipulated, in which of four ways, where in the image and in "
    "which words. Errors are `application/problem+json` with a `code`."
)


def create_app(predictor: Predictor | str | os.PathLike[str], settings: Settings | None = None) -> FastAPI:
    """Make the ASGI application that serves one Predictor, for uvicorn, Ray Serve or another server.

    `predictor` may be a bundle's path or name; it is opened here then, and closed at the application's
    shutdown. The server must send the lifespan events: the Batcher starts and the warm-up runs at startup.
    Raises what `Predictor` raises, and InputError for a `max_batch` above the bundle's largest.

    Examples:
        >>> from engine.serving import Settings, create_app
        >>> app = create_app("my-bundle", Settings(max_pairs=8))
        >>> app.state.service.name
        'asap-tiny-fp32'
    """
    settings = settings or Settings()
    owned = not isinstance(predictor, Predictor)
    opened = predictor if isinstance(predictor, Predictor) else Predictor(predictor, thumbnail=0)
    metrics = Metrics()
    service = Service(opened, settings, metrics, owned)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="dgm4",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        # Spans go where the process's own tracer sends them; its log would hold messages with captions.
        telemetry={"logs": False, "auto_configure": False},
    )
    app.state.service = service
    app.mount("/static", pages.static)
    routes = [route for route in app.routes if isinstance(route, Route | Mount)]
    for module in (v1, protocol, operation, pages):
        app.include_router(module.router)
        routes += [route for route in module.router.routes if isinstance(route, Route)]
    app.add_middleware(Gate, settings=settings, metrics=metrics, routes=routes)
    for kind in (Dgm4Error, HTTPException):
        app.add_exception_handler(kind, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    _complete(app.openapi(), settings.token is not None)
    return app


def _complete(document: dict[str, Any], guarded: bool) -> None:
    """Add to the OpenAPI document what the framework does not see: the models that the routes read and refuse
    with by themselves, and where a token is asked for."""
    models = (PairRequest, PairsRequest, InferRequest, ProblemResponse)
    _, made = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = document["components"]["schemas"]
    schemas |= made["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # the framework's, for which _invalid stands in
        schemas.pop(unused, None)
    if guarded:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in filter(needs_no_token, document["paths"]):
            for operation in document["paths"][path].values():
                operation["security"] = []


async def _problem(request: Request, error: Exception) -> Response:
    return answer(problem_of(error), request.scope, error)


async def _invalid(request: Request, error: Exception) -> Response:
    refused = Refused(422, "invalid_request", explain(error))
    return answer(problem_of(refused), request.scope)
