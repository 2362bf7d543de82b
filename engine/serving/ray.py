"""The service on Ray Serve: `serve run engine.serving.ray:build bundle=my-bundle`.

Every replica is the application of `dgm4 serve` with a Predictor and a Batcher of its own. Needs the extras
`serve` and `ray`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from engine.predictor import Predictor
from engine.serving.application import create_app
from engine.serving.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

_POLL_S = 0.02


class Deployment(BaseModel):
    """What `serve run engine.serving.ray:build NAME=VALUE ...` or a configuration file sets.

    Attributes:
        bundle: its path, the same on every machine, or a name such as demo:asap.
        backend, device: as of a Predictor.
        threads: CPU threads of a replica, and the cores that Ray reserves for it where it has no GPU.
        gpus: GPUs that Ray reserves for a replica; 0.5 lets two share one.
        min_replicas, max_replicas: between which Ray scales.
        target_ongoing: requests at once, per replica, above which Ray adds replicas.
        max_ongoing: requests at once that Ray sends to a replica; its batches are made of these.
        max_batch, max_wait_ms, max_pending: as of `engine.serving.Settings`.
        token_file: a file, on every machine, with the token that clients must send.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    backend: str = "auto"
    device: str = "auto"
    threads: PositiveInt = 1
    gpus: float = 0
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing: PositiveFloat = 16
    max_ongoing: PositiveInt = 64
    max_batch: PositiveInt | None = None
    max_wait_ms: float = 5.0
    max_pending: PositiveInt = 256
    token_file: str | None = None


def build(options: Deployment) -> Application:
    """The application for `serve run` and `serve.run`; the bundle is opened on the cluster.

    Examples:
        >>> from engine.serving.ray import Deployment, build
        >>> build(Deployment(bundle="my-bundle", max_replicas=4))
        Application(name='dgm4')
    """
    from ray import serve

    def replica() -> FastAPI:
        return _replica(options)

    autoscaling: dict[str, Any] = {
        "min_replicas": options.min_replicas,
        "max_replicas": max(options.min_replicas, options.max_replicas),
        "target_ongoing_requests": options.target_ongoing,
    }
    resources = {"num_gpus": options.gpus} if options.gpus else {"num_cpus": options.threads}
    deployment = serve.deployment(
        serve.ingress(replica)(),
        name="dgm4",
        autoscaling_config=autoscaling,
        # Ray's own default of 5 would keep batches at 5 pairs.
        max_ongoing_requests=options.max_ongoing,
        ray_actor_options=resources,
    )
    return deployment.bind()


def _replica(options: Deployment) -> FastAPI:
    """The application of one replica, which starts only once it can answer."""
    token = Path(options.token_file).read_text(encoding="utf-8").strip() if options.token_file else None
    settings = Settings(
        token=token,
        max_batch=options.max_batch,
        max_wait_ms=options.max_wait_ms,
        max_pending=options.max_pending,
    )
    predictor = Predictor(
        options.bundle,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        thumbnail=0,
    )
    app = create_app(predictor, settings)
    begin = app.router.lifespan_context

    @asynccontextmanager
    async def ready(app: FastAPI) -> AsyncIterator[None]:
        # Ray sends requests as soon as the start has ended.
        async with begin(app):
            while not app.state.service.ready:
                if app.state.service.failure is not None:
                    raise app.state.service.failure
                await asyncio.sleep(_POLL_S)
            yield

    app.router.lifespan_context = ready
    return app
