"""The Predictor: pictures and captions in, Predictions out."""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Literal, NamedTuple, overload

import numpy as np

from engine.backends import PictureBackend, create, rebuilt, usable_cores
from engine.bundle import Bundle
from engine.errors import BackendError, InputError, NumericalError
from engine.inputs.pairs import Caption, Pair, check_shapes, join_pairs, unpack_pair
from engine.inputs.preparation import Item, Preparation, milliseconds
from engine.inputs.preprocess import ImageInput, ImageOptions
from engine.inputs.text import CaptionTokenizer
from engine.layout import TOKENIZER
from engine.manifest import Manifest, Thresholds
from engine.postprocess import read_answer
from engine.result import Prediction

logger = logging.getLogger(__name__)

OnError = Literal["raise", "return"]
# What stands in a failed item's place with on_error="return".
ItemError = InputError | NumericalError

THUMBNAIL_SIDE = 1024
_MAX_WORKERS = 4  # beside a network on the CPU, whose cores they share
_WARM_UP = (1, 24)

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Job:
    """A pair to prepare: its place in the messages, and the pair or the error of its shape."""

    name: str
    pair: object


class _Batch(NamedTuple):
    """Items on their way, in order, and what waits for the results of those that could be prepared."""

    items: list[Item | ItemError]
    results: Callable[[], list[Prediction | NumericalError]]


class Predictor:
    """Serves one bundle.

    Safe to share between threads. Not across a fork: create it in the process that uses it.

    Pairs of a batch are padded to the longest caption of that batch. The padding is masked, so with
    float weights the answer for a pair moves by no more than rounding with its batch mates. Dynamic
    INT8 picks one activation scale for the whole batch: there a score can move slightly with them.
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
        longer side in pixels of the picture that a Prediction keeps, 0 to keep none; `thresholds` such as
        {"manipulated": 0.8, "types": 0.5, "words": 0.6} stand in for the bundle's, each by itself. With
        `rebuild` a bundle without an engine for this machine's GPU gets one first, on disk too, which can
        take many minutes. An engine is checked here and loaded at the first run: call `warm_up` where
        that should not be a user's.
        Raises BundleError for a bundle that is incomplete or altered, BackendError for what this machine
        lacks, EngineMismatchError for an engine of another one, InputError for a threshold of an unknown name
        or outside [0, 1] and for other image options than an `ImageOptions`.
        """
        if not isinstance(image_options, ImageOptions | None):
            kind = type(image_options).__name__
            raise InputError(f"image_options: expected an engine.ImageOptions, got {kind}")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if rebuild:
            self.bundle = rebuilt(backend, self.bundle, device)
        manifest = self.bundle.manifest
        self._manifest = replace(manifest, thresholds=_thresholds(manifest.thresholds, thresholds or {}))
        spec = self.manifest.preprocess
        tokenizer = CaptionTokenizer(self.bundle.verified(TOKENIZER), spec.max_words, spec.max_tokens)
        self._backend = create(backend, self.bundle, device, threads)
        self._pictures = self._backend if isinstance(self._backend, PictureBackend) else None
        decoded = self._pictures is not None
        self._preparation = Preparation(spec, tokenizer, image_options or ImageOptions(), thumbnail, decoded)
        self._pid = os.getpid()
        self._warnings = _weights_warning(self.manifest)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, with the thresholds in use."""
        return self._manifest

    @property
    def model(self) -> dict[str, str]:
        """Name, size and precision of the model, and the backend and device that run it."""
        info = self.manifest.model
        return {
            "name": info.name,
            "size": info.size,
            "precision": self.manifest.precision,
            "backend": self._backend.name,
            "device": self._backend.device,
        }

    def predict(self, image: ImageInput, caption: Caption) -> Prediction:
        """Answer one pair.

        `image` is a path, the bytes of a JPEG, PNG, WebP, BMP or GIF file, a PIL image, or an array of
        height x width (x 3) as uint8 or as floats in [0, 1]; `caption` is str or UTF-8 bytes.
        Raises InputError for a picture or caption that cannot be used, NumericalError for a
        network that answers NaN or infinity, BackendError where the run fails.
        """
        item = self._preparation.pair("", image, caption)
        result = self._start([item])()[0]
        if isinstance(result, Exception):
            raise result
        return result

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
        """Answer many pairs, in order: `predict_batch([(image, caption), ...])` or `(images, captions)`.

        Runs in batches of `batch_size` (None: the bundle's largest). With on_error="raise" the first pair
        that fails raises InputError or NumericalError naming its index; with "return" the error stands in
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
        """Answer pairs from an iterable of any length, lazily and in order.

        Reads one batch ahead: the next batch is prepared in threads while the network runs, so a batch's
        answers come once the batch after it was read. Never holds more than two batches; on a GPU one more,
        which is copied there meanwhile. A `batch_size` above the bundle's largest is lowered to it. Errors
        as for `predict_batch`.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f'expected on_error "raise" or "return", got {on_error!r}')
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"expected a batch_size of at least 1, got {batch_size!r}")
        return self._stream(pairs, min(batch_size, self.manifest.limits.max_batch), on_error)

    def warm_up(self, shapes: Iterable[tuple[int, int]] = (_WARM_UP,)) -> None:
        """Run a blank batch of each of these (pairs, tokens), so that real ones do not pay for set-up.

        Tokens are those of the longest caption, [CLS] included. A GPU captures the graphs of these shapes,
        and takes the memory of the largest; a shape that is not among them is captured when it comes.
        Numbers above the bundle's largest are lowered to it; raises InputError for those below 1.
        """
        # The largest first: on a GPU the others fit into its memory.
        for batch, tokens in sorted(check_shapes(shapes), reverse=True):
            self._run(*self._preparation.blank(min(batch, self.manifest.limits.max_batch), tokens))()

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
        beside = 0 if self._pictures is None else 1  # batches that run while the next is copied
        with ThreadPoolExecutor(workers, thread_name_prefix="preprocess") as pool:
            ahead: list[Future[Item | ItemError]] = []
            running: deque[_Batch] = deque()
            while jobs := list(itertools.islice(numbered, batch_size)):
                current, ahead = ahead, [pool.submit(self._prepare, job) for job in jobs]
                running.append(self._start_batch(current))
                if len(running) > beside:
                    yield from self._results(running.popleft(), on_error)
            running.append(self._start_batch(ahead))
            for batch in running:
                yield from self._results(batch, on_error)

    def _start_batch(self, prepared: list[Future[Item | ItemError]]) -> _Batch:
        items = [future.result() for future in prepared]
        return _Batch(items, self._start([item for item in items if isinstance(item, Item)]))

    def _results(self, batch: _Batch, on_error: OnError) -> Iterator[Prediction | ItemError]:
        """Wait for a batch and yield all its results in their order."""
        answers = iter(batch.results())
        for item in batch.items:
            result = next(answers) if isinstance(item, Item) else item
            if on_error == "raise" and isinstance(result, Exception):
                raise result
            yield result

    def _prepare(self, job: _Job) -> Item | ItemError:
        """Prepare one pair of a batch; its InputError is the result where it cannot be used."""
        try:
            image, caption = unpack_pair(job.name, job.pair)
            return self._preparation.pair(job.name, image, caption)
        except InputError as error:
            return error

    def _start(self, items: list[Item]) -> Callable[[], list[Prediction | NumericalError]]:
        """Begin to answer prepared items as one batch; what is returned waits for their results."""
        if not items:
            return list
        started = perf_counter()
        wait = self._run([item.pixels for item in items], self._preparation.text(items))
        return partial(self._collect, items, wait, milliseconds(started, perf_counter()))

    def _collect(
        self, items: list[Item], wait: Callable[[], Outputs], spent: float
    ) -> list[Prediction | NumericalError]:
        """Make the results of a batch; a NumericalError stands in the place of its item."""
        started = perf_counter()
        outputs = wait()
        share = (spent + milliseconds(started, perf_counter())) / len(items)
        results: list[Prediction | NumericalError] = []
        for index, item in enumerate(items):
            try:
                results.append(self._finish(outputs, index, item, share))
            except NumericalError as error:
                results.append(error)
        return results

    def _run(self, pixels: list[np.ndarray], text: dict[str, np.ndarray]) -> Callable[[], Outputs]:
        """Begin a batch where the backend can; else it runs when its answers are asked for."""
        # A forked child has none of the parent's threads: the run would wait for them for ever.
        if os.getpid() != self._pid:
            raise BackendError("the Predictor was made before a fork; create it in the process that uses it")
        if self._pictures is not None:
            return self._pictures.start(pixels, text)
        return partial(self._backend.run, {"image": np.stack(pixels), **text})

    def _finish(self, outputs: Outputs, index: int, item: Item, inference: float) -> Prediction:
        started = perf_counter()
        answer = read_answer(outputs, index, item.tokens, item.size, self.manifest, item.name or "the pair")
        timing = item.timing | {
            "inference": inference,
            "postprocess": milliseconds(started, perf_counter()),
        }
        return Prediction(
            **vars(answer),
            caption=item.caption,
            size=item.size,
            warnings=self._warnings + item.warnings,
            model=self.model,
            timing=timing | {"total": sum(timing.values())},
            thumbnail=item.thumbnail,
        )


def _thresholds(own: Thresholds, given: Mapping[str, float]) -> Thresholds:
    """The bundle's thresholds with those given put in; raises InputError."""
    known = vars(own)
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise InputError(f"thresholds: expected a mapping with some of {', '.join(known)}, got {given!r}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"thresholds[{name!r}]: expected a number from 0 to 1, got {value!r}")
    return replace(own, **given)


def _weights_warning(manifest: Manifest) -> tuple[str, ...]:
    if manifest.weights.trained:
        return ()
    logger.warning("the bundle's weights are untrained (%s)", manifest.weights.source)
    return (f"untrained_weights: the scores mean nothing ({manifest.weights.source})",)
