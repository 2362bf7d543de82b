"""Runs prepared pairs through a backend, batch by batch, and makes Predictions of its outputs."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np

from engine.backends import usable_cores
from engine.backends.base import Backend, Outputs, Pending
from engine.errors import BackendError, InputError, NumericalError
from engine.halving import Halving
from engine.inputs.pairs import Caption, Pair, unpack_pair
from engine.inputs.preparation import Item, Picture, Preparation, milliseconds
from engine.inputs.sources import ImageInput
from engine.manifest import Manifest
from engine.partial import leave_out
from engine.postprocess import read_result
from engine.prediction import Prediction
from engine.tracing import span

OnError = Literal["raise", "return"]
# What takes a failed item's place with on_error="return".
ItemError = InputError | NumericalError
Prepare = Callable[[np.ndarray | None], Item]  # into a slot of its batch

_MAX_WORKERS = 4  # beside a network on the CPU, whose cores they share
_NOWHERE = 1, 1  # the image's size where there is no image to have a box


class Submitted:
    """A submitted batch: its items in order, and the run of those that could be prepared.

    inference: milliseconds of the submission, on a CPU those of the network's run; `wait` adds its own.
    """

    def __init__(self, items: Sequence[Item | ItemError], run: Pending | None, inference: float) -> None:
        self.items, self.inference = items, inference
        self._run = run
        self._outputs: Outputs = {}

    def wait(self) -> Outputs:
        """Wait for the network's outputs, once, and return them by name; raises BackendError."""
        if self._run is not None:
            started = perf_counter()
            self._outputs, self._run = self._run.result(), None
            self.inference += milliseconds(started, perf_counter())
        return self._outputs


class Runner:
    """Prepares and runs pairs on one backend; every Prediction gets `model` and `warnings`.

    workers: threads that prepare pairs while the network runs.
    asynchronous: a batch runs while the next is submitted.
    """

    def __init__(
        self,
        backend: Backend[Any],
        preparation: Preparation,
        manifest: Manifest,
        model: dict[str, str],
        warnings: tuple[str, ...],
    ) -> None:
        self._halving, self._preparation, self._manifest = Halving(backend), preparation, manifest
        self._model, self._warnings = model, warnings
        self._pid = os.getpid()
        self.asynchronous = backend.asynchronous
        most = _MAX_WORKERS if backend.device == "cpu" else usable_cores()
        self.workers = min(most, usable_cores())  # threads that prepare

    def one(self, image: ImageInput | None, caption: Caption | None, box: Any) -> Prediction | ItemError:
        """Predict one pair; raises InputError, and returns the error of the network's outputs."""
        return next(self.results(self.submit([self.prepare(image, caption, box)])))

    def prepare(self, image: ImageInput | None, caption: Caption | None, box: Any = None) -> Item:
        """Prepare one pair; raises InputError."""
        return _traced(partial(self._preparation.pair, "", image, caption, box))

    def pairs(self, pairs: Iterable[Pair], batch_size: int) -> Iterator[Prediction | ItemError]:
        """Predict pairs lazily and in order; see `Predictor.stream`."""
        named = ((f"item {i}", pair) for i, pair in enumerate(pairs))
        return self._stream((partial(self._pair, name, pair) for name, pair in named), batch_size)

    def captions(
        self, image: ImageInput | None, captions: Sequence[Caption | None], box: Any, batch_size: int
    ) -> Iterator[Prediction | ItemError]:
        """Predict captions of one image, prepared once; raises InputError where it cannot be read."""
        picture = self._preparation.picture("", image, shares=len(captions))
        named = ((f"caption {i}", caption) for i, caption in enumerate(captions))
        return self._stream(
            (partial(self._caption, name, picture, caption, box) for name, caption in named), batch_size
        )

    def blank(self, pairs: int, tokens: int) -> None:
        """Run a blank batch of this shape."""
        self._run(*self._preparation.blank(pairs, tokens)).result()

    def _pair(self, name: str, pair: object, slot: np.ndarray | None) -> Item:
        image, caption, box = unpack_pair(name, pair)
        if self._preparation.box is None and isinstance(pair, Mapping):
            box = None  # one more name that is ignored, as in an answer that is read again
        return self._preparation.pair(name, image, caption, box, slot)

    def _caption(
        self, name: str, picture: Picture, caption: Caption | None, box: Any, _: np.ndarray | None
    ) -> Item:
        return self._preparation.caption(name, picture, caption, box)

    def _stream(self, jobs: Iterator[Prepare], batch_size: int) -> Iterator[Prediction | ItemError]:
        source, workers = _Source(jobs), min(self.workers, batch_size)
        running_at_once = 1 if self.asynchronous else 0  # while the next batch is submitted
        pool = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")
        try:
            ahead: list[Future[Item | ItemError]] = []
            running: deque[Submitted] = deque()
            while batch := source.take(batch_size):
                work = zip(batch, self._preparation.slots(len(batch)), strict=True)
                tasks = [partial(copy_context().run, _prepared, job, slot) for job, slot in work]
                current, ahead = ahead, [pool.submit(task) for task in tasks]
                running.append(self.submit([future.result() for future in current]))
                if len(running) > running_at_once:
                    yield from self.results(running.popleft())
            running.append(self.submit([future.result() for future in ahead]))
            for submitted in running:
                yield from self.results(submitted)
            source.check()
        finally:  # a caller that stops early does not wait for what was read ahead
            pool.shutdown(cancel_futures=True)

    def submit(self, items: Sequence[Item | ItemError]) -> Submitted:
        """Submit the prepared items among `items` as one batch; one image of them all is sent once."""
        ready = [item for item in items if isinstance(item, Item)]
        if not ready:
            return Submitted(items, None, 0.0)
        started = perf_counter()
        images = [item.picture.pixels for item in ready]
        if all(image is images[0] for image in images):
            images = images[:1]
        text = self._preparation.text(ready)
        shape = {"pairs": len(ready), "images": len(images), "tokens": text["input_ids"].shape[1]}
        with span("inference", **shape, **self._model):
            run = self._run(images, text)
        return Submitted(items, run, milliseconds(started, perf_counter()))

    def results(self, batch: Submitted) -> Iterator[Prediction | ItemError]:
        """Wait for a batch and yield its results in order; an error takes its item's place."""
        with span("wait", pairs=len(batch.items)) if self.asynchronous else nullcontext():
            outputs = batch.wait()
        rows = itertools.count()  # of the outputs, which skip the items that could not be prepared
        ready = sum(isinstance(item, Item) for item in batch.items)
        for item in batch.items:
            if isinstance(item, Item):
                with span("postprocess", words=len(item.tokens.words)):
                    result = self._finish(outputs, next(rows), item, batch.inference / ready)
                yield result
            else:
                yield item

    @property
    def forked(self) -> bool:
        """Whether this is a forked process: it has none of its parent's threads, and would wait for ever."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise BackendError in a forked process."""
        if self.forked:
            raise BackendError("the Predictor was made before a fork; create it in the process that uses it")

    def _run(self, images: list[np.ndarray], text: dict[str, np.ndarray]) -> Pending:
        """Submit a batch to the backend; raises BackendError in a forked process."""
        self.check_process()
        return self._halving.submit(images, text)

    def _finish(
        self, outputs: Mapping[str, np.ndarray], row: int, item: Item, inference: float
    ) -> Prediction | NumericalError:
        """Make the prediction of one item; return the NumericalError of outputs that are not finite."""
        started, picture = perf_counter(), item.picture
        size, name = picture.size or _NOWHERE, item.name or "the pair"
        try:
            with np.errstate(all="ignore"):  # a host may have made errors of underflows
                result = read_result(outputs, row, item.tokens, size, self._manifest, name)
        except NumericalError as error:
            return error
        timing = item.timing | {
            "inference": inference,
            "postprocess": milliseconds(started, perf_counter()),
        }
        prediction = Prediction(
            **vars(result)
            | {
                "box_given": item.box,
                "caption": item.caption,
                "warnings": self._warnings + item.warnings,
                "model": dict(self._model),
                "timing": timing | {"total": sum(timing.values())},
                "thumbnail": picture.thumbnail,
            }
        )
        return leave_out(prediction, item.absent)


class _Source:
    """The jobs of a stream. What the caller's iterable raises comes after the results of what it gave."""

    def __init__(self, jobs: Iterator[Prepare]) -> None:
        self._jobs = jobs
        self._error: Exception | None = None

    def take(self, count: int) -> list[Prepare]:
        """The next jobs, `count` at most; none at the end, and after an error."""
        taken: list[Prepare] = []
        try:
            if self._error is None:
                taken.extend(itertools.islice(self._jobs, count))
        except Exception as error:
            self._error = error
        return taken

    def check(self) -> None:
        """Raise the error of the iterable, if any."""
        if self._error is not None:
            raise self._error


def _prepared(job: Prepare, slot: np.ndarray | None) -> Item | ItemError:
    """Prepare one pair of a batch; return the InputError of one that cannot be used."""
    try:
        return _traced(partial(job, slot))
    except InputError as error:
        return error


def _traced(job: Callable[[], Item]) -> Item:
    """Prepare one pair in a span of its own."""
    with span("prepare") as note:
        item = job()
        width, height = item.picture.size or (0, 0)
        note(width=width, height=height, tokens=len(item.tokens.ids))
    return item


def raised(results: Iterator[Prediction | ItemError]) -> Iterator[Prediction]:
    """The predictions in order; the first error among them is raised."""
    try:
        for result in results:
            if isinstance(result, Exception):
                raise result
            yield result
    finally:  # the error's traceback would keep a stream and its threads
        if isinstance(results, Generator):
            results.close()
