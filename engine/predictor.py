"""The Predictor: images and captions in, Predictions out."""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Real
from time import perf_counter
from typing import Literal, NamedTuple, cast, overload

import numpy as np

from engine.backends import create, rebuilt, usable_cores
from engine.backends.base import Pending
from engine.backends.buckets import buckets
from engine.bundle import Bundle
from engine.errors import BackendError, InputError, NumericalError
from engine.inputs.pairs import Caption, Pair, check_shapes, join_pairs, unpack_pair
from engine.inputs.preparation import Item, Preparation, milliseconds
from engine.inputs.preprocess import ImageInput, ImageOptions, check_count
from engine.inputs.text import CaptionTokenizer
from engine.layout import TOKENIZER
from engine.manifest import Manifest, Thresholds
from engine.postprocess import read_result
from engine.prediction import Prediction

logger = logging.getLogger(__name__)

OnError = Literal["raise", "return"]
# What takes a failed item's place with on_error="return".
ItemError = InputError | NumericalError

THUMBNAIL_SIDE = 1024
_MAX_WORKERS = 4  # beside a network on the CPU, whose cores they share
_WARM_UP = (1, 24)


@dataclass(frozen=True)
class _Job:
    """A pair to prepare: its place in the messages, and the pair or the error of its shape."""

    name: str
    pair: object


class _Batch(NamedTuple):
    """A submitted batch: its items in order, and the run of those that could be prepared.

    `submitting` is the time of the submission in milliseconds, on a CPU that of the network's run.
    """

    items: Sequence[Item | ItemError]
    run: Pending | None
    submitting: float


class Predictor:
    """Serves one bundle.

    Safe to share between threads. Not across a fork: create it in the process that uses it.

    Pairs of a batch are padded to the longest caption of that batch. The padding is masked, so with float
    weights a prediction depends on the rest of its batch only by rounding. Dynamic INT8 uses one activation
    scale for the whole batch, so that there a score can change slightly with it.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        image_options: ImageOptions | None = None,
        thumbnail: int = THUMBNAIL_SIDE,
        thresholds: Mapping[str, float] | None = None,
        rebuild: bool = False,
    ):
        """Open, verify and load a bundle.

        `threads` is the number of CPU threads of the network (None: every usable core); `thumbnail` the
        longer side in pixels of a Prediction's thumbnail, 0 for none; `thresholds` such as {"manipulated":
        0.8, "face_swap": 0.5, "words": 0.6} replace the bundle's, each by itself, "types" those of all four
        types. With `rebuild` a bundle without an engine for this machine's GPU gets one first, on disk too,
        which can take many minutes. An engine is checked here and loaded at the first run: call `warm_up` to
        load it before.
        Raises BundleError for a bundle that is incomplete or altered, BackendError for what this machine
        lacks, EngineMismatchError for an engine of another machine, InputError for a threshold of an unknown
        name or outside [0, 1], a negative thumbnail and other image options than an `ImageOptions`.
        """
        if not isinstance(image_options, ImageOptions | None):
            kind = type(image_options).__name__
            raise InputError(f"image_options: expected an engine.ImageOptions, got {kind}")
        check_count("thumbnail", thumbnail, least=0)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if rebuild:
            self.bundle = rebuilt(backend, self.bundle, device)
        manifest = self.bundle.manifest
        self._manifest = replace(manifest, thresholds=_thresholds(manifest, thresholds or {}))
        spec = self.manifest.preprocess
        tokenizer = CaptionTokenizer(
            self.bundle.path / TOKENIZER, spec.max_words, spec.max_tokens, self.bundle.read(TOKENIZER)
        )
        self._backend = create(backend, self.bundle, device, threads)
        self._preparation = Preparation(
            spec, tokenizer, image_options or ImageOptions(), thumbnail, resize=not self._backend.resizes
        )
        self._pid = os.getpid()
        self._warnings = _weights_warning(self.manifest)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, with the thresholds in use."""
        return self._manifest

    @property
    def model(self) -> dict[str, str]:
        """Name, size and precision of the model, what runs it and where, and the kind of its weights."""
        info = self.manifest.model
        return {
            "name": info.name,
            "size": info.size,
            "precision": self.manifest.precision,
            "backend": self._backend.name,
            "device": self._backend.device,
            "weights": self.manifest.weights.kind,
        }

    def predict(self, image: ImageInput, caption: Caption) -> Prediction:
        """Predict one pair.

        `image` is a path, the bytes of a JPEG, PNG, WebP, BMP or GIF file, a PIL image, or an array of
        height x width (x 3) as uint8 or as floats in [0, 1]; `caption` is str or UTF-8 bytes.
        Raises InputError for an image or caption that cannot be used, NumericalError for outputs that are NaN
        or infinite, BackendError where the run fails.
        """
        item = self._preparation.pair("", image, caption)
        return cast(Prediction, next(self._results(self._submit([item]), "raise")))

    @overload
    def predict_batch(
        self,
        pairs: Sequence[Pair] | Sequence[ImageInput],
        captions: Sequence[Caption] | None = None,
        *,
        on_error: Literal["raise"] = "raise",
        batch_size: int | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict_batch(
        self,
        pairs: Sequence[Pair] | Sequence[ImageInput],
        captions: Sequence[Caption] | None = None,
        *,
        on_error: OnError,
        batch_size: int | None = None,
    ) -> list[Prediction | ItemError]: ...

    def predict_batch(
        self,
        pairs: Sequence[Pair] | Sequence[ImageInput],
        captions: Sequence[Caption] | None = None,
        *,
        on_error: OnError = "raise",
        batch_size: int | None = None,
    ) -> list[Prediction] | list[Prediction | ItemError]:
        """Predict many pairs, in order: `predict_batch([(image, caption), ...])` or `(images, captions)`.

        Runs in batches of `batch_size` (None: the bundle's largest). With on_error="raise" the first pair
        that fails raises InputError or NumericalError naming its index; with "return" the error takes
        its place. Raises InputError for lists of unequal length.
        """
        joined = join_pairs(pairs, captions)
        size = self.manifest.limits.max_batch if batch_size is None else batch_size
        return list(self.stream(joined, batch_size=size, on_error=on_error))

    @overload
    def stream(
        self, pairs: Iterable[Pair], batch_size: int = 32, on_error: Literal["raise"] = "raise"
    ) -> Iterator[Prediction]: ...

    @overload
    def stream(
        self, pairs: Iterable[Pair], batch_size: int = 32, *, on_error: OnError
    ) -> Iterator[Prediction | ItemError]: ...

    def stream(
        self, pairs: Iterable[Pair], batch_size: int = 32, on_error: OnError = "raise"
    ) -> Iterator[Prediction] | Iterator[Prediction | ItemError]:
        """Predict pairs from an iterable of any length, lazily and in order.

        Reads one batch ahead: the next batch is prepared in threads while the network runs, so a batch's
        predictions come once the batch after it was read. Holds two batches at most; on a GPU one more, which
        is copied there meanwhile. A `batch_size` above the bundle's largest is lowered to it. Errors
        as for `predict_batch`.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f'expected on_error "raise" or "return", got {on_error!r}')
        check_count("batch_size", batch_size, least=1)
        if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
            raise InputError(f"expected an iterable of (image, caption) pairs, got {type(pairs).__name__}")
        return self._stream(pairs, min(batch_size, self.manifest.limits.max_batch), on_error)

    def warm_up(self, shapes: Iterable[tuple[int, int]] = (_WARM_UP,), *, all_buckets: bool = False) -> None:
        """Run a blank batch of each of these (pairs, tokens), so that real batches do not pay for set-up.

        Tokens are those of the longest caption, [CLS] included. Numbers above the bundle's largest are
        lowered to it. A GPU captures a graph for each bucket of shapes at its first batch, which can take
        seconds while all other calls wait. This captures those of `shapes`; with `all_buckets` those of every
        bucket within the bundle's limits instead, 48 at the usual limits. A TensorRT engine is warmed up in
        one of the lanes that serve concurrent calls.
        Raises InputError for numbers below 1.
        """
        limits = self.manifest.limits
        chosen = buckets(limits) if all_buckets else check_shapes(shapes)
        # The largest first: on a GPU the others fit into its memory.
        for batch, tokens in sorted(chosen, reverse=True):
            self._run(*self._preparation.blank(min(batch, limits.max_batch), tokens)).result()

    def close(self) -> None:
        """Release the network; later calls raise BackendError."""
        self._backend.close()

    def __repr__(self) -> str:
        return f"Predictor({str(self.bundle.path)!r}, {' '.join(self.model.values())})"

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(
        self, pairs: Iterable[Pair], batch_size: int, on_error: OnError
    ) -> Iterator[Prediction | ItemError]:
        numbered = (_Job(f"item {i}", pair) for i, pair in enumerate(pairs))
        most = _MAX_WORKERS if self._backend.device == "cpu" else usable_cores()
        workers = min(most, usable_cores(), batch_size)
        running_at_once = 1 if self._backend.asynchronous else 0  # while the next batch is submitted
        with ThreadPoolExecutor(workers, thread_name_prefix="preprocess") as pool:
            ahead: list[Future[Item | ItemError]] = []
            running: deque[_Batch] = deque()
            while jobs := list(itertools.islice(numbered, batch_size)):
                current, ahead = ahead, [pool.submit(self._prepare, job) for job in jobs]
                running.append(self._submit([future.result() for future in current]))
                if len(running) > running_at_once:
                    yield from self._results(running.popleft(), on_error)
            running.append(self._submit([future.result() for future in ahead]))
            for batch in running:
                yield from self._results(batch, on_error)

    def _prepare(self, job: _Job) -> Item | ItemError:
        """Prepare one pair of a batch; return the InputError of one that cannot be used."""
        try:
            image, caption = unpack_pair(job.name, job.pair)
            return self._preparation.pair(job.name, image, caption)
        except InputError as error:
            return error

    def _submit(self, items: Sequence[Item | ItemError]) -> _Batch:
        """Submit the prepared items among `items` as one batch."""
        ready = [item for item in items if isinstance(item, Item)]
        if not ready:
            return _Batch(items, None, 0.0)
        started = perf_counter()
        run = self._run([item.pixels for item in ready], self._preparation.text(ready))
        return _Batch(items, run, milliseconds(started, perf_counter()))

    def _results(self, batch: _Batch, on_error: OnError) -> Iterator[Prediction | ItemError]:
        """Wait for a batch and yield its results in order; an error is raised, or takes its item's place."""
        started = perf_counter()
        outputs = {} if batch.run is None else batch.run.result()
        elapsed = batch.submitting + milliseconds(started, perf_counter())
        rows = itertools.count()  # of the outputs, which skip the items that could not be prepared
        ready = sum(isinstance(item, Item) for item in batch.items)
        for item in batch.items:
            result = (
                self._finish(outputs, next(rows), item, elapsed / ready) if isinstance(item, Item) else item
            )
            if on_error == "raise" and isinstance(result, Exception):
                raise result
            yield result

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
        started = perf_counter()
        try:
            result = read_result(outputs, row, item.tokens, item.size, self.manifest, item.name or "the pair")
        except NumericalError as error:
            return error
        timing = item.timing | {
            "inference": inference,
            "postprocess": milliseconds(started, perf_counter()),
        }
        return Prediction(
            **vars(result)
            | {
                "caption": item.caption,
                "warnings": self._warnings + item.warnings,
                "model": self.model,
                "timing": timing | {"total": sum(timing.values())},
                "thumbnail": item.thumbnail,
            }
        )


def _thresholds(manifest: Manifest, given: Mapping[str, float]) -> Thresholds:
    """Replace some of the bundle's thresholds; raises InputError."""
    defaults = manifest.thresholds
    names = (*vars(defaults), "types")
    if not isinstance(given, Mapping) or not set(given) <= set(names):
        raise InputError(f"thresholds: expected a mapping with some of {', '.join(names)}, got {given!r}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            raise InputError(f"thresholds[{name!r}]: expected a number from 0 to 1, got {value!r}")
    groups = dict.fromkeys(manifest.types, given["types"]) if "types" in given else {}
    return replace(defaults, **groups | {name: x for name, x in given.items() if name != "types"})


def _weights_warning(manifest: Manifest) -> tuple[str, ...]:
    warning = manifest.weights.warning
    if warning is None:
        return ()
    logger.warning("%s", warning)
    return (warning,)
