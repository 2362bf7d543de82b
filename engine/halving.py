"""Batches that the device has no memory for, run in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

import numpy as np

from engine.backends.base import Backend, Finished, OutOfMemoryError, Outputs, Pending
from engine.backends.buckets import Arrays
from engine.errors import BackendError

logger = logging.getLogger(__name__)

_REMEMBERED = 60.0  # seconds until the whole batch is tried again: another process may have ended

Images = Sequence[np.ndarray]


class _Fit(NamedTuple):
    """The largest batch that had memory when there was none for a larger one, and until when that counts."""

    pairs: int
    until: float


class Halving:
    """Submits batches to a backend; one that the device has no memory for is run in halves of halves.

    For a minute the next batches are run in parts of the size that fitted.
    """

    def __init__(self, backend: Backend[Any], clock: Callable[[], float] = monotonic) -> None:
        self._backend, self._clock = backend, clock
        self._fit: _Fit | None = None

    def submit(self, images: Images, text: Arrays) -> Pending:
        """Submit one batch as `Backend.submit` does; raises BackendError where not even one pair fits."""
        fit, pairs = self._fit, len(text["input_ids"])
        if fit is not None and pairs > fit.pairs and self._clock() < fit.until:
            return Finished(self.run_in_parts(images, text, fit.pairs))
        try:
            return _Watched(self, self._backend.submit(images, text), images, text)
        except OutOfMemoryError:
            pass  # out of this block, where the error still holds what fills the memory
        return Finished(self.run_in_parts(images, text, max(1, pairs // 2)))

    def run_in_parts(self, images: Images, text: Arrays, size: int) -> Outputs:
        """Run a batch in parts of at most `size` pairs, or of half as many as often as it takes."""
        pairs = len(text["input_ids"])
        while True:
            self._backend.free()
            outputs = self._try_parts(images, text, size)
            if isinstance(outputs, dict):
                break
            if size == 1:
                raise BackendError(
                    f"{outputs}; not even one pair fits: free memory on {self._backend.device}"
                )
            size //= 2
        if self._fit is None or self._clock() >= self._fit.until or size < self._fit.pairs:
            logger.warning("no memory for %d pairs at once: batches have %d for a while", pairs, size)
            self._fit = _Fit(size, self._clock() + _REMEMBERED)
        return outputs

    def _try_parts(self, images: Images, text: Arrays, size: int) -> Outputs | str:
        """The outputs of all parts, or why there was no memory for one."""
        parts = []
        try:
            for start in range(0, len(text["input_ids"]), size):
                rows = slice(start, start + size)
                # One image of all captions stays one.
                some = images if len(images) == 1 else images[rows]
                part = {name: values[rows] for name, values in text.items()}
                parts.append(self._backend.submit(some, part).result())
        except OutOfMemoryError as error:
            return str(error)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Watched(NamedTuple):
    """A submitted batch that is run in parts where the device runs out of memory for it."""

    halving: Halving
    run: Pending
    images: Images
    text: Arrays

    def result(self) -> Outputs:
        try:
            return self.run.result()
        except OutOfMemoryError:
            pass
        return self.halving.run_in_parts(self.images, self.text, max(1, len(self.text["input_ids"]) // 2))
