"""A Predictor on captured graphs, on the double of torch.cuda in conftest.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from engine import Predictor
from engine import predictor as predictor_module
from engine.backends import graphs
from engine.backends.graphs import EagerRunner, GraphRunner
from engine.backends.torch import GpuBackend, TorchBackend
from engine.errors import BackendError, InputError
from engine.inputs import preparation
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, resize_image

CPU = torch.device("cpu")
EXACT = 2e-5  # float32 rounding: a bucket blocks its products otherwise
SIZES = [(64, 48), (300, 20), (257, 255), (20, 300), (256, 256), (1, 1)]


@pytest.fixture
def backend(cuda, tiny_network, manifest):
    runner = GraphRunner(tiny_network(), manifest.limits, manifest.preprocess, CPU)
    return GpuBackend(runner, manifest, "cuda:0")


def test_wrong_inputs_never_reach_the_device(backend, cuda, draw):
    text = draw.text(2, 5)
    before = list(cuda.log)
    with pytest.raises(BackendError, match="expected 2 images for as many captions, got 3"):
        backend.submit(draw.images(SIZES[:3]), text)
    with pytest.raises(BackendError, match="input_ids: expected 0 to 2047, the vocabulary, got"):
        backend.submit(draw.images(SIZES[:2]), text | {"input_ids": text["input_ids"] + 2048})
    with pytest.raises(BackendError, match=r"expected the inputs \['input_ids', 'attention_mask'\]"):
        backend.submit(draw.images(SIZES[:2]), draw.feeds(2, 5))
    with pytest.raises(InputError, match="image 0: expected uint8"):
        backend.submit([np.zeros((4, 4), np.uint8)] * 2, text)
    assert cuda.log == before


def test_failures_to_submit_and_to_wait_are_backend_errors(backend, monkeypatch, draw):
    text, pictures = draw.text(1, 5), draw.images(SIZES[:1])

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    run = backend.submit(pictures, text)
    monkeypatch.setattr(graphs, "cut", fail)
    with pytest.raises(BackendError, match=r"torch failed on inputs of shape .*\[1, 5\].*: no room"):
        run.result()
    monkeypatch.setattr(graphs, "pack", fail)
    with pytest.raises(BackendError, match="torch failed on inputs of shape .*: no room"):
        backend.submit(pictures, text)


def test_closing_waits_for_what_was_started(backend, cuda, draw):
    backend.submit(draw.images(SIZES[:1]), draw.text(1, 5))
    backend.close()
    backend.close()
    assert cuda.log[-1] == "host waits for runs"
    with pytest.raises(BackendError, match="the backend was closed; create another Predictor"):
        backend.submit(draw.images(SIZES[:1]), draw.text(1, 5))


@pytest.fixture
def predictors(backend, tiny_network, manifest, bundle_dir, monkeypatch):
    """Two Predictors of one network: on the double, and eager on the CPU."""
    eager = TorchBackend(EagerRunner(tiny_network(), 1), manifest, "cpu")
    made = iter([backend, eager])
    monkeypatch.setattr(predictor_module, "create", lambda *_: next(made))
    with Predictor(bundle_dir) as on_gpu, Predictor(bundle_dir) as on_cpu:
        assert on_gpu._backend.asynchronous
        assert not on_cpu._backend.asynchronous
        yield on_gpu, on_cpu


def scores(answer):
    return np.array([answer.score, *answer.types.values(), *(word.score for word in answer.words)])


def test_the_predictor_answers_as_on_the_cpu(predictors, cuda, monkeypatch, draw):
    on_gpu, on_cpu = predictors
    pairs = [(x, "a man speaks " * (1 + i)) for i, x in enumerate(draw.images(SIZES[:4]))]
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


def test_captions_of_one_image_answer_as_pairs(predictors, draw):
    (image,), captions = draw.images(SIZES[:1]), ["a man", "a man speaks", "a dog and a man speak"]
    wanted = predictors[1].predict_batch([(image, caption) for caption in captions])
    for predictor in predictors:
        for answer, want in zip(predictor.predict_captions(image, captions), wanted, strict=True):
            assert np.abs(scores(answer) - scores(want)).max() <= EXACT


def test_a_stream_copies_the_next_batch_before_it_waits(predictors, cuda, draw):
    on_gpu, on_cpu = predictors
    pairs = [(x, "a man speaks") for x in draw.images([(30, 40 + i) for i in range(7)])]
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


def test_a_stream_stays_lazy(predictors, draw):
    """Three batches on their way at most: one runs, one is copied, one is prepared."""
    on_gpu, _ = predictors
    taken = []

    def pairs():
        for picture in draw.images([(9, 9)] * 30):
            taken.append(picture)
            yield picture, "a man"

    stream = on_gpu.stream(pairs(), batch_size=2)
    next(stream)
    assert len(taken) == 6
    stream.close()


def test_a_picture_too_large_to_send_is_resized_first(predictors, cuda, monkeypatch, draw):
    on_gpu, _ = predictors
    monkeypatch.setattr(preparation, "_LARGEST_SENT", 256)
    packed, pack = [], graphs.pack
    monkeypatch.setattr(graphs, "pack", lambda x, pinned: packed.extend(x) or pack(x, pinned))
    pictures = draw.images([(300, 20), (256, 255)])
    on_gpu.predict_batch([(x, "a man") for x in pictures])
    assert [x.shape for x in packed] == [(256, 256, 3), (256, 255, 3)]
    want = [normalize_image(resize_image(Image.fromarray(x), 256), CLIP_MEAN, CLIP_STD) for x in pictures]
    assert np.array_equal(cuda.seen[-1]["image"][:2], np.stack(want))


def test_warming_up_captures_the_largest_first(predictors, cuda, draw):
    on_gpu, _ = predictors
    on_gpu.warm_up([(1, 16), (2, 24), (10_000, 2), (2, 1), (1, 10_000)])
    limits = on_gpu.manifest.limits
    shapes = [seen["input_ids"].shape for seen in cuda.seen]
    assert shapes == [(limits.max_batch, 16), (2, 32), (2, 16), (1, limits.max_tokens), (1, 16)]
    before = cuda.log.count("capture")
    on_gpu.predict_batch([(x, "a man speaks") for x in draw.images(SIZES[:3])])
    assert cuda.log.count("capture") == before == 5


def test_warming_up_all_buckets_captures_each_once(predictors, cuda):
    on_gpu, _ = predictors
    on_gpu.warm_up(all_buckets=True)
    limits = on_gpu.manifest.limits
    shapes = [seen["input_ids"].shape for seen in cuda.seen]
    assert shapes == sorted(set(shapes), reverse=True)
    assert set(shapes) == {(b, min(n, limits.max_tokens)) for b in (1, 2, 4) for n in range(16, 129, 16)}


def test_a_batch_that_does_not_fit_runs_in_halves(predictors, cuda, monkeypatch, draw):
    on_gpu, on_cpu = predictors
    pairs = [(x, "a man speaks") for x in draw.images(SIZES[:4])]
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
    wanted = on_cpu.predict_batch(pairs)
    cuda.failures = 2  # the capture, and the second try after the cache was emptied
    for answer, want in zip(on_gpu.predict_batch(pairs), wanted, strict=True):
        assert np.abs(scores(answer) - scores(want)).max() <= EXACT
    assert len(freed) == 2
    assert [len(inputs["image"]) for inputs in cuda.seen] == [2, 2]
    monkeypatch.setattr(
        graphs, "cut", failing_once(graphs.cut, torch.OutOfMemoryError("no room: out of memory"))
    )
    for answer, want in zip(on_gpu.predict_batch(pairs[:2]), wanted, strict=False):
        assert np.abs(scores(answer) - scores(want)).max() <= EXACT
    assert [len(inputs["image"]) for inputs in cuda.seen[2:]] == [2, 1, 1]


def failing_once(function, error):
    errors = [error]

    def call(*arguments):
        if errors:
            raise errors.pop()
        return function(*arguments)

    return call
