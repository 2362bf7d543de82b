"""What the routes share: the Predictor behind its Batcher, from start to shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from engine.batcher import Batcher, BatcherStatistics, largest_batch
from engine.errors import DeadlineError
from engine.inputs.pairs import Caption
from engine.prediction import Prediction
from engine.predictor import Predictor
from engine.registry import network_of
from engine.serving.gate import EXCHANGE, Exchange
from engine.serving.metrics import Metrics
from engine.serving.problems import RETRY_S, Refused, problem_of
from engine.serving.settings import Settings

logger = logging.getLogger(__name__)

Given = tuple[bytes | None, Caption | None, Any]  # image, caption, and the box as it was sent
Answer = Prediction | Exception
T = TypeVar("T")

_WARM_UP_TOKENS = 48


class Service:
    """One Predictor, its Batcher, and whether they can answer yet.

    `judges_box` is whether a pair has to bring its box, in an image, `compares` whether it has to bring a
    caption, `failure` the error of a warm-up that failed, `owned` whether to close the Predictor at the end.
    """

    def __init__(self, predictor: Predictor, settings: Settings, metrics: Metrics, owned: bool) -> None:
        self.predictor, self.settings, self.metrics = predictor, settings, metrics
        self._largest = largest_batch(predictor, settings.max_batch)
        self.name = settings.name or "-".join(predictor.model[key] for key in ("name", "size", "precision"))
        network = network_of(predictor.manifest.model.config)
        self.judges_box, self.compares = network.box is not None, network.compares
        self.failure: Exception | None = None
        self._batcher: Batcher | None = None
        self._owned, self._warm, self._draining = owned, False, False
        metrics.watch(self._statistics, predictor.model)

    @property
    def ready(self) -> bool:
        """Whether requests are answered, and the process is not about to stop."""
        return self._warm and not self._draining

    def drain(self) -> None:
        """Stop being ready; what was taken is still answered, and what comes meanwhile."""
        if not self._draining:
            logger.info("draining")
        self._draining = True
        self.metrics.ready.set(0)

    def _statistics(self) -> BatcherStatistics:
        return BatcherStatistics() if self._batcher is None else self._batcher.statistics()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run from start to shutdown: warms up beside the server, and at the end answers what was taken."""
        settings = self.settings
        self._draining = False
        batcher = self._batcher = Batcher(
            self.predictor,
            max_batch=self._largest,
            max_wait_ms=settings.max_wait_ms,
            max_pending=settings.max_pending,
        )
        warming = asyncio.create_task(self._warm_up())
        try:
            yield
        finally:
            self.drain()
            await warming
            await asyncio.to_thread(batcher.close)
            self._warm, self._batcher = False, None
            if self._owned:
                self.predictor.close()
            logger.info("stopped")

    async def _warm_up(self) -> None:
        try:
            shapes = [(pairs, _WARM_UP_TOKENS) for pairs in (1, self._largest)]
            await asyncio.to_thread(self.predictor.warm_up, shapes)
        except Exception as error:
            self.failure = error
            logger.critical("the warm-up failed", exc_info=error)
            return
        self._warm = True
        self.metrics.ready.set(1)
        logger.info("ready")

    async def predict(self, request: Request, pairs: Sequence[Given]) -> list[Answer]:
        """Predict the pairs of a request, in order; an error takes its pair's place.

        Raises what refuses them all, OverloadedError, DeadlineError and Refused, and ClientDisconnect where
        the client went away; its pairs are cancelled then.
        """
        exchange: Exchange = request.scope[EXCHANGE]
        if len(pairs) > self.settings.max_pairs:
            text = f"expected at most {self.settings.max_pairs} pairs, got {len(pairs)}"
            raise Refused(413, "too_large", text)
        if self._batcher is None or not self._warm:
            raise Refused(503, "not_ready", "the service is starting", {"Retry-After": str(RETRY_S)})
        exchange.pairs = len(pairs)
        try:
            async with asyncio.timeout_at(exchange.deadline):
                answers = await _unless_gone(request, self._answers(self._batcher, pairs, exchange.deadline))
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {self.settings.timeout_s:g} s") from error
        for result in answers:
            if isinstance(result, Prediction):
                self.metrics.answered(result)
            elif len(answers) > 1:
                self.metrics.failed(problem_of(result).code)
        return answers

    async def _answers(self, batcher: Batcher, pairs: Sequence[Given], deadline: float) -> list[Answer]:
        left = deadline - asyncio.get_running_loop().time()
        futures: list[asyncio.Future[Prediction]] = []
        try:
            for pair in pairs:
                futures.append(asyncio.wrap_future(batcher.submit(*pair, timeout=max(left, 0))))
            results = await asyncio.gather(*futures, return_exceptions=True)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
        return [result for result in results if isinstance(result, Answer)]


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect where the client goes away first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
