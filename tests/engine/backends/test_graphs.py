"""The captured graphs, on the double of torch.cuda in conftest.py. test_torch.py has those on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import differing

from engine.backends.buckets import Bucket
from engine.errors import BackendError

LARGEST = Bucket(4, 40)


@pytest.mark.parametrize("shape", [(1, 2), (3, 17)])
def test_an_answer_does_not_depend_on_its_bucket(name, shape, make_runner, draw, check_eager):
    """In buffers that held something else."""
    runner, feeds = make_runner(name), draw.feeds(*shape)
    runner._inputs.image(LARGEST).fill_(torch.nan)
    runner._inputs.text(LARGEST).fill_(1999)
    check_eager(runner.run(feeds, *shape), runner._model, feeds)


def test_what_a_batch_held_before_is_gone(make_runner, draw):
    """A short caption after long ones, bit for bit as in fresh buffers; what was padded is zero."""
    runner, short = make_runner(), draw.feeds(1, 3)
    fresh = runner.run(short, 1, 3)
    runner.run(draw.feeds(1, 16, seed=1), 1, 16)
    runner.run(draw.feeds(2, 30, seed=2), 2, 30)
    again = runner.run(short, 1, 3)
    assert all(np.array_equal(fresh[key], again[key]) for key in fresh)


def test_what_is_padded_is_zero(make_runner, cuda, draw):
    runner = make_runner()
    runner._inputs.image(LARGEST).fill_(torch.nan)
    runner._inputs.text(LARGEST).fill_(1999)
    runner.run(draw.feeds(3, 20), 3, 20)
    inputs = cuda.seen[-1]
    assert [x.shape for x in inputs.values()] == [(4, 3, 256, 256), (4, 32), (4, 32)]
    assert not inputs["image"][3:].any()
    for name in ("input_ids", "attention_mask"):
        assert not inputs[name][3:].any()
        assert not inputs[name][:, 20:].any()


def test_a_bucket_is_captured_once_after_warming_up_on_its_own_inputs(make_runner, cuda, draw):
    flag = torch.backends.cudnn.allow_tf32
    runner = make_runner()
    for number in (1, 2):
        runner.run(draw.feeds(2, 20 + number), 2, 20 + number)
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
def test_a_graph_does_not_freeze_the_hosts_precision(
    make_runner, cuda, host_settings, interface, draw, check_eager
):
    """`FakeCuda.graph` asserts that products are exact while it captures."""
    host_settings(interface)
    runner, feeds = make_runner(), draw.feeds(2, 20)
    check_eager(runner.run(feeds, 2, 20), runner._model, feeds)
    assert cuda.log.count("capture") == 1


def test_all_buckets_share_their_buffers(make_runner):
    runner = make_runner()
    largest, small = (runner._inputs.named(bucket) for bucket in (LARGEST, Bucket(1, 16)))
    assert small["image"].data_ptr() == largest["image"].data_ptr()
    assert small["input_ids"].data_ptr() == largest["input_ids"].data_ptr()
    assert small["attention_mask"].data_ptr() == small["input_ids"].data_ptr() + 16 * 8
    assert all(x.is_contiguous() for x in (*largest.values(), *small.values()))


def test_a_failed_capture_is_repeated_once(make_runner, cuda, caplog, draw, check_eager):
    runner, feeds = make_runner(), draw.feeds(2, 20)
    cuda.failures = 1
    check_eager(runner.run(feeds, 2, 20), runner._model, feeds)
    assert caplog.text.count("the graph of Bucket(batch=2, tokens=32) is captured again: no room") == 1


def test_what_failed_twice_is_captured_by_the_next_batch(make_runner, cuda, draw, check_eager):
    runner, feeds = make_runner(), draw.feeds(2, 20)
    cuda.failures = 2
    with pytest.raises(torch.OutOfMemoryError):
        runner.run(feeds, 2, 20)
    check_eager(runner.run(feeds, 2, 20), runner._model, feeds)
    assert cuda.log.count("capture") == 1


def test_nothing_beyond_the_limits(make_runner, draw):
    with pytest.raises(BackendError, match="expected 1 to 4 pairs of 1 to 40 tokens"):
        make_runner().run(draw.feeds(5, 5), 5, 5)


def test_batches_that_run_at_once_keep_their_answers(make_runner, cuda, draw, check_eager, network_input):
    """The copies of one come before the host waits for the one before; of one bucket and of another."""
    runner = make_runner()
    images = draw.images([(64, 48)])
    texts = [draw.text(1, tokens, seed) for seed, tokens in enumerate((20, 5, 25))]
    runs = [runner.start(images, text, *text["input_ids"].shape) for text in texts]
    assert not [line for line in cuda.log if line.startswith("host waits for runs ")]
    pixels = np.stack([network_input(image) for image in images])
    for text, run in zip(texts, runs, strict=True):
        check_eager(run.result(), runner._model, {"image": pixels, **text})


def test_threads_agree_bit_for_bit(make_runner, cuda, draw):
    """Two cases share a bucket, one has its own; each waits within its replay."""
    runner, cuda.pause = make_runner(), 0.01
    cases = [draw.feeds(1, 5), draw.feeds(1, 9, seed=1), draw.feeds(2, 20, seed=2)]

    def run(case):
        return runner.run(case, *case["input_ids"].shape)

    assert differing(run, cases, threads=4) == []


def test_images_become_the_networks_input(make_runner, cuda, draw, check_eager, network_input):
    """Bit for bit, whatever their sizes; the answers are those of that input."""
    runner, pictures, text = make_runner(), draw.images([(64, 48), (300, 20), (257, 255)]), draw.text(3, 20)
    want = np.stack([network_input(x) for x in pictures])
    outputs = runner.start(pictures, text, 3, 20).result()
    assert np.array_equal(cuda.seen[-1]["image"][:3], want)
    assert not cuda.seen[-1]["image"][3:].any()
    check_eager(outputs, runner._model, {"image": want, **text})
