"""Dynamic batching: callers with one pair each share the network's batches."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from numbers import Real
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from engine.errors import BackendError, InputError, quoted
from engine.inputs.boxes import Box
from engine.inputs.options import check_count
from engine.inputs.pairs import Caption
from engine.inputs.preparation import Item, milliseconds
from engine.inputs.sources import ImageInput
from engine.prediction import Prediction
from engine.predictor import Predictor
from engine.queueing import BatcherStatistics, Bounds, Queue, QueuedPair
from engine.running import ItemError, Submitted
from engine.tracing import caller, span, within

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

WAIT = "queue"  # the stage of `Prediction.timing` that only a Batcher adds


class Batcher:
    """Answers pairs that come one at a time, from any number of threads and event loops, in batches.

    Pairs are prepared in threads, in the order in which they come. Those that get ready while the network
    runs are its next batch. An idle network waits only for pairs that are being prepared already, at most
    `max_wait_ms`: a lone pair never waits.

    `max_batch` is the largest batch (None: the bundle's largest). At most `max_pending` pairs are held at
    once, and images of `max_pending_bytes` in memory as they were given; a single larger one is held alone.

    In float32 on a CPU the predictions have the bits of `Predictor.predict` where the batches have the same
    shape, as with `max_batch=1`. Otherwise they differ as those of `Predictor.predict_batch` do.

    Safe to share between threads, not across a fork. It is pickled as its Predictor and its options; the copy
    has a queue of its own. Closing it leaves the Predictor open. Its threads also end when it is dropped.

    Examples:
        >>> from engine import Batcher, Predictor
        >>> with Predictor("my-bundle") as predictor, Batcher(predictor) as batcher:
        ...     futures = [batcher.submit("photo.jpg", f"Obama speaks {i}") for i in range(8)]
        ...     [future.result().caption for future in futures][-1]
        'Obama speaks 7'
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_batch: int | None = None,
        max_wait_ms: float = 5.0,
        max_pending: int = 256,
        max_pending_bytes: int = 512 * 2**20,
    ) -> None:
        """Make an empty queue.

        Raises InputError for counts below 1, a `max_batch` above the bundle's, a `max_wait_ms` below 0.
        """
        if not isinstance(predictor, Predictor):
            raise InputError(f"predictor: expected an engine.Predictor, got {type(predictor).__name__}")
        self._options: dict[str, Any] = {
            "max_batch": max_batch,
            "max_wait_ms": max_wait_ms,
            "max_pending": max_pending,
            "max_pending_bytes": max_pending_bytes,
        }
        self._predictor, self._runner = predictor, predictor._runner
        self._queue = Queue(
            Bounds(
                batch=largest_batch(predictor, max_batch),
                wait=_check_number("max_wait_ms", max_wait_ms, least=0) / 1000,
                pending=check_count("max_pending", max_pending, least=1),
                pending_bytes=check_count("max_pending_bytes", max_pending_bytes, least=1),
                workers=self._runner.workers,
                flights=2 if self._runner.asynchronous else 1,
            )
        )
        # An executor's threads end when it is dropped, and with the interpreter once their work is done. So
        # no work holds the Batcher while it has no pairs.
        self._here = threading.local()
        self._preparers = self._executor("prepare", self._runner.workers)
        self._network, self._finisher = self._executor("network", 1), self._executor("finish", 1)

    def submit(
        self,
        image: ImageInput | None,
        caption: Caption | None,
        box: Box | None = None,
        *,
        timeout: float | None = None,
    ) -> Future[Prediction]:
        """Queue one pair, as `Predictor.predict` takes it, and return the future of its prediction.

        Never blocks. The future can be cancelled until the pair's batch starts. A pair that still waits
        `timeout` seconds from now is dropped when its turn comes, so at 0 and below always. The image is read
        later: an array must not change meanwhile.

        Raises OverloadedError where the queue is full, BackendError after `close` and in a forked process,
        InputError for a `timeout` that is no number. The future raises what `Predictor.predict` does, and
        DeadlineError; an error is that of its pair alone, unless the run of the whole batch fails.

        Examples:
            >>> from engine import Batcher, Predictor
            >>> batcher = Batcher(Predictor("my-bundle"))
            >>> batcher.submit("photo.jpg", "Obama speaks", timeout=30).result().manipulated
            True
        """
        return self._submit(image, caption, box, timeout)

    def predict(
        self,
        image: ImageInput | None,
        caption: Caption | None,
        box: Box | None = None,
        *,
        timeout: float | None = None,
    ) -> Prediction:
        """Predict one pair in a batch with those of other threads; blocks.

        Raises what `submit` and its future do, DeadlineError as soon as `timeout` seconds have passed.

        Examples:
            >>> from engine import Batcher, Predictor
            >>> Batcher(Predictor("my-bundle")).predict("photo.jpg", "Obama speaks")
            Prediction(manipulated 0.59; 2 of 2 words)
        """
        self._check_outside("predict")
        pair = self._submit(image, caption, box, timeout)
        try:
            return pair.result(pair.timeout)
        except TimeoutError:
            if pair.done():  # or the pair's own error
                return pair.result()
            raise pair.deadline_error() from None
        finally:
            pair.cancel()

    async def predict_async(
        self,
        image: ImageInput | None,
        caption: Caption | None,
        box: Box | None = None,
        *,
        timeout: float | None = None,
    ) -> Prediction:
        """Predict one pair in a batch with others, from any event loop; cancelling the task cancels the pair.

        Raises what `predict` does.

        Examples:
            >>> import asyncio
            >>> from engine import Batcher, Predictor
            >>> batcher = Batcher(Predictor("my-bundle"))
            >>> asyncio.run(batcher.predict_async("photo.jpg", "Obama speaks"))
            Prediction(manipulated 0.59; 2 of 2 words)
        """
        import asyncio  # costs as much as the rest of the package, and is there where this is awaited

        pair = self._submit(image, caption, box, timeout)
        try:
            async with asyncio.timeout(pair.timeout):
                return await asyncio.wrap_future(pair)
        except TimeoutError:
            if pair.done() and not pair.cancelled():
                return pair.result()
            raise pair.deadline_error() from None

    def statistics(self) -> BatcherStatistics:
        """What was done so far and what waits now, for metrics.

        Examples:
            >>> from engine import Batcher, Predictor
            >>> batcher = Batcher(Predictor("my-bundle"))
            >>> prediction = batcher.predict("photo.jpg", "Obama speaks")
            >>> batcher.statistics().batch_sizes
            {1: 1}
        """
        self._runner.check_process()
        return self._queue.statistics()

    def close(self, drain: bool = True) -> None:
        """End the threads, once all accepted pairs are answered; later calls raise BackendError.

        Without `drain` only the batch that runs is answered, and the other pairs get a BackendError.

        Examples:
            >>> from engine import Batcher, Predictor
            >>> batcher = Batcher(Predictor("my-bundle"))
            >>> future = batcher.submit("photo.jpg", "Obama speaks")
            >>> batcher.close()
            >>> future.done()
            True
        """
        if self._runner.forked:  # it has none of the threads, and perhaps a locked lock
            return
        self._check_outside("close")
        self._queue.close(drain)
        for executor in (self._preparers, self._network, self._finisher):
            executor.shutdown()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._options), (self._predictor,)

    def _submit(
        self, image: ImageInput | None, caption: Caption | None, box: Box | None, timeout: float | None
    ) -> QueuedPair:
        self._runner.check_process()
        if timeout is not None:
            timeout = min(_check_number("timeout", timeout), threading.TIMEOUT_MAX)
        pair = QueuedPair(image, caption, timeout, box)
        try:
            self._queue.add(
                pair,
                partial(self._preparers.submit, self._prepare_pairs),
                partial(self._network.submit, self._run_batches),
            )
        except RuntimeError as error:
            raise BackendError(f"the Batcher cannot start its threads: {error}") from error
        return pair

    def _executor(self, name: str, threads: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(threads, f"batcher-{name}", setattr, (self._here, "inside", True))

    def _check_outside(self, method: str) -> None:
        """Raise BackendError in a thread of its own, where a future's callback would wait for itself."""
        if getattr(self._here, "inside", False):
            raise BackendError(f"{method} waits, so a future's callback cannot call it; use another thread")

    def _prepare_pairs(self) -> None:
        """Prepare pairs until none waits."""
        while (pair := self._queue.next_waiting()) is not None:
            if pair.is_late():
                self._queue.put(pair, pair.deadline_error())
            else:
                with within(pair.caller):
                    prepared = _attempt(self._runner.prepare, pair.image, pair.caption, pair.box)
                    self._queue.put(pair, prepared)

    def _run_batches(self) -> None:
        """Run batches until no pair is left to run."""
        while batch := self._queue.next_batch():
            self._run(batch)

    def _run(self, batch: list[QueuedPair]) -> None:
        """Submit those pairs of a batch that still want an answer, and leave the rest to another thread."""
        pairs, items = [], []
        for pair in batch:
            if pair.is_late():
                self._queue.fail(pair, pair.deadline_error())
            elif pair.set_running_or_notify_cancel() and pair.item is not None:
                pairs.append(pair)
                items.append(_with_wait(pair, pair.item))
        if pairs:
            self._queue.count_batch([item.timing[WAIT] for item in items])
        callers = [pair.caller for pair in pairs]
        with span("batch", callers=callers, pairs=len(pairs)) if pairs else nullcontext():
            submitted, context = _attempt(self._runner.submit, items), caller()
        if not (self._runner.asynchronous and isinstance(submitted, Submitted)):
            self._queue.land()
        try:
            self._finisher.submit(self._finish, pairs, submitted, context)
        except RuntimeError:  # the interpreter ends
            self._finish(pairs, submitted, context)

    def _finish(self, pairs: list[QueuedPair], submitted: Submitted | BaseException, context: object) -> None:
        """Give each pair of a batch its result, or all of them the error of their batch, within its span."""
        with within(context):
            results = (
                submitted if isinstance(submitted, BaseException) else _attempt(self._results, submitted)
            )
        outcomes = [results] * len(pairs) if isinstance(results, BaseException) else results
        for pair, outcome in zip(pairs, outcomes, strict=True):
            self._queue.settle(pair, outcome)

    def _results(self, submitted: Submitted) -> list[Prediction | ItemError]:
        try:
            submitted.wait()
        finally:
            if self._runner.asynchronous:
                self._queue.land()
        return list(self._runner.results(submitted))


def _attempt(
    work: Callable[Arguments, Value], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Value | BaseException:
    """Return what `work` returns or raises: a thread goes on whatever a pair brings.

    The error's traceback holds this call's arguments. They lead to no future, which would hold its own error.
    """
    try:
        return work(*arguments, **named)
    except BaseException as error:
        return error


def _with_wait(pair: QueuedPair, item: Item) -> Item:
    """The item with what its pair waited, in milliseconds, as the first stage of its timing."""
    waited = milliseconds(pair.accepted, perf_counter()) - sum(item.timing.values())
    return item._replace(timing={WAIT: max(0.0, waited)} | item.timing)


def largest_batch(predictor: Predictor, max_batch: int | None) -> int:
    """The pairs of a batch, for None the bundle's largest; raises InputError below 1 and above that."""
    largest = predictor.manifest.limits.max_batch
    chosen = largest if max_batch is None else check_count("max_batch", max_batch, least=1)
    if chosen > largest:
        raise InputError(f"max_batch: expected at most {largest}, the bundle's limit, got {chosen}")
    return chosen


def _check_number(name: str, value: object, least: float = -math.inf) -> float:
    """Return a number as float; raises InputError for NaN, what is no number, and what is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or value < least:
        expected = "a number" if least == -math.inf else f"a number of at least {least:g}"
        raise InputError(f"{name}: expected {expected}, got {quoted(value)}")
    return float(value)
