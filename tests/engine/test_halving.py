"""Batches that the device has no memory for: run in halves, remembered, and nothing kept alive meanwhile."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from engine import Batcher, Predictor
from engine.backends.base import Backend, OutOfMemoryError, lacks_memory
from engine.errors import BackendError
from engine.halving import Halving

# What the libraries raise, word for word where that is public.
RAISED = {
    "torch": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
    ),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    ),
    "CUDA": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "ONNX Runtime": RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
        "bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for "
        "requested buffer of size 939524096"
    ),
    "ONNX Runtime, CUDA": RuntimeError(
        "CUDA failure 2: out of memory ; GPU=0 ; cudaMalloc((void**)&p, size)"
    ),
    "TensorRT": BackendError(
        "tensorrt 11.4.0.106 could not make an execution context: [executionContext.cpp::470] "
        "Error Code 2: OutOfMemory (Requested size was 17920000000 bytes.)"
    ),
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
    "NumPy": np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.float32)),
}


class Device:
    """Memory for `most` pairs at once: a larger run raises `error`. `sizes` has the runs that were tried."""

    def __init__(self, predictor, most, error=None):
        self.most, self.error, self.sizes, self.freed = most, error or RAISED["torch"], [], 0
        self.backend, self.run, self.held = predictor._backend, predictor._backend._run, None
        self.backend._run, self.backend.free = self, self.free

    def __call__(self, network, feeds, batch, tokens):
        self.sizes.append(batch)
        if batch > self.most:
            activations = np.zeros(4)  # what the frames of a failed run hold
            self.held = weakref.ref(activations)
            raise self.error
        return self.run(network, feeds, batch, tokens)

    def free(self):
        self.freed += 1
        assert self.held is None or self.held() is None, "the error still holds what fills the memory"


@pytest.fixture
def own_predictor(bundle_dir):
    with Predictor(bundle_dir, threads=1) as made:
        yield made


@pytest.fixture
def pairs(photo):
    return [(photo.rotate(20 * i), " ".join(["obama speaks"] * (1 + i))) for i in range(4)]


@pytest.mark.parametrize("error", RAISED.values(), ids=RAISED)
def test_a_batch_runs_in_halves_of_halves(own_predictor, pairs, error):
    expected = own_predictor.predict_batch(pairs)
    device = Device(own_predictor, 1, error)
    results = own_predictor.predict_batch(pairs)
    assert device.sizes == [4, 2, 1, 1, 1, 1]
    assert device.freed == 2
    for result, wanted in zip(results, expected, strict=True):
        assert result == wanted
        assert np.array_equal(result.heatmap, wanted.heatmap)


def test_other_errors_are_no_shortage(own_predictor, pairs):
    device = Device(own_predictor, 0, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(BackendError, match="an illegal memory access") as caught:
        own_predictor.predict_batch(pairs)
    assert not isinstance(caught.value, OutOfMemoryError)
    assert device.sizes == [4]
    assert not lacks_memory(ValueError("shape"))


def test_without_memory_for_one_pair_it_says_so_and_recovers(own_predictor, pairs, caplog):
    expected = own_predictor.predict(*pairs[0])
    device = Device(own_predictor, 0)
    for call in (lambda: own_predictor.predict(*pairs[0]), lambda: own_predictor.predict_batch(pairs)):
        with pytest.raises(
            BackendError, match="CUDA out of memory.*; not even one pair fits: free memory on"
        ):
            call()
    assert device.sizes == [1, 1, 4, 2, 1]
    device.most = 4
    assert own_predictor.predict(*pairs[0]) == expected
    device.sizes.clear()
    own_predictor.predict_batch(pairs)
    assert device.sizes == [4]
    assert caplog.text == ""


def test_the_size_that_fitted_is_remembered_for_a_while(own_predictor, pairs, caplog):
    clock = [0.0]
    own_predictor._runner._halving = Halving(own_predictor._backend, lambda: clock[0])
    device = Device(own_predictor, 2)
    for _ in range(3):
        own_predictor.predict_batch(pairs)
    own_predictor.predict_batch(pairs[:2])
    assert device.sizes == [4, 2, 2, 2, 2, 2, 2, 2]
    assert caplog.text.count("no memory for 4 pairs at once: batches have 2 for a while") == 1
    clock[0] = 61.0
    device.sizes.clear()
    own_predictor.predict_batch(pairs)
    device.most = 4
    own_predictor.predict_batch(pairs)
    clock[0] = 130.0
    own_predictor.predict_batch(pairs)
    own_predictor.predict_batch(pairs)
    assert device.sizes == [4, 2, 2, 2, 2, 4, 4]


def test_captions_of_one_image_run_in_halves(own_predictor, photo):
    captions = ["obama", "obama speaks", "the president", "in person"]
    expected = own_predictor.predict_captions(photo, captions)
    device = Device(own_predictor, 2)
    assert own_predictor.predict_captions(photo, captions) == expected
    assert device.sizes == [4, 2, 2]


def test_a_batcher_answers_all(own_predictor, pairs):
    expected = own_predictor.predict_batch(pairs)
    Device(own_predictor, 1)
    with Batcher(own_predictor) as batcher:
        futures = [batcher.submit(*pair) for pair in pairs * 3]
        for future, wanted in zip(futures, expected * 3, strict=True):
            assert future.result(20).score == pytest.approx(wanted.score, abs=1e-6)


def test_a_run_may_run_short_when_it_is_waited_for(own_predictor, pairs):
    """As on a GPU, where a batch is submitted before it runs."""
    expected = own_predictor.predict_batch(pairs)
    backend = own_predictor._backend
    device, short = Device(own_predictor, 2), Backend.submit

    class Late:
        def __init__(self, *batch):
            self.batch = batch

        def result(self):
            return short(backend, *self.batch).result()

    backend.submit = Late
    assert own_predictor.predict_batch(pairs) == expected
    assert device.sizes == [4, 2, 2]
