"""The queue of a Batcher: pairs that wait to be prepared, and prepared ones that wait for the network."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from PIL import Image

from engine.errors import BackendError, DeadlineError, OverloadedError
from engine.inputs.boxes import Box
from engine.inputs.pairs import Caption
from engine.inputs.preparation import Item
from engine.inputs.sources import ImageInput
from engine.prediction import Prediction
from engine.tracing import caller

_MAX_AHEAD_BYTES = 256 * 2**20  # of prepared images: 32 of the largest that a backend resizes have 1.6 GB


@dataclass(frozen=True, kw_only=True)
class BatcherStatistics:
    """What a `Batcher` has done since it was made, and what is in it now.

    Attributes:
        pending: pairs that were accepted and have no answer yet.
        waiting: those of them whose preparation has not begun.
        ready: those that are prepared and wait for the network.
        answered: pairs with a Prediction.
        failed: pairs with an error of their own or of their batch.
        expired: pairs whose deadline passed.
        cancelled: pairs that were cancelled.
        rejected: pairs that were not accepted: OverloadedError.
        batches: batches that were run.
        pairs: pairs in these batches.
        batch_sizes: number of batches by their number of pairs.
        queue_ms: milliseconds that these pairs waited, added up; one pair's are its timing "queue".

    Examples:
        >>> from engine import BatcherStatistics
        >>> BatcherStatistics(batches=3, pairs=8, batch_sizes={1: 1, 3: 1, 4: 1}).pending
        0
    """

    pending: int = 0
    waiting: int = 0
    ready: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    rejected: int = 0
    batches: int = 0
    pairs: int = 0
    batch_sizes: dict[int, int] = field(default_factory=dict)
    queue_ms: float = 0.0


class Bounds(NamedTuple):
    """Limits of a queue.

    batch: pairs of a batch.
    wait: seconds that an idle network waits for pairs that are being prepared.
    pending, pending_bytes: pairs that are held, and bytes of their images as they were given.
    workers: threads that prepare.
    flights: batches that may be submitted before the first of them has run.
    """

    batch: int
    wait: float
    pending: int
    pending_bytes: int
    workers: int
    flights: int


class QueuedPair(Future[Prediction]):
    """An accepted pair, which is the future of its own prediction.

    A thread that takes one out of the queue settles it, and no other does. It can be cancelled until its
    batch starts.
    """

    def __init__(
        self,
        image: ImageInput | None,
        caption: Caption | None,
        timeout: float | None,
        box: Box | None = None,
    ) -> None:
        super().__init__()
        self.image, self.caption, self.timeout, self.box = image, caption, timeout, box
        self.caller = caller()
        self.bytes = bytes_of(image)
        self.item: Item | None = None
        self.accepted = self.prepared = perf_counter()

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.timeout is not None and perf_counter() - self.accepted >= self.timeout

    def deadline_error(self) -> DeadlineError:
        """What the caller gets once the deadline has passed."""
        if self.timeout is not None and self.timeout <= 0:
            return DeadlineError(
                f"the pair's timeout was {self.timeout:g} s, so its time was over when it came; "
                "give a number of seconds above 0"
            )
        return DeadlineError(
            f"the pair was not answered within its timeout of {self.timeout:g} s; "
            "allow more time, or send fewer pairs at once"
        )


class Queue:
    """Pairs on their way through a Batcher; its methods are for several threads at once."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._ahead = max(bounds.batch, bounds.workers)  # pairs that are prepared at most
        self._changed = threading.Condition(threading.Lock())
        self._waiting: OrderedDict[QueuedPair, None] = OrderedDict()
        self._ready: OrderedDict[QueuedPair, int] = OrderedDict()  # with the bytes of what was prepared
        self._ready_bytes = self._pending = self._pending_bytes = 0
        self._preparers = self._preparing = self._flights = 0
        self._running = self._closed = self._dropping = False
        self._counts: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._queue_ms = 0.0

    def add(self, pair: QueuedPair, prepare: Callable[[], object], run: Callable[[], object]) -> None:
        """Accept a pair; `prepare` and `run` start a thread's work where too few work.

        Raises OverloadedError, and BackendError after `close`.
        """
        pair.add_done_callback(self._forget)
        with self._changed:
            self._check_room(pair)
            if self._preparers < self._bounds.workers:
                prepare()
                self._preparers += 1
            if not self._running:
                run()
                self._running = True
            self._waiting[pair] = None
            self._pending += 1
            self._pending_bytes += pair.bytes
            self._changed.notify_all()

    def next_waiting(self) -> QueuedPair | None:
        """Take the next pair to prepare, once there is room for it; None where the thread may end."""
        with self._changed:
            while self._waiting:
                ahead = len(self._ready) + self._preparing
                if ahead < self._ahead and self._ready_bytes < _MAX_AHEAD_BYTES:
                    self._preparing += 1
                    return self._waiting.popitem(last=False)[0]
                self._changed.wait()
            self._preparers -= 1
            return None

    def put(self, pair: QueuedPair, prepared: Item | BaseException) -> None:
        """Give back a pair that was taken: prepared, or failed."""
        with self._changed:
            self._preparing -= 1
            self._changed.notify_all()
            if isinstance(prepared, Item) and not self._dropping and not pair.cancelled():
                pair.item, pair.prepared = prepared, perf_counter()
                self._ready[pair] = _bytes_ahead(prepared)
                self._ready_bytes += self._ready[pair]
                return
        self.fail(pair, prepared if isinstance(prepared, BaseException) else closed_error())

    def next_batch(self) -> list[QueuedPair]:
        """Take the pairs that run next, once they should; none where the thread may end.

        `land` follows once the network is free again.
        """
        with self._changed:
            while self._waiting or self._preparing or self._ready:
                seconds = self._until_due()
                if seconds == 0:
                    # In order: to choose captions of similar length, which saves padding, gained nothing that
                    # could be measured (`lengths` of benchmarks/batcher.py).
                    batch = list(self._ready)[: self._bounds.batch]
                    for pair in batch:
                        self._ready_bytes -= self._ready.pop(pair)
                    self._flights += 1
                    self._changed.notify_all()
                    return batch
                self._changed.wait(seconds)
            self._running = False
            return []

    def land(self) -> None:
        """A batch has run."""
        with self._changed:
            self._flights -= 1
            self._changed.notify_all()

    def count_batch(self, waits_ms: list[float]) -> None:
        """Count a batch by the milliseconds that its pairs have waited."""
        with self._changed:
            self._sizes[len(waits_ms)] += 1
            self._queue_ms += sum(waits_ms)

    def fail(self, pair: QueuedPair, error: BaseException) -> None:
        """Settle a pair that was not run; one that was cancelled stays so."""
        if pair.set_running_or_notify_cancel():
            self.settle(pair, error)

    def settle(self, pair: QueuedPair, outcome: Prediction | BaseException) -> None:
        """Give a pair that was run its outcome."""
        # Counted first: its caller may send the next pair as soon as it has the outcome.
        if isinstance(outcome, BaseException):
            with self._changed:
                self._leave(pair, "expired" if isinstance(outcome, DeadlineError) else "failed")
            pair.set_exception(outcome)
        else:
            with self._changed:
                self._leave(pair, "answered")
            pair.set_result(outcome)

    def close(self, drain: bool) -> None:
        """Accept no more; unless `drain`, fail what does not run yet."""
        with self._changed:
            self._closed, dropped = True, []
            if not drain:
                self._dropping, dropped = True, [*self._ready, *self._waiting]
                self._ready.clear()
                self._waiting.clear()
                self._ready_bytes = 0
            self._changed.notify_all()
        for pair in dropped:
            self.fail(pair, closed_error())

    def statistics(self) -> BatcherStatistics:
        """The counts of this moment."""
        with self._changed:
            return BatcherStatistics(
                pending=self._pending,
                waiting=len(self._waiting),
                ready=len(self._ready),
                batches=self._sizes.total(),
                pairs=sum(size * count for size, count in self._sizes.items()),
                batch_sizes=dict(sorted(self._sizes.items())),
                queue_ms=self._queue_ms,
                **self._counts,
            )

    def _check_room(self, pair: QueuedPair) -> None:
        if self._closed:
            raise closed_error()
        bounds, again = self._bounds, "try again later, or send to another process"
        if self._pending >= bounds.pending:
            self._counts["rejected"] += 1
            raise OverloadedError(f"{self._pending} pairs wait already, the limit of max_pending; {again}")
        if self._pending and self._pending_bytes + pair.bytes > bounds.pending_bytes:
            self._counts["rejected"] += 1
            raise OverloadedError(
                f"images of {self._pending_bytes + pair.bytes} bytes would wait, and max_pending_bytes is "
                f"{bounds.pending_bytes}; {again}"
            )

    def _is_full(self) -> bool:
        return len(self._ready) >= self._bounds.batch or self._ready_bytes >= _MAX_AHEAD_BYTES

    def _until_due(self) -> float | None:
        """Seconds until the ready pairs should run, 0 for at once; None where that depends on others."""
        if not self._ready or self._flights >= self._bounds.flights:
            return None
        if self._is_full():
            return 0.0
        if self._flights:  # until the batch before has run, there is time for more pairs
            return None
        if not (self._preparing or self._waiting):
            return 0.0
        first = next(iter(self._ready))
        return max(0.0, first.prepared + self._bounds.wait - perf_counter())

    def _forget(self, pair: Future[Prediction]) -> None:
        """Take a pair that its caller cancelled out of the queue; another thread may have it already."""
        if not isinstance(pair, QueuedPair) or not pair.cancelled():
            return
        with self._changed:
            self._leave(pair, "expired" if pair.is_late() else "cancelled")
            mine = pair in self._waiting or pair in self._ready
            self._waiting.pop(pair, None)
            self._ready_bytes -= self._ready.pop(pair, 0)
            self._changed.notify_all()
        if mine:
            pair.set_running_or_notify_cancel()  # tells `concurrent.futures.wait`

    def _leave(self, pair: QueuedPair, outcome: str) -> None:
        """Count a pair that is no longer pending, and let go of its image."""
        self._counts[outcome] += 1
        self._pending -= 1
        self._pending_bytes -= pair.bytes
        pair.image = pair.item = pair.caller = None


def closed_error() -> BackendError:
    """What a pair gets that comes after `close`, or is dropped by it."""
    return BackendError("the Batcher was closed; create another Batcher")


def bytes_of(image: ImageInput | None) -> int:
    """Bytes of memory that an image holds as it was given; 0 for a path and an open file."""
    if isinstance(image, Image.Image):
        return image.width * image.height * len(image.getbands())
    if isinstance(image, bytes | bytearray):
        return len(image)
    return int(getattr(image, "nbytes", 0))  # of an array, a tensor or a memoryview


def _bytes_ahead(item: Item) -> int:
    thumbnail = item.picture.thumbnail
    return item.picture.pixels.nbytes + (0 if thumbnail is None else bytes_of(thumbnail))
