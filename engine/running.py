"""Runs prepared pairs through a backend, batch by batch, and makes Predictions of its outputs."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.backends import usable_cores
from engine.backends.base import Backend, Pending
from engine.errors import BackendError, InputError, NumericalError
from engine.inputs.pairs import Caption, Pair, unpack_pair
from engine.inputs.preparation import Item, Picture, Preparation, milliseconds
from engine.inputs.sources import ImageInput
from engine.manifest import Manifest
from engine.partial import leave_out
from engine.postprocess import read_result
from engine.prediction import Prediction

OnError = Literal["raise", "return"]
# What takes a failed item's place with on_error="return".
ItemError = InputError | NumericalError
Prepare = Callable[[np.ndarray | None], Item]  # into a slot of its batch

_MAX_WORKERS = 4  # beside a network on the CPU, whose cores they share
_NOWHERE = 1, 1  # the image's size where there is no image to have a box


class _Batch(NamedTuple):
    """A submitted batch: its items in order, and the run of those that could be prepared.

    `submitting` is the time of the submission in milliseconds, on a CPU that of the network's run.
    """

    items: Sequence[Item | ItemError]
    run: Pending | None
    submitting: float


class Runner:
    """Prepares and runs pairs on one backend; every Prediction gets `model` and `warnings`."""

    def __init__(
        self,
        backend: Backend[Any],
        preparation: Preparation,
        manifest: Manifest,
        model: dict[str, str],
        warnings: tuple[str, ...],
    ) -> None:
        self._backend, self._preparation, self._manifest = backend, preparation, manifest
        self._model, self._warnings = model, warnings
        self._pid = os.getpid()

    def one(self, image: ImageInput | None, caption: Caption | None) -> Prediction | ItemError:
        """Predict one pair; raises InputError, and returns the error of the network's outputs."""
        item = self._preparation.pair("", image, caption)
        return next(self._results(self._submit([item])))

    def pairs(self, pairs: Iterable[Pair], batch_size: int) -> Iterator[Prediction | ItemError]:
        """Predict pairs lazily and in order; see `Predictor.stream`."""
        named = ((f"item {i}", pair) for i, pair in enumerate(pairs))
        return self._stream((partial(self._pair, name, pair) for name, pair in named), batch_size)

    def captions(
        self, image: ImageInput | None, captions: Sequence[Caption | None], batch_size: int
    ) -> Iterator[Prediction | ItemError]:
        """Predict captions of one image, prepared once; raises InputError where it cannot be read."""
        picture = self._preparation.picture("", image, shares=len(captions))
        named = ((f"caption {i}", caption) for i, caption in enumerate(captions))
        return self._stream(
            (partial(self._caption, name, picture, caption) for name, caption in named), batch_size
        )

    def blank(self, pairs: int, tokens: int) -> None:
        """Run a blank batch of this shape."""
        self._run(*self._preparation.blank(pairs, tokens)).result()

    def _pair(self, name: str, pair: object, slot: np.ndarray | None) -> Item:
        return self._preparation.pair(name, *unpack_pair(name, pair), slot)

    def _caption(self, name: str, picture: Picture, caption: Caption | None, _: np.ndarray | None) -> Item:
        return self._preparation.caption(name, picture, caption)

    def _stream(self, jobs: Iterator[Prepare], batch_size: int) -> Iterator[Prediction | ItemError]:
        most = _MAX_WORKERS if self._backend.device == "cpu" else usable_cores()
        workers = min(most, usable_cores(), batch_size)
        running_at_once = 1 if self._backend.asynchronous else 0  # while the next batch is submitted
        with ThreadPoolExecutor(workers, thread_name_prefix="preprocess") as pool:
            ahead: list[Future[Item | ItemError]] = []
            running: deque[_Batch] = deque()
            while batch := list(itertools.islice(jobs, batch_size)):
                slots = self._preparation.slots(len(batch))
                current, ahead = (
                    ahead,
                    [pool.submit(_prepared, *work) for work in zip(batch, slots, strict=True)],
                )
                running.append(self._submit([future.result() for future in current]))
                if len(running) > running_at_once:
                    yield from self._results(running.popleft())
            running.append(self._submit([future.result() for future in ahead]))
            for submitted in running:
                yield from self._results(submitted)

    def _submit(self, items: Sequence[Item | ItemError]) -> _Batch:
        """Submit the prepared items among `items` as one batch; one image of them all is sent once."""
        ready = [item for item in items if isinstance(item, Item)]
        if not ready:
            return _Batch(items, None, 0.0)
        started = perf_counter()
        images = [item.picture.pixels for item in ready]
        if all(image is images[0] for image in images):
            images = images[:1]
        run = self._run(images, self._preparation.text(ready))
        return _Batch(items, run, milliseconds(started, perf_counter()))

    def _results(self, batch: _Batch) -> Iterator[Prediction | ItemError]:
        """Wait for a batch and yield its results in order; an error takes its item's place."""
        started = perf_counter()
        outputs = {} if batch.run is None else batch.run.result()
        elapsed = batch.submitting + milliseconds(started, perf_counter())
        rows = itertools.count()  # of the outputs, which skip the items that could not be prepared
        ready = sum(isinstance(item, Item) for item in batch.items)
        for item in batch.items:
            if isinstance(item, Item):
                yield self._finish(outputs, next(rows), item, elapsed / ready)
            else:
                yield item

    def _run(self, images: list[np.ndarray], text: dict[str, np.ndarray]) -> Pending:
        """Submit a batch to the backend; raises BackendError in a forked process."""
        # A forked child has none of the parent's threads: the run would wait for them for ever.
        if os.getpid() != self._pid:
            raise BackendError("the Predictor was made before a fork; create it in the process that uses it")
        return self._backend.submit(images, text)

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
                "caption": item.caption,
                "warnings": self._warnings + item.warnings,
                "model": dict(self._model),
                "timing": timing | {"total": sum(timing.values())},
                "thumbnail": picture.thumbnail,
            }
        )
        return leave_out(prediction, item.absent)


def _prepared(job: Prepare, slot: np.ndarray | None) -> Item | ItemError:
    """Prepare one pair of a batch; return the InputError of one that cannot be used."""
    try:
        return job(slot)
    except InputError as error:
        return error


def raised(results: Iterator[Prediction | ItemError]) -> Iterator[Prediction]:
    """The predictions in order; the first error among them is raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result
