"""The Predictor: images and captions in, Predictions out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

from engine.backends import create, rebuilt
from engine.backends.buckets import buckets
from engine.bundle import Bundle
from engine.errors import InputError, quoted
from engine.inputs.boxes import Box
from engine.inputs.options import ImageOptions, check_count
from engine.inputs.pairs import Caption, Pair, check_list, check_shapes, join_pairs
from engine.inputs.preparation import Preparation
from engine.inputs.sources import ImageInput
from engine.inputs.text import CaptionTokenizer
from engine.logs import warn_once
from engine.manifest import Manifest
from engine.prediction import Prediction
from engine.registry import network_of
from engine.running import ItemError, OnError, Runner, raised
from engine.signing import PublicKey, key_in_use

logger = logging.getLogger(__name__)

THUMBNAIL_SIDE = 1024
_WARM_UP = (1, 24)


class Predictor:
    """Serves one bundle.

    Safe to share between threads. Not across a fork: create it in the process that uses it. It is pickled by
    its bundle's path and its options, so a spawned worker, or one of Ray, Spark or Celery, opens the bundle
    again; there it must be the same bundle at the same path.

    Pairs of a batch are padded to the longest caption of that batch. The padding is masked, so with float
    weights a prediction depends on the rest of its batch only by rounding. Dynamic INT8 uses one activation
    scale for the whole batch, so that there a score can change slightly with it.

    Examples:
        >>> from engine import Predictor
        >>> with Predictor("my-bundle", thresholds={"manipulated": 0.7}) as predictor:
        ...     predictor.predict("photo.jpg", "Obama speaks")
        Prediction(not manipulated 0.59; 2 of 2 words)
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
        public_key: PublicKey | None = None,
    ):
        """Open, verify and load a bundle.

        `threads` is the number of CPU threads of the network (None: every usable core, within a container's
        quota); `thumbnail` the longer side in pixels of a Prediction's thumbnail, 0 for none; `thresholds`
        such as {"manipulated": 0.8, "face_swap": 0.5, "words": 0.6} replace the bundle's, each by itself,
        "types" those of all four types. With `rebuild` a bundle without an engine for this machine's GPU gets
        one first, on disk too, which can take many minutes. An engine is checked here and loaded at the first
        run: call `warm_up` to load it before. With `public_key`, or the environment's
        DGM4_PUBLIC_KEY, the path of one, the bundle must be signed by its owner: see `Bundle.open`.
        Raises BundleError for a bundle that is incomplete or altered, BackendError for what this machine
        lacks, EngineMismatchError for an engine of another machine, InputError for a threshold of an unknown
        name or outside [0, 1], a negative thumbnail and other image options than an `ImageOptions`.
        """
        if not isinstance(image_options, ImageOptions | None):
            kind = type(image_options).__name__
            raise InputError(f"image_options: expected an engine.ImageOptions, got {kind}")
        thumbnail = check_count("thumbnail", thumbnail, least=0)
        self._options: dict[str, Any] = {
            "backend": backend,
            "device": device,
            "threads": threads,
            "image_options": image_options,
            "thumbnail": thumbnail,
            "thresholds": thresholds,
        }
        key = key_in_use(public_key)
        if rebuild and key is not None:
            raise InputError("rebuild: changes a bundle that must be signed; rebuild it first, then sign it")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, public_key=key)
        elif key is not None and bundle.public_key != key:
            bundle = Bundle.open(bundle.path, public_key=key)
        self.bundle = bundle
        if rebuild:
            self.bundle = rebuilt(backend, self.bundle, device)
        manifest = self.bundle.manifest
        self._manifest = replace(manifest, thresholds=manifest.thresholds.replaced(thresholds or {}))
        spec = self.manifest.preprocess
        tokenizer = CaptionTokenizer.of(self.bundle)
        self._backend = create(backend, self.bundle, device, threads)
        self._preparation = Preparation(
            spec,
            network_of(manifest.model.config),
            tokenizer,
            self.image_options,
            thumbnail,
            resize=not self._backend.resizes,
        )
        warnings = _weights_warning(manifest)
        self._runner = Runner(self._backend, self._preparation, self._manifest, self.model, warnings)
        logger.debug("%r is ready", self)

    @property
    def image_options(self) -> ImageOptions:
        """How images are read, and the largest that are."""
        return self._options["image_options"] or ImageOptions()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, with the thresholds in use."""
        return self._manifest

    @property
    def model(self) -> dict[str, str]:
        """Name, size, precision and kind of weights, the backend and device that run it, and why that one."""
        info = self.manifest.model
        return {
            "name": info.name,
            "size": info.size,
            "precision": self.manifest.precision,
            "backend": self._backend.name,
            "device": self._backend.device,
            "weights": self.manifest.weights.kind,
            "chosen": self._backend.chosen,
        }

    def predict(
        self, image: ImageInput | None, caption: Caption | None, box: Box | None = None
    ) -> Prediction:
        """Predict one pair; calling the Predictor does the same.

        `image` is a path, the bytes of a JPEG, PNG, WebP, BMP or GIF file, a file object that is open for
        reading bytes, a PIL image, an array of height x width (x 3) or a torch tensor of that shape or of
        3 x height x width, as uint8 or as floats in [0, 1]; `caption` is str or UTF-8 bytes.

        Without a caption (None) the box and the face types are answered, without an image the words and the
        text types; all that is about both is None, and a warning says so. An empty caption is a caption.

        `box` is for a network that judges a given one: (x1, y1, x2, y2) in pixels of the upright image, where
        a face detector or an editor points.

        Raises InputError for an image, caption or box that cannot be used, NumericalError for outputs that
        are NaN or infinite, BackendError where the run fails.

        Examples:
            >>> from engine import Predictor
            >>> predictor = Predictor("my-bundle")
            >>> predictor("photo.jpg", "Obama speaks").manipulated
            True
            >>> predictor.predict("photo.jpg", None).warnings[0].partition(":")[0]
            'no_caption'
        """
        return next(raised(iter([self._runner.one(image, caption, box)])))

    __call__ = predict

    @overload
    def predict_batch(
        self,
        pairs: Sequence[Pair] | Sequence[ImageInput | None],
        captions: Sequence[Caption | None] | None = None,
        *,
        on_error: Literal["raise"] = "raise",
        batch_size: int | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict_batch(
        self,
        pairs: Sequence[Pair] | Sequence[ImageInput | None],
        captions: Sequence[Caption | None] | None = None,
        *,
        on_error: OnError,
        batch_size: int | None = None,
    ) -> list[Prediction | ItemError]: ...

    def predict_batch(
        self,
        pairs: Sequence[Pair] | Sequence[ImageInput | None],
        captions: Sequence[Caption | None] | None = None,
        *,
        on_error: OnError = "raise",
        batch_size: int | None = None,
    ) -> list[Prediction] | list[Prediction | ItemError]:
        """Predict many pairs, in order: `predict_batch([(image, caption), ...])` or `(images, captions)`.

        A pair may be a mapping, {"image": ..., "caption": ...}. For a network that judges a given box it is
        (image, caption, box), or has "box". Runs in batches of `batch_size` (None: the bundle's largest).
        With on_error="raise" the first pair that fails raises InputError or NumericalError naming its index;
        with "return" the error takes its place. Raises InputError for lists of unequal length.

        Examples:
            >>> from engine import Predictor
            >>> pairs = [("photo.jpg", "Obama speaks"), {"image": "photo.jpg", "caption": "the president"}]
            >>> [prediction.caption for prediction in Predictor("my-bundle").predict_batch(pairs)]
            ['Obama speaks', 'the president']
        """
        joined = join_pairs(pairs, captions)
        return list(self.stream(joined, batch_size=self._largest(batch_size), on_error=on_error))

    @overload
    def predict_captions(
        self,
        image: ImageInput | None,
        captions: Sequence[Caption | None],
        *,
        on_error: Literal["raise"] = "raise",
        batch_size: int | None = None,
        box: Box | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict_captions(
        self,
        image: ImageInput | None,
        captions: Sequence[Caption | None],
        *,
        on_error: OnError,
        batch_size: int | None = None,
        box: Box | None = None,
    ) -> list[Prediction | ItemError]: ...

    def predict_captions(
        self,
        image: ImageInput | None,
        captions: Sequence[Caption | None],
        *,
        on_error: OnError = "raise",
        batch_size: int | None = None,
        box: Box | None = None,
    ) -> list[Prediction] | list[Prediction | ItemError]:
        """Predict several captions of one image, in order; the image is decoded and resized once.

        The backend "torch" on a CPU also runs the visual encoder once for each batch. The others run their
        graph, which is one network, for every caption. Batches and errors are as for `predict_batch`; an
        image that cannot be read always raises InputError.

        Examples:
            >>> from engine import Predictor
            >>> captions = ["Obama speaks", "the president in person"]
            >>> Predictor("my-bundle").predict_captions("photo.jpg", captions)
            [Prediction(manipulated 0.59; 2 of 2 words), Prediction(manipulated 0.63; 4 of 4 words)]
        """
        check_list("a list of captions", captions)
        self._check_on_error(on_error)
        size = self._largest(batch_size)
        results = self._runner.captions(image, captions, box, size) if len(captions) else iter(())
        return list(results) if on_error == "return" else list(raised(results))

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

        Examples:
            >>> from engine import Predictor
            >>> pairs = (("photo.jpg", f"Obama speaks {i}") for i in range(100))
            >>> sum(prediction.manipulated for prediction in Predictor("my-bundle").stream(pairs))
            100
        """
        self._check_on_error(on_error)
        if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
            raise InputError(f"expected an iterable of (image, caption) pairs, got {type(pairs).__name__}")
        results = self._runner.pairs(pairs, self._largest(batch_size))
        return results if on_error == "return" else raised(results)

    def warm_up(self, shapes: Iterable[tuple[int, int]] = (_WARM_UP,), *, all_buckets: bool = False) -> None:
        """Run a blank batch of each of these (pairs, tokens), so that real batches do not pay for set-up.

        Tokens are those of the longest caption, [CLS] included. Numbers above the bundle's largest are
        lowered to it. A GPU captures a graph for each bucket of shapes at its first batch, which can take
        seconds while all other calls wait. This captures those of `shapes`; with `all_buckets` those of every
        bucket within the bundle's limits instead, 48 at the usual limits. A TensorRT engine is warmed up in
        one of the lanes that serve concurrent calls.
        Raises InputError for numbers below 1.

        Examples:
            >>> from engine import Predictor
            >>> Predictor("my-bundle").warm_up([(1, 24), (4, 50)])
        """
        limits = self.manifest.limits
        chosen = buckets(limits) if all_buckets else check_shapes(shapes)
        # The largest first: on a GPU the others fit into its memory.
        for batch, tokens in sorted(chosen, reverse=True):
            self._runner.blank(min(batch, limits.max_batch), tokens)

    def close(self) -> None:
        """Release the network; later calls raise BackendError.

        Examples:
            >>> from engine import Predictor
            >>> predictor = Predictor("my-bundle")
            >>> predictor.close()
        """
        self._backend.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._options), (self.bundle,)

    def __repr__(self) -> str:
        return f"Predictor({str(self.bundle.path)!r}, {' '.join(self.model.values())})"

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _largest(self, batch_size: int | None) -> int:
        """The size of batches: the bundle's largest, or less where that is asked for."""
        most = self.manifest.limits.max_batch
        return most if batch_size is None else min(check_count("batch_size", batch_size, least=1), most)

    @staticmethod
    def _check_on_error(on_error: object) -> None:
        if on_error not in ("raise", "return"):
            raise InputError(f'expected on_error "raise" or "return", got {quoted(on_error)}')


def _weights_warning(manifest: Manifest) -> tuple[str, ...]:
    warning = manifest.weights.warning
    if warning is None:
        return ()
    warn_once(logger, warning)
    return (warning,)
