"""A process for each backend that `dgm4 bench` measures: a crash of native code ends that one alone."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from engine import Bundle, Prediction, Predictor
from engine.backends import create
from engine.errors import BackendError, Dgm4Error
from engine.inputs.pairs import Pair
from engine.registry import network_of

PICTURE = (640, 480)  # width and height in pixels
_END_LIMIT_S = 5.0


class Call(NamedTuple):
    """Milliseconds of one call and of its parts, which add up to `total`."""

    total: float
    preprocess: float
    inference: float
    postprocess: float


class _Child:
    """A process that runs `target` with its end of a pipe and the arguments; `first` is its first reply."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        """Start the process; raises the Dgm4Error that it sends, BackendError where it ends."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
        self._connection, child = context.Pipe()
        self._process = context.Process(target=target, args=(child, *arguments), daemon=True)
        self._process.start()
        child.close()
        try:
            self.first: Any = self._receive()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_END_LIMIT_S)
        self._process.kill()

    def _ask(self, *request: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # a process that has ended is explained by its status
            self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            reply = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(_END_LIMIT_S)
            status = self._process.exitcode or 0
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise BackendError(f"its process ended with {how}; run it alone, with --backend") from error
        if isinstance(reply, Dgm4Error):
            raise reply
        return reply


class Server(_Child):
    """A Predictor in a child process; `model` is what the Predictor says of itself."""

    def __init__(self, bundle: Path, backend: str, device: str, threads: int | None) -> None:
        """Start the process and load the bundle there; raises what Predictor raises."""
        super().__init__(_serve, bundle, backend, device, threads)
        self.model: dict[str, str] = self.first

    def warm_up(self, batch: int, tokens: int) -> None:
        """Prepare for blank batches of this shape; raises Dgm4Error."""
        self._ask("warm_up", batch, tokens)

    def turn(self, batch: int, caption: str, seconds: float) -> list[Call]:
        """Call for `seconds`, at least once, after one call that does not count; raises Dgm4Error."""
        return self._ask("turn", batch, caption, seconds)


def network_outputs(
    bundle: Path, backend: str, threads: int | None, feeds: Sequence[dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Outputs of a backend on the CPU for each of the feeds, from a process of its own; raises Dgm4Error."""
    child = _Child(_run, bundle, backend, threads, feeds)
    child.close()
    outputs: list[dict[str, np.ndarray]] = child.first
    return outputs


def _run(
    connection: Connection,
    bundle: Path,
    backend: str,
    threads: int | None,
    feeds: list[dict[str, np.ndarray]],
) -> None:
    try:
        network = create(backend, Bundle.open(bundle), "cpu", threads)
        connection.send([network.run(arrays) for arrays in feeds])
    except Dgm4Error as error:
        connection.send(error)


def _serve(connection: Connection, bundle: Path, backend: str, device: str, threads: int | None) -> None:
    """Load, send what was loaded, then serve requests until the other end closes; errors are sent back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    logging.getLogger("engine.predictor").setLevel(logging.ERROR)  # what the weights are does not matter here
    try:
        predictor = Predictor(bundle, backend, device, threads, thumbnail=0)
    except Dgm4Error as error:
        connection.send(error)
        return
    connection.send(predictor.model)
    with predictor, contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            kind, *arguments = connection.recv()
            try:
                connection.send(_reply(predictor, kind, *arguments))
            except Dgm4Error as error:
                connection.send(error)


def _reply(predictor: Predictor, kind: str, batch: int, *rest: Any) -> list[Call] | None:
    if kind == "warm_up":
        predictor.warm_up([(batch, *rest)])
        return None
    caption, seconds = rest
    box = (0, 0, *PICTURE) if network_of(predictor.manifest.model.config).box else None
    return list(take_turn(predictor, [(draw_image(), caption, box)] * batch, seconds))


def draw_image() -> np.ndarray:
    """A decoded image of coarse noise, uint8 [480, 640, 3]."""
    width, height = PICTURE
    coarse = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (height // 20, width // 20, 3))
    return coarse.repeat(20, 0).repeat(20, 1).astype(np.uint8)


def take_turn(predictor: Predictor, pairs: Sequence[Pair], seconds: float) -> Iterator[Call]:
    """As `Server.turn`."""
    _predict(predictor, pairs)
    end = perf_counter() + seconds
    while True:
        yield _call(predictor, pairs)
        if perf_counter() >= end:
            return


def _predict(predictor: Predictor, pairs: Sequence[Pair]) -> list[Prediction]:
    """As a service would ask: one pair by `predict`, which starts no threads to prepare it."""
    return [predictor.predict(*pairs[0])] if len(pairs) == 1 else predictor.predict_batch(pairs)


def _call(predictor: Predictor, pairs: Sequence[Pair]) -> Call:
    start = perf_counter()
    predictions = _predict(predictor, pairs)
    total = 1e3 * (perf_counter() - start)
    # Each prediction holds its share of the batch.
    inference = sum(prediction.timing["inference"] for prediction in predictions)
    postprocess = sum(prediction.timing["postprocess"] for prediction in predictions)
    return Call(total, total - inference - postprocess, inference, postprocess)
