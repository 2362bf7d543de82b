"""The models that the server's Python backend runs; a repository's model.py names one of them.

The backend calls `initialize` once for each instance, a process of its own, and `execute` with a batch of
requests, each of one pair or several. A request that fails is answered with its own error: the others of
its batch are not touched. `triton_python_backend_utils` exists in the backend's processes alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import triton_python_backend_utils as triton

from engine import Predictor
from engine.backends import usable_cores
from engine.errors import Dgm4Error, InputError, why_no_json
from engine.inputs.preparation import Item, Picture
from engine.prediction import Prediction
from engine.schema import Check, Record, within
from export.inference_server.answers import BUNDLE, PAIR, PICTURE, PIXELS, answer_tensors
from export.inference_server.ends import NetworkEnds

_Pairs = list[tuple[bytes | None, bytes | None]]
# What a stranger may say: numbers that no sum and no product of them makes infinite.
_Pixels = Annotated[int, Check("a number of pixels", lambda value: 1 <= value <= 10**9)]
_Time = Annotated[float, within(0, 1e12)]
_USUAL_TOKENS = 24
FAILURES = "dgm4_failed_requests"  # a counter among the server's metrics


class _Model:
    """Answers each request by itself, and counts those that fail: the server counts an error as a success."""

    def initialize(self, args: dict[str, str]) -> None:
        """See the backend's documentation for `args`."""
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        family = triton.MetricFamily
        self._family = family(FAILURES, "Requests that were answered with an error", family.COUNTER)
        self._failures: dict[str, Any] = {}

    def _respond(self, work: Callable[[], dict[str, np.ndarray]]) -> Any:
        """The response to one request: the tensors that `work` returns, or its error."""
        try:
            tensors = work()
        except Dgm4Error as error:
            return self._failure(error)
        return triton.InferenceResponse([triton.Tensor(name, array) for name, array in tensors.items()])

    def _failure(self, error: Dgm4Error) -> Any:
        kind = type(error).__name__
        if kind not in self._failures:
            self._failures[kind] = self._family.Metric(labels={**self._labels, "error": kind})
        self._failures[kind].increment(1)
        codes = triton.TritonError
        code = codes.INVALID_ARG if isinstance(error, InputError) else codes.INTERNAL
        return triton.InferenceResponse(error=triton.TritonError(str(error), code))


class PredictorModel(_Model):
    """A whole Predictor: a picture's bytes and its caption in, the answer out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify and load the bundle beside model.py, and run a pair and a full batch."""
        super().initialize(args)
        folder = Path(args["model_repository"], args["model_version"], BUNDLE)
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        threads = None if gpu else _threads(json.loads(args["model_config"]))
        self._predictor = Predictor(folder, device=device, threads=threads, thumbnail=0)
        most = self._predictor.manifest.limits.max_batch
        self._predictor.warm_up([(1, _USUAL_TOKENS), (most, _USUAL_TOKENS)])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests, all of their pairs in one batch."""
        jobs = [read_pairs(request) for request in requests]
        try:
            results = self._predictor.predict_batch(list(chain.from_iterable(jobs)), on_error="return")
        except Dgm4Error as error:  # the network failed, which no request is to blame for
            return [self._failure(error) for _ in requests]
        numbered = enumerate(results)
        return [self._respond(partial(_answer, [next(numbered) for _ in job])) for job in jobs]

    def finalize(self) -> None:
        """Release the network."""
        self._predictor.close()


class PrepareModel(_Model):
    """What comes before a network of the server's own: a picture's bytes and its caption to tensors."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the record of the bundle beside config.pbtxt."""
        super().initialize(args)
        self._ends = NetworkEnds(Path(args["model_repository"]))
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="preprocess")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Prepare the pairs of the requests, several at a time."""
        jobs = [self._submit(read_pairs(request)) for request in requests]
        return [self._respond(partial(self._inputs, job)) for job in jobs]

    def finalize(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _submit(self, pairs: _Pairs) -> list[Future[Item]]:
        names = _names(len(pairs))
        return [
            self._pool.submit(self._ends.prepare, name, *pair)
            for name, pair in zip(names, pairs, strict=True)
        ]

    def _inputs(self, job: list[Future[Item]]) -> dict[str, np.ndarray]:
        items = [future.result() for future in job]
        feeds = self._ends.feeds(items)
        notes = [[json.dumps(PictureNote.of(item.picture).to_dict()).encode()] for item in items]
        return {PIXELS: feeds.pop("image"), **feeds, PICTURE: np.array(notes, dtype=object)}


class AnswerModel(_Model):
    """What comes after a network of the server's own: its outputs to the answer."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the record of the bundle beside config.pbtxt."""
        super().initialize(args)
        self._ends = NetworkEnds(Path(args["model_repository"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests, one by one."""
        return [self._respond(partial(self._answer, request)) for request in requests]

    def _answer(self, request: Any) -> dict[str, np.ndarray]:
        outputs = {spec.name: _read(request, spec.name) for spec in self._ends.manifest.outputs}
        notes = [PictureNote.from_json(text) for text in _read(request, PICTURE)[:, 0]]
        captions = _column(request, "caption", len(notes))
        items = [
            self._ends.join(name, note.picture(), caption)
            for name, note, caption in zip(_names(len(notes)), notes, captions, strict=True)
        ]
        waited = 1000 * (time.time() - min(note.prepared for note in notes))
        return answer_tensors(list(self._ends.answers(items, outputs, waited)))


@dataclass(frozen=True, kw_only=True)
class PictureNote(Record):
    """What an answer needs of a prepared picture but its pixels; `prepared` is when it was, in epoch seconds.

    Anyone who can reach the server can send one.
    """

    document: ClassVar[str] = PICTURE
    error: ClassVar[type[Dgm4Error]] = InputError

    size: tuple[_Pixels, _Pixels] | None
    warnings: tuple[str, ...]
    timing: dict[str, _Time]
    prepared: _Time

    @classmethod
    def of(cls, picture: Picture) -> PictureNote:
        """The note of a picture that has just been prepared."""
        return cls(size=picture.size, warnings=picture.warnings, timing=picture.timing, prepared=time.time())

    @classmethod
    def from_json(cls, text: bytes) -> PictureNote:
        """Read a note; raises InputError."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{PICTURE}: expected JSON: {why_no_json(error)}") from error
        return cls.from_dict(raw)

    def picture(self) -> Picture:
        """The picture without its pixels."""
        return Picture(np.empty(0, np.uint8), self.size, None, self.warnings, self.timing)


def read_pairs(request: Any) -> _Pairs:
    """The pairs of a request; None for an input that it leaves out."""
    given = [x for name, *_ in PAIR if (x := triton.get_input_tensor_by_name(request, name)) is not None]
    count = len(given[0].as_numpy())  # the server has seen that there is one, and that all are as long
    return list(zip(*(_column(request, name, count) for name, *_ in PAIR), strict=True))


def _column(request: Any, name: str, count: int) -> list[bytes | None]:
    """The bytes of an input [count, 1], all None where the request leaves it out."""
    tensor = triton.get_input_tensor_by_name(request, name)
    return [None] * count if tensor is None else list(tensor.as_numpy()[:, 0])


def _read(request: Any, name: str) -> np.ndarray:
    array: np.ndarray = triton.get_input_tensor_by_name(request, name).as_numpy()
    return array


def _answer(results: list[tuple[int, Prediction | Dgm4Error]]) -> dict[str, np.ndarray]:
    """The tensors of one request's results; raises the first error among them.

    `results` have their number in the batch, which an error names and a client does not know.
    """
    predictions = []
    for name, (number, result) in zip(_names(len(results)), results, strict=True):
        if isinstance(result, Dgm4Error):
            message = str(result).removeprefix(f"item {number}: ")
            raise type(result)(f"{name}: {message}") from result
        predictions.append(result)
    return answer_tensors(predictions)


def _names(count: int) -> list[str]:
    """What messages call the pairs of a request."""
    return ["the pair"] if count == 1 else [f"pair {i}" for i in range(count)]


def _threads(config: dict[str, Any]) -> int:
    """CPU threads of an instance: those of the configuration, or a share of the usable cores."""
    if "threads" in config["parameters"]:
        return int(config["parameters"]["threads"]["string_value"])
    return max(1, usable_cores() // sum(group["count"] for group in config["instance_group"]))
