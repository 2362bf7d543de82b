"""The captured graphs and what stands on them, on a double of torch.cuda whose tensors lie on the CPU."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import Bundle, Predictor
from engine import predictor as predictor_module
from engine.backends import PictureBackend, graphs
from engine.backends.buckets import Bucket
from engine.backends.graphs import EagerRunner, GraphRunner
from engine.backends.torch import GpuBackend, TorchBackend
from engine.errors import BackendError, InputError
from engine.inputs import preparation
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, preprocess_image, resize_image
from engine.manifest import Limits
from engine.network.config import NetworkConfig
from engine.network.model import InferenceModel

CPU = torch.device("cpu")
EXACT = 2e-5  # float32 rounding: a bucket blocks its products otherwise
LIMITS = Limits(max_batch=4, max_tokens=40)
LARGEST = Bucket(4, 40)
SIZES = [(64, 48), (300, 20), (257, 255), (20, 300), (256, 256), (1, 1)]


class FakeCuda:
    """Streams, events and graphs that log what is asked of them, and do everything at once on the CPU.

    A replay runs the network again and, as in a pool that all graphs share, ruins what the others answered.
    """

    def __init__(self, network):
        self.log, self.network, self.thread = [], network, threading.local()
        self.graphs, self.capturing, self.failures = [], None, 0
        self.streams = iter(["copies", "runs"])
        self.seen = []  # the inputs of every replay
        self.pause = 0.0

    def Stream(self, device):
        return FakeStream(self, next(self.streams))

    def current_stream(self, device):
        return "default"

    @property
    def current(self):
        return getattr(self.thread, "stream", "default")

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.thread.stream = self.current, stream.name
        yield
        self.thread.stream = before

    def graph_pool_handle(self):
        return "the pool"

    def CUDAGraph(self):
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream.name, self.current) == ("the pool", "runs", "runs")
        assert capture_error_mode == "thread_local"
        assert torch.is_inference_mode_enabled()
        assert torch.backends.cudnn.conv.fp32_precision in ("ieee", "none")
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("no room")
        self.log.append("capture")
        self.capturing = graph
        yield
        self.capturing = None
        self.graphs.append(graph)

    def answers_of(self, model, inputs):
        assert inputs["attention_mask"].max() <= 1  # a pass over another bucket's text may read out of bounds
        answers = self.network(model, inputs)
        if self.capturing is not None:
            self.capturing.recorded = model, inputs, answers
        elif self.current == "runs":
            self.log.append("pass")
        return answers

    def record_stream(self, tensor, stream):
        assert (self.current, stream.name) == ("copies", "runs")
        self.log.append("sent")


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.events = cuda, name, 0

    def record_event(self):
        assert self.cuda.current == self.name
        self.events += 1
        event = f"{self.name} {self.events}"
        self.cuda.log.append(f"record {event}")
        return SimpleNamespace(
            name=event, synchronize=lambda: self.cuda.log.append(f"host waits for {event}")
        )

    def wait_event(self, event):
        assert self.cuda.current == self.name
        self.cuda.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, stream):
        self.cuda.log.append(f"{self.name} waits for {stream}")

    def synchronize(self):
        self.cuda.log.append(f"host waits for {self.name}")


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.recorded = cuda, None

    def replay(self):
        cuda = self.cuda
        assert cuda.current == "runs"
        cuda.log.append("replay")
        model, inputs, answers = self.recorded
        cuda.seen.append({name: x.clone().numpy() for name, x in inputs.items()})
        time.sleep(cuda.pause)
        for other in cuda.graphs:
            for x in other.recorded[2].values():
                x.fill_(torch.nan)
        for name, x in cuda.network(model, inputs).items():
            answers[name].copy_(x)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(graphs.answers_of)
    monkeypatch.setattr(graphs, "answers_of", fake.answers_of)
    monkeypatch.setattr(graphs, "_WARM_UPS", 1)  # for time's sake
    for part in ("Stream", "current_stream", "stream", "graph_pool_handle", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, part, getattr(fake, part))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: fake.record_stream(x, stream))
    return fake


@pytest.fixture(scope="module")
def tiny_network(tiny):
    """A tiny network by name, as the backend would have loaded it."""

    @functools.cache
    def load(name="asap"):
        model = tiny(name)
        config = NetworkConfig.from_fields(model.config.to_dict())
        return InferenceModel.from_released(model.state_dict(), config)

    return load


@pytest.fixture
def manifest(bundle_dir):
    return Bundle.open(bundle_dir).manifest


@pytest.fixture
def make_runner(cuda, tiny_network, manifest):
    return lambda name="asap": GraphRunner(tiny_network(name), LIMITS, manifest.preprocess, CPU)


def draw_text(batch, tokens, seed=0):
    random = np.random.default_rng(seed)
    mask = (np.arange(tokens)[None] < random.integers(1, tokens + 1, batch)[:, None]).astype(np.int64)
    return {"input_ids": random.integers(1, 2000, (batch, tokens)) * mask, "attention_mask": mask}


def draw(batch, tokens, seed=0):
    """Normalised pictures and text for a tiny network."""
    image = np.random.default_rng(seed).standard_normal((batch, 3, 16, 16), dtype=np.float32)
    return {"image": image.repeat(16, 2).repeat(16, 3), **draw_text(batch, tokens, seed)}


def draw_pictures(sizes=SIZES):
    """Uint8 pictures [H, W, 3] of these (height, width)."""
    random = np.random.default_rng(5)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def eager(model, feeds):
    """The network's answers without any bucket."""
    inputs = {name: torch.from_numpy(x.copy()) for name, x in feeds.items()}
    return {name: x.numpy() for name, x in model(**inputs)._asdict().items() if x is not None}


def check_same(got, want):
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert (array.shape, array.dtype) == (want[name].shape, np.float32)
        assert np.abs(array - want[name]).max() <= EXACT, name


@pytest.mark.parametrize("shape", [(1, 2), (3, 17)])
def test_an_answer_does_not_depend_on_its_bucket(name, shape, make_runner):
    """In buffers that held something else."""
    runner, feeds = make_runner(name), draw(*shape)
    runner._inputs.image(LARGEST).fill_(torch.nan)
    runner._inputs.text(LARGEST).fill_(1999)
    check_same(runner.run(feeds, *shape), eager(runner._model, feeds))


def test_what_a_batch_held_before_is_gone(make_runner):
    """A short caption after long ones, bit for bit as in fresh buffers; what was padded is zero."""
    runner, short = make_runner(), draw(1, 3)
    fresh = runner.run(short, 1, 3)
    runner.run(draw(1, 16, seed=1), 1, 16)
    runner.run(draw(2, 30, seed=2), 2, 30)
    again = runner.run(short, 1, 3)
    assert all(np.array_equal(fresh[key], again[key]) for key in fresh)


def test_what_is_padded_is_zero(make_runner, cuda):
    runner = make_runner()
    runner._inputs.image(LARGEST).fill_(torch.nan)
    runner._inputs.text(LARGEST).fill_(1999)
    runner.run(draw(3, 20), 3, 20)
    inputs = cuda.seen[-1]
    assert [x.shape for x in inputs.values()] == [(4, 3, 256, 256), (4, 32), (4, 32)]
    assert not inputs["image"][3:].any()
    for name in ("input_ids", "attention_mask"):
        assert not inputs[name][3:].any()
        assert not inputs[name][:, 20:].any()


def test_a_bucket_is_captured_once_after_warming_up_on_its_own_inputs(make_runner, cuda):
    flag = torch.backends.cudnn.allow_tf32
    runner = make_runner()
    for number in (1, 2):
        runner.run(draw(2, 20 + number), 2, 20 + number)
        want = ["sent", "sent", f"record copies {number}", f"runs waits for copies {number}"]
        want += ["pass", "host waits for runs", "capture"] if number == 1 else []
        want += ["replay", f"record runs {number}", f"host waits for runs {number}"]
        assert cuda.log[-len(want) :] == want
    assert cuda.log[0] == "runs waits for default"
    assert torch.backends.cudnn.allow_tf32 == flag


@pytest.fixture
def host_settings():
    """A function that sets the precision of float32 products as a host program may; undone afterwards."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision

    def set_precision(interface):
        if interface == "older":
            torch.set_float32_matmul_precision("high")
        else:  # which alone makes torch.backends.cudnn.flags raise
            torch.backends.cudnn.conv.fp32_precision = "ieee"

    yield set_precision
    torch.backends.cudnn.conv.fp32_precision = conv
    torch.set_float32_matmul_precision(matmul)


@pytest.mark.parametrize("interface", ["older", "newer"])
def test_a_graph_does_not_freeze_the_hosts_precision(make_runner, cuda, host_settings, interface):
    """`FakeCuda.graph` asserts that products are exact while it captures."""
    host_settings(interface)
    runner, feeds = make_runner(), draw(2, 20)
    check_same(runner.run(feeds, 2, 20), eager(runner._model, feeds))
    assert cuda.log.count("capture") == 1


def test_all_buckets_share_their_buffers(make_runner):
    runner = make_runner()
    largest, small = (runner._inputs.named(bucket) for bucket in (LARGEST, Bucket(1, 16)))
    assert small["image"].data_ptr() == largest["image"].data_ptr()
    assert small["input_ids"].data_ptr() == largest["input_ids"].data_ptr()
    assert small["attention_mask"].data_ptr() == small["input_ids"].data_ptr() + 16 * 8
    assert all(x.is_contiguous() for x in (*largest.values(), *small.values()))


def test_a_failed_capture_is_repeated_once(make_runner, cuda, caplog):
    runner, feeds = make_runner(), draw(2, 20)
    cuda.failures = 1
    check_same(runner.run(feeds, 2, 20), eager(runner._model, feeds))
    assert caplog.text.count("the graph of Bucket(batch=2, tokens=32) is captured again: no room") == 1


def test_what_failed_twice_is_captured_by_the_next_batch(make_runner, cuda):
    runner, feeds = make_runner(), draw(2, 20)
    cuda.failures = 2
    with pytest.raises(torch.OutOfMemoryError):
        runner.run(feeds, 2, 20)
    check_same(runner.run(feeds, 2, 20), eager(runner._model, feeds))
    assert cuda.log.count("capture") == 1


def test_nothing_beyond_the_limits(make_runner):
    with pytest.raises(BackendError, match="expected 1 to 4 pairs of 1 to 40 tokens"):
        make_runner().run(draw(5, 5), 5, 5)


def test_batches_that_run_at_once_keep_their_answers(make_runner, cuda):
    """The copies of one come before the host waits for the one before; of one bucket and of another."""
    runner = make_runner()
    cases = [draw(2, 20), draw(1, 20, seed=1), draw(2, 25, seed=2)]
    waits = [runner.start(case["image"], case, *case["input_ids"].shape) for case in cases]
    assert not [line for line in cuda.log if line.startswith("host waits for runs ")]
    for case, wait in zip(cases, waits, strict=True):
        check_same(wait(), eager(runner._model, case))


def test_threads_agree_bit_for_bit(make_runner, cuda):
    """Two cases share a bucket, one has its own; each waits within its replay."""
    runner, cuda.pause = make_runner(), 0.01
    cases = [draw(1, 5), draw(1, 9, seed=1), draw(2, 20, seed=2)]

    def run(case):
        return runner.run(case, *case["input_ids"].shape)

    serial, wrong = [run(case) for case in cases], []

    def work():
        for case, expected in zip(cases, serial, strict=True):
            answer = run(case)
            wrong.extend(key for key in expected if not np.array_equal(answer[key], expected[key]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_pictures_become_the_input_that_the_preprocessing_makes(make_runner, cuda):
    """Bit for bit, whatever their sizes; the answers are those of that input."""
    runner, pictures, text = make_runner(), draw_pictures(SIZES[:3]), draw_text(3, 20)
    want = np.stack([preprocess_image(x).pixels for x in pictures])
    got = runner.start(pictures, text, 3, 20)()
    assert np.array_equal(cuda.seen[-1]["image"][:3], want)
    assert not cuda.seen[-1]["image"][3:].any()
    check_same(got, eager(runner._model, {"image": want, **text}))


@pytest.fixture
def backend(cuda, tiny_network, manifest):
    runner = GraphRunner(tiny_network(), manifest.limits, manifest.preprocess, CPU)
    return GpuBackend(runner, manifest, tiny_network().config, "cuda:0")


def test_what_does_not_fit_is_refused_before_it_reaches_the_device(backend, cuda):
    text = draw_text(2, 5)
    before = list(cuda.log)
    with pytest.raises(BackendError, match="expected 2 pictures for as many captions, got 3"):
        backend.start(draw_pictures(SIZES[:3]), text)
    with pytest.raises(BackendError, match="input_ids: expected 0 to 2047, the vocabulary, got"):
        backend.start(draw_pictures(SIZES[:2]), text | {"input_ids": text["input_ids"] + 2048})
    with pytest.raises(BackendError, match=r"expected the inputs \['input_ids', 'attention_mask'\]"):
        backend.start(draw_pictures(SIZES[:2]), draw(2, 5))
    with pytest.raises(InputError, match="image 0: expected uint8"):
        backend.start([np.zeros((4, 4), np.uint8)] * 2, text)
    assert cuda.log == before


def test_failures_are_backend_errors_when_they_begin_and_when_they_end(backend, monkeypatch):
    text, pictures = draw_text(1, 5), draw_pictures(SIZES[:1])

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    wait = backend.start(pictures, text)
    monkeypatch.setattr(graphs, "cut", fail)
    with pytest.raises(BackendError, match=r"torch failed on inputs of shape .*\[1, 5\].*: no room"):
        wait()
    monkeypatch.setattr(graphs, "pack", fail)
    with pytest.raises(BackendError, match="torch failed on inputs of shape .*: no room"):
        backend.start(pictures, text)


def test_closing_waits_for_what_was_started(backend, cuda):
    backend.start(draw_pictures(SIZES[:1]), draw_text(1, 5))
    backend.close()
    backend.close()
    assert cuda.log[-1] == "host waits for runs"
    with pytest.raises(BackendError, match="the backend was closed; create another Predictor"):
        backend.start(draw_pictures(SIZES[:1]), draw_text(1, 5))


@pytest.fixture
def predictors(backend, tiny_network, manifest, bundle_dir, monkeypatch):
    """Two Predictors of one network: on the double, and eager on the CPU."""
    eager = TorchBackend(EagerRunner(tiny_network(), 1), manifest, tiny_network().config, "cpu")
    made = iter([backend, eager])
    monkeypatch.setattr(predictor_module, "create", lambda *_: next(made))
    with Predictor(bundle_dir) as on_gpu, Predictor(bundle_dir) as on_cpu:
        assert isinstance(on_gpu._backend, PictureBackend)
        assert not isinstance(on_cpu._backend, PictureBackend)
        yield on_gpu, on_cpu


def scores(answer):
    return np.array([answer.score, *answer.types.values(), *(word.score for word in answer.words)])


def test_the_predictor_answers_as_on_the_cpu(predictors, cuda, monkeypatch):
    on_gpu, on_cpu = predictors
    pairs = [(x, "a man speaks " * (1 + i)) for i, x in enumerate(draw_pictures(SIZES[:4]))]
    fed, run = [], EagerRunner.run
    monkeypatch.setattr(EagerRunner, "run", lambda self, feeds, *x: fed.append(feeds) or run(self, feeds, *x))
    answers, wanted = on_gpu.predict_batch(pairs), on_cpu.predict_batch(pairs)
    assert np.array_equal(cuda.seen[-1]["image"][: len(pairs)], fed[-1]["image"])
    for answer, want in zip(answers, wanted, strict=True):
        assert np.abs(scores(answer) - scores(want)).max() <= EXACT
        assert (answer.size, answer.caption, answer.warnings) == (want.size, want.caption, want.warnings)
        assert np.array_equal(np.asarray(answer.thumbnail), np.asarray(want.thumbnail))
        assert list(answer.timing) == list(want.timing)
        assert answer.timing["total"] == pytest.approx(sum(list(answer.timing.values())[:-1]))
    assert answers[0].model["device"] == "cuda:0"
    single = on_gpu.predict(*pairs[1])
    assert np.abs(scores(single) - scores(wanted[1])).max() <= EXACT


def test_a_stream_copies_the_next_batch_before_it_waits(predictors, cuda):
    on_gpu, on_cpu = predictors
    pairs = [(x, "a man speaks") for x in draw_pictures([(30, 40 + i) for i in range(7)])]
    pairs[3] = (b"broken", "a man")
    answers = list(on_gpu.stream(pairs, batch_size=2, on_error="return"))
    wanted = list(on_cpu.stream(pairs, batch_size=2, on_error="return"))
    assert isinstance(answers[3], InputError)
    for index in (0, 1, 2, 4, 5, 6):
        assert answers[index].size == wanted[index].size
        assert np.abs(scores(answers[index]) - scores(wanted[index])).max() <= EXACT
    steps = [line for line in cuda.log if line.startswith(("record copies", "host waits for runs "))]
    assert steps == [
        "record copies 1",
        "record copies 2",
        "host waits for runs 1",
        "record copies 3",
        "host waits for runs 2",
        "record copies 4",
        "host waits for runs 3",
        "host waits for runs 4",
    ]


def test_a_stream_stays_lazy(predictors):
    """Three batches on their way at most: one runs, one is copied, one is prepared."""
    on_gpu, _ = predictors
    taken = []

    def pairs():
        for picture in draw_pictures([(9, 9)] * 30):
            taken.append(picture)
            yield picture, "a man"

    stream = on_gpu.stream(pairs(), batch_size=2)
    next(stream)
    assert len(taken) == 6
    stream.close()


def test_a_picture_too_large_to_send_is_resized_first(predictors, cuda, monkeypatch):
    on_gpu, _ = predictors
    monkeypatch.setattr(preparation, "_LARGEST_SENT", 256)
    packed, pack = [], graphs.pack
    monkeypatch.setattr(graphs, "pack", lambda x, pinned: packed.extend(x) or pack(x, pinned))
    pictures = draw_pictures([(300, 20), (256, 255)])
    on_gpu.predict_batch([(x, "a man") for x in pictures])
    assert [x.shape for x in packed] == [(256, 256, 3), (256, 255, 3)]
    want = [normalize_image(resize_image(Image.fromarray(x), 256), CLIP_MEAN, CLIP_STD) for x in pictures]
    assert np.array_equal(cuda.seen[-1]["image"][:2], np.stack(want))


def test_warming_up_captures_the_largest_first(predictors, cuda):
    on_gpu, _ = predictors
    on_gpu.warm_up([(1, 16), (2, 24), (10_000, 2), (2, 1), (1, 10_000)])
    limits = on_gpu.manifest.limits
    shapes = [seen["input_ids"].shape for seen in cuda.seen]
    assert shapes == [(limits.max_batch, 16), (2, 32), (2, 16), (1, limits.max_tokens), (1, 16)]
    before = cuda.log.count("capture")
    on_gpu.predict_batch([(x, "a man speaks") for x in draw_pictures(SIZES[:3])])
    assert cuda.log.count("capture") == before == 5
