"""What an operator's tools ask: health, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from engine.serving.metrics import CONTENT_TYPE
from engine.serving.problems import RETRY_S, Refused
from engine.serving.schemas import problems
from engine.serving.service import Service

router = APIRouter(tags=["operation"])


class State(BaseModel):
    """The state of the service."""

    status: str


@router.get("/healthz", summary="Whether the process answers")
async def health() -> State:
    """200 while the event loop runs."""
    return State(status="ok")


@router.get("/readyz", summary="Whether requests are answered", responses=problems(503))
async def readiness(request: Request) -> State:
    """200 once the warm-up is done, until the process is asked to stop."""
    check_ready(request)
    return State(status="ready")


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(401)},
)
async def metrics(request: Request) -> Response:
    """Requests, errors by code, latency, a pair's stages, batches, the queue, the process."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def check_ready(request: Request) -> None:
    """Raise Refused unless the service is ready."""
    service: Service = request.app.state.service
    if not service.ready:
        why = "the warm-up failed" if service.failure else "the service is starting or stopping"
        raise Refused(503, "not_ready", why, {"Retry-After": str(RETRY_S)})
