"""The Batcher: batches of single pairs, deadlines, limits, cancelling, closing, event loops, processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import io
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from helpers import in_threads

from engine import Batcher, Predictor
from engine.backends.base import Finished
from engine.errors import BackendError, DeadlineError, InputError, NumericalError, OverloadedError

SOON = 20  # seconds in which anything here ends, unless it hangs


class Gate:
    """A backend's `submit` that holds each batch until `open`, and remembers what it was given."""

    def __init__(self, predictor):
        self.backend, self.submit = predictor._backend, predictor._backend.submit
        self.opened, self.entered, self.sizes = threading.Event(), threading.Semaphore(0), []
        self.backend.submit = self

    def __call__(self, images, text):
        self.sizes.append(len(text["input_ids"]))
        self.entered.release()
        assert self.opened.wait(SOON)
        return self.submit(images, text)


@pytest.fixture
def own_predictor(bundle_dir):
    with Predictor(bundle_dir, threads=1) as made:
        yield made


@pytest.fixture
def gate(own_predictor):
    """The gate of `own_predictor`, open again at the end so that no thread waits for it."""
    made = Gate(own_predictor)
    yield made
    made.opened.set()


def hold(batcher, gate, photo):
    """Occupy the network with one pair and return its future."""
    first = batcher.submit(photo, "first")
    assert gate.entered.acquire(timeout=SOON)
    return first


def wait_for(condition):
    """Wait until `condition()` holds."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def rest(batcher):
    """Names of the batchers' threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batcher-")]


def same(left, right):
    """Whether two predictions are equal bit for bit, with the heat map that == leaves out."""
    return left == right and np.array_equal(left.heatmap, right.heatmap)


def test_pairs_that_come_while_the_network_runs_are_the_next_batches(own_predictor, gate, photo):
    own_predictor._runner.workers = 1  # so that pairs get ready in order
    pairs = [(photo.rotate(10 * i), f"obama {i}") for i in range(9)]
    with Batcher(own_predictor, max_wait_ms=60_000) as batcher:
        first = hold(batcher, gate, photo)
        futures = [batcher.submit(*pair) for pair in pairs]
        wait_for(lambda: batcher.statistics().ready == 4)
        gate.opened.set()
        results = [future.result(SOON) for future in futures]
        assert first.result(SOON).caption == "first"
    assert gate.sizes == [1, 4, 4, 1]  # the bundle's largest batch is 4
    assert [result.caption for result in results] == [caption for _, caption in pairs]
    for start in (0, 4, 8):
        batch = own_predictor.predict_batch(pairs[start : start + 4])
        assert all(map(same, results[start : start + 4], batch))


@pytest.mark.parametrize("callers", [1, 8])
def test_with_batches_of_one_the_bits_are_those_of_predict(predictor, photo, callers):
    pairs = [(photo.rotate(30 * i), "obama " * (i + 1)) for i in range(4)]
    expected = [predictor.predict(*pair) for pair in pairs]
    wrong = []
    with Batcher(predictor, max_batch=1) as batcher:

        def work():
            for _ in range(5):
                wrong.extend(
                    i for i, pair in enumerate(pairs) if not same(batcher.predict(*pair), expected[i])
                )

        in_threads(work, callers)
        assert batcher.statistics().batch_sizes == {1: callers * 20}
    assert wrong == []


def test_a_lone_pair_does_not_wait_for_others(predictor, photo):
    with Batcher(predictor, max_wait_ms=60_000) as batcher:
        started = time.monotonic()
        timing = batcher.predict(photo, "a", timeout=SOON).timing
        assert time.monotonic() - started < SOON / 2
    assert list(timing) == ["queue", "decode", "resize", "tokenize", "inference", "postprocess", "total"]
    assert timing["total"] == pytest.approx(sum(list(timing.values())[:-1]))
    assert all(value >= 0 for value in timing.values())


class SlowFile(io.BytesIO):
    """A file whose first read waits for `released`."""

    def __init__(self, content):
        super().__init__(content)
        self.released, self.begun = threading.Event(), threading.Event()

    def read(self, *arguments):
        self.begun.set()
        assert self.released.wait(SOON)
        return super().read(*arguments)


@pytest.fixture
def slow_file(photo, encode):
    made = SlowFile(encode(photo, "PNG"))
    yield made
    made.released.set()


@pytest.fixture
def two_workers(own_predictor, monkeypatch):
    monkeypatch.setattr(own_predictor._runner, "workers", 2)


@pytest.mark.parametrize(("wait_ms", "sizes"), [(60_000, [2]), (20, [1, 1])])
@pytest.mark.usefixtures("two_workers")
def test_an_idle_network_waits_so_long_for_what_is_prepared(
    own_predictor, gate, photo, slow_file, wait_ms, sizes
):
    gate.opened.set()
    with Batcher(own_predictor, max_wait_ms=wait_ms) as batcher:
        slow = batcher.submit(slow_file, "slow")
        assert slow_file.begun.wait(SOON)
        fast = batcher.submit(photo, "fast")
        if wait_ms < 1000:
            assert fast.result(SOON).caption == "fast"
        else:
            wait_for(lambda: batcher.statistics().ready == 1)
        slow_file.released.set()
        assert slow.result(SOON).caption == "slow"
        assert fast.result(SOON).caption == "fast"
    assert gate.sizes == sizes


def test_a_pair_that_fails_fails_alone(own_predictor, gate, photo):
    with Batcher(own_predictor) as batcher:
        hold(batcher, gate, photo)
        pairs = [(photo, "a"), (b"broken", "b"), (photo, 3), (photo, "poison"), (photo, "e"), (None, None)]
        futures = [batcher.submit(*pair) for pair in pairs]
        wait_for(lambda: batcher.statistics().ready == 3)
        gate.opened.set()
        errors = [future.exception(SOON) for future in futures]
        kinds = [None, InputError, InputError, NumericalError, None, InputError]
        assert [error and type(error) for error in errors] == kinds
        assert gate.sizes == [1, 3]
        statistics = batcher.statistics()
        assert (statistics.answered, statistics.failed, statistics.pending) == (3, 4, 0)
        with pytest.raises(InputError, match="^expected a caption as str"):
            batcher.predict(photo, 3)


def test_whatever_a_pair_raises_is_its_own(predictor, photo):
    class Odd(io.BytesIO):
        def read(self, *_):
            raise KeyError("the user's own")

    with Batcher(predictor) as batcher:
        assert batcher.submit(Odd(), "a").exception(SOON) is not None
        assert batcher.predict(photo, "b", timeout=SOON).caption == "b"


def test_the_failure_of_a_run_is_that_of_its_batch(own_predictor, photo, monkeypatch):
    run, fails = own_predictor._backend.run, [True]

    def broken(feeds):
        if fails:
            raise BackendError("the library failed")
        return run(feeds)

    monkeypatch.setattr(own_predictor._backend, "run", broken)
    with Batcher(own_predictor) as batcher:
        with pytest.raises(BackendError, match="the library failed"):
            batcher.predict(photo, "a", timeout=SOON)
        fails.clear()
        assert batcher.predict(photo, "a", timeout=SOON).caption == "a"


def test_the_queue_is_bounded_in_pairs(own_predictor, gate, photo):
    with Batcher(own_predictor, max_pending=3) as batcher:
        hold(batcher, gate, photo)
        futures = [batcher.submit(photo, "a") for _ in range(2)]
        with pytest.raises(
            OverloadedError, match="3 pairs wait already, the limit of max_pending; try again"
        ):
            batcher.submit(photo, "b")
        futures[0].cancel()
        batcher.submit(photo, "c")
        with pytest.raises(OverloadedError):
            batcher.predict(photo, "d")
        gate.opened.set()
    assert batcher.statistics().rejected == 2
    assert batcher.statistics().answered == 3


def test_a_serial_caller_never_finds_its_own_place_taken(predictor, photo):
    with Batcher(predictor, max_pending=1) as batcher:
        for _ in range(50):
            batcher.predict(photo, "a", timeout=SOON)


def test_the_queue_is_bounded_in_bytes(own_predictor, gate, photo):
    array = np.zeros((100, 100, 3), np.uint8)
    with Batcher(own_predictor, max_pending_bytes=70_000) as batcher:
        hold(batcher, gate, photo)  # of 9216 bytes
        futures = [batcher.submit(image, "a") for image in (array, array.tobytes())]
        with pytest.raises(
            OverloadedError, match="images of 99216 bytes would wait, and max_pending_bytes is"
        ):
            batcher.submit(array, "b")
        for future in futures:
            future.cancel()
        batcher.submit(array, "c").cancel()
        gate.opened.set()
    with Batcher(own_predictor, max_pending_bytes=1) as batcher:  # alone it is taken
        assert batcher.predict(array, "d", timeout=SOON).caption == "d"


def test_only_one_batch_is_prepared_ahead(own_predictor, gate, photo):
    own_predictor._runner.workers = 1
    with Batcher(own_predictor, max_batch=2) as batcher:
        hold(batcher, gate, photo)
        futures = [batcher.submit(photo, f"{i}") for i in range(12)]
        wait_for(lambda: batcher.statistics().ready == 2)
        time.sleep(0.05)
        statistics = batcher.statistics()
        assert (statistics.ready, statistics.waiting, statistics.pending) == (2, 10, 13)
        gate.opened.set()
        assert [future.result(SOON).caption for future in futures] == [f"{i}" for i in range(12)]


def test_what_is_late_is_never_run(own_predictor, gate, photo, slow_file):
    with Batcher(own_predictor) as batcher:
        hold(batcher, gate, photo)
        ready = batcher.submit(photo, "ready", timeout=0.05)
        wait_for(lambda: batcher.statistics().ready == 1)
        time.sleep(0.06)
        unread = batcher.submit(slow_file, "never read", timeout=-1)
        gate.opened.set()
        for future in (ready, unread):
            message = (
                "timeout was -1 s, so its time was over" if future is unread else "its timeout of 0.05 s"
            )
            with pytest.raises(DeadlineError, match=message):
                future.result(SOON)
        assert not slow_file.begun.is_set()
        assert isinstance(ready.exception(), TimeoutError)
    assert gate.sizes == [1]
    assert batcher.statistics().expired == 2


def test_a_blocked_caller_gets_its_deadline_while_the_network_runs(own_predictor, gate, photo):
    with Batcher(own_predictor) as batcher:
        for caption in ("running", "waiting"):
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                batcher.predict(photo, caption, timeout=0.05)
            assert time.monotonic() - started < SOON / 2
            with pytest.raises(DeadlineError):
                asyncio.run(batcher.predict_async(photo, caption, timeout=0.05))
        gate.opened.set()
    assert gate.sizes == [1]
    assert batcher.statistics().answered + batcher.statistics().expired == 4


def test_a_cancelled_pair_is_gone(own_predictor, gate, photo):
    with Batcher(own_predictor) as batcher:
        first = hold(batcher, gate, photo)
        assert not first.cancel()  # it runs
        image = photo.copy()
        alive = weakref.ref(image)
        futures = [batcher.submit(image, "a") for _ in range(12)]  # some ready, some waiting
        del image
        wait_for(lambda: batcher.statistics().ready == 4)
        assert all(future.cancel() for future in futures)
        assert batcher.statistics().pending == 1
        assert concurrent.futures.wait(futures, SOON).not_done == set()
        assert alive() is None
        assert len(batcher._queue._waiting) == len(batcher._queue._ready) == 0
        assert batcher._queue._pending_bytes == 64 * 48 * 3
        gate.opened.set()
    assert gate.sizes == [1]
    assert batcher.statistics().cancelled == 12


def test_pairs_cancelled_at_any_moment_leave_nothing(predictor, photo):
    random = np.random.default_rng(0)
    with Batcher(predictor) as batcher:
        futures = []
        for pause in random.exponential(0.001, 200):
            futures.append(batcher.submit(photo, "a"))
            time.sleep(pause)
            futures[random.integers(len(futures))].cancel()
        assert concurrent.futures.wait(futures, SOON).not_done == set()
        statistics = batcher.statistics()
    assert statistics.pending == statistics.waiting == statistics.ready == 0
    assert statistics.cancelled == sum(future.cancelled() for future in futures)
    assert statistics.answered + statistics.cancelled == 200
    assert statistics.pairs == statistics.answered
    assert batcher._queue._pending_bytes == batcher._queue._ready_bytes == 0


def test_closing_answers_what_was_accepted(own_predictor, photo):
    batcher = Batcher(own_predictor)
    futures = [batcher.submit(photo, f"{i}") for i in range(20)]
    batcher.close()
    assert [future.result(0).caption for future in futures] == [f"{i}" for i in range(20)]
    assert rest(batcher) == []
    batcher.close()
    for call in (batcher.submit, batcher.predict):
        with pytest.raises(BackendError, match="the Batcher was closed; create another Batcher"):
            call(photo, "a")
    assert own_predictor.predict(photo, "a").caption == "a"


def test_closing_can_drop_what_waits(own_predictor, gate, photo, slow_file):
    batcher = Batcher(own_predictor)
    first = hold(batcher, gate, photo)
    futures = [batcher.submit(slow_file, "being prepared"), *(batcher.submit(photo, "a") for _ in range(9))]
    assert slow_file.begun.wait(SOON)
    closing = threading.Thread(target=batcher.close, args=(False,))
    closing.start()
    wait_for(lambda: batcher.statistics().pending <= 2)
    slow_file.released.set()
    gate.opened.set()
    closing.join(SOON)
    assert first.result(0).caption == "first"
    for future in futures:
        with pytest.raises(BackendError, match="the Batcher was closed"):
            future.result(0)
    assert gate.sizes == [1]
    assert rest(batcher) == []


def test_a_callback_may_submit_but_not_wait(predictor, photo):
    with Batcher(predictor) as batcher:
        seen = concurrent.futures.Future()

        def after(_):
            errors = []
            for wait in (batcher.close, lambda: batcher.predict(photo, "b")):
                try:
                    wait()
                except BackendError as error:
                    errors.append(str(error))
            seen.set_result((batcher.submit(photo, "c"), errors))

        batcher.submit(photo, "a").add_done_callback(after)
        future, errors = seen.result(SOON)
        assert future.result(SOON).caption == "c"
        assert [error.split(",")[0] for error in errors] == ["close waits", "predict waits"]


def test_threads_end_with_a_batcher_that_nobody_holds(predictor, photo):
    batcher = Batcher(predictor)
    batcher.predict(photo, "a")
    alive = weakref.ref(batcher)
    del batcher
    wait_for(lambda: gc.collect() is not None and alive() is None and not rest(None))


def test_event_loops_share_a_batcher(predictor, photo):
    with Batcher(predictor) as batcher:

        async def ask(names):
            return await asyncio.gather(*(batcher.predict_async(photo, name) for name in names))

        def work():
            names = [f"obama {threading.get_ident()} {i}" for i in range(10)]
            assert [result.caption for result in asyncio.run(ask(names))] == names

        in_threads(work, 4)
        assert batcher.statistics().answered == 40


def test_another_kind_of_event_loop(predictor, photo):
    uvloop = pytest.importorskip("uvloop")

    async def ask():
        with pytest.raises(DeadlineError):
            await batcher.predict_async(photo, "late", timeout=0)
        return await asyncio.gather(*(batcher.predict_async(photo, f"{i}", timeout=SOON) for i in range(9)))

    with Batcher(predictor) as batcher:
        assert [result.caption for result in uvloop.run(ask())] == [f"{i}" for i in range(9)]


def test_cancelling_a_task_cancels_its_pair(own_predictor, gate, photo):
    async def ask(batcher):
        running = asyncio.create_task(batcher.predict_async(photo, "running"))
        await asyncio.to_thread(gate.entered.acquire, timeout=SOON)
        waiting = [asyncio.create_task(batcher.predict_async(photo, "a")) for _ in range(6)]
        await asyncio.sleep(0.02)
        for task in (running, *waiting):
            task.cancel()
        results = await asyncio.gather(running, *waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    with Batcher(own_predictor) as batcher:
        asyncio.run(ask(batcher))
        statistics = batcher.statistics()
        assert (statistics.cancelled, statistics.pending) == (6, 1)
        gate.opened.set()
    assert gate.sizes == [1]
    assert batcher.statistics().answered == 1


def test_the_loop_runs_on_while_the_network_is_held(own_predictor, gate, photo):
    async def ask(batcher):
        tasks = [asyncio.create_task(batcher.predict_async(photo, "a")) for _ in range(30)]
        slowest = 0.0
        for _ in range(50):
            started = time.perf_counter()
            await asyncio.sleep(0)
            slowest = max(slowest, time.perf_counter() - started)
        gate.opened.set()
        await asyncio.gather(*tasks)
        return slowest

    with Batcher(own_predictor) as batcher:
        assert asyncio.run(ask(batcher)) < SOON / 20


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_is_told_so(predictor, photo):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with Batcher(predictor) as batcher:
        batcher.predict(photo, "a")

        def work():
            for call in (lambda: batcher.submit(photo, "a"), batcher.statistics):
                try:
                    call()
                except BackendError as error:
                    queue.put(str(error))
            batcher.close()

        with batcher._queue._changed:  # as a thread that holds the lock when the process forks
            child = context.Process(target=work)
            child.start()
            child.join(SOON)
        assert child.exitcode == 0
    assert all("made before a fork" in queue.get() for _ in range(2))


def test_it_pickles_as_its_predictor_and_options(predictor, photo):
    with Batcher(predictor, max_batch=2, max_pending=7) as batcher:
        expected = batcher.predict(photo, "a")
        again = pickle.loads(pickle.dumps(batcher))
        with again._predictor, again:
            assert again._queue._bounds == batcher._queue._bounds
            assert same(again.predict(photo, "a"), expected)


LEFT_OPEN = """
import sys, threading
from engine import Batcher, Predictor
batcher = Batcher(Predictor(sys.argv[1], threads=1))
batcher.predict(sys.argv[2], "a")
threading.Thread(target=lambda: [batcher.submit(sys.argv[2], "b") for _ in range(20)]).start()
futures = [batcher.submit(sys.argv[2], "c") for _ in range(20)]
"""


def test_a_program_that_closes_nothing_still_ends(bundle_dir, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    command = [sys.executable, "-W", "error", "-c", LEFT_OPEN, bundle_dir, tmp_path / "photo.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_wait_ms": "5"},
        {"max_wait_ms": float("nan")},
        {"max_wait_ms": -1},
        {"max_batch": 10_000},
        {"max_pending": 0},
        {"max_pending": 1.5},
        {"max_pending_bytes": True},
    ],
)
def test_wrong_options_are_refused(predictor, options):
    with pytest.raises(InputError, match=f"{next(iter(options))}: expected .*, got"):
        Batcher(predictor, **options)


def test_a_batcher_wants_a_predictor_and_a_timeout_is_a_number(predictor, photo):
    with pytest.raises(InputError, match="predictor: expected an engine.Predictor, got str"):
        Batcher("my-bundle")
    with Batcher(predictor) as batcher:
        for timeout in ("5", float("nan"), True):
            with pytest.raises(InputError, match="timeout: expected a number, got"):
                batcher.submit(photo, "a", timeout=timeout)
        assert batcher.predict(photo, "a", timeout=float("inf")).caption == "a"


class Flying:
    """A submitted batch that ends when it is told to, as one on a GPU."""

    def __init__(self, outputs, ended):
        self.outputs, self.ended = outputs, ended

    def result(self):
        assert self.ended.wait(SOON)
        return self.outputs


def test_an_asynchronous_backend_has_two_batches_under_way(own_predictor, photo, monkeypatch):
    ended, sizes, submit = [], [], own_predictor._backend.submit

    def start(images, text):
        sizes.append(len(text["input_ids"]))
        ended.append(threading.Event())
        return Flying(submit(images, text).result(), ended[-1])

    monkeypatch.setattr(own_predictor._backend, "submit", start)
    monkeypatch.setattr(own_predictor._runner, "asynchronous", True)
    with Batcher(own_predictor) as batcher:
        futures = [batcher.submit(photo, "first")]
        wait_for(lambda: len(sizes) == 1)
        futures += [batcher.submit(photo, f"{i}") for i in range(3)]
        wait_for(lambda: batcher.statistics().ready == 3)
        time.sleep(0.02)
        assert sizes == [1]  # not full, and the first still runs
        futures += [batcher.submit(photo, f"{i}") for i in range(3, 7)]
        wait_for(lambda: len(sizes) == 2 and batcher.statistics().ready == 3)
        time.sleep(0.02)
        assert sizes == [1, 4]
        ended[0].set()
        ended[1].set()
        wait_for(lambda: len(sizes) == 3)
        ended[2].set()
        captions = [future.result(SOON).caption for future in futures]
    assert captions == ["first", *(f"{i}" for i in range(7))]
    assert sizes == [1, 4, 3]


def test_what_an_asynchronous_run_raises_is_its_batchs(own_predictor, photo, monkeypatch):
    class Broken(Finished):
        def result(self):
            raise BackendError("the run failed")

    submit, broken = own_predictor._backend.submit, [True]

    def start(images, text):
        return Broken({}) if broken and broken.pop() else submit(images, text)

    monkeypatch.setattr(own_predictor._backend, "submit", start)
    monkeypatch.setattr(own_predictor._runner, "asynchronous", True)
    with Batcher(own_predictor) as batcher:
        with pytest.raises(BackendError, match="the run failed"):
            batcher.predict(photo, "a", timeout=SOON)
        assert [batcher.predict(photo, c, timeout=SOON).caption for c in "bcd"] == ["b", "c", "d"]
