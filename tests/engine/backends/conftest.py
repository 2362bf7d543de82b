"""A double of torch.cuda whose tensors lie on the CPU, and what the tests of captured graphs draw."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import draw_feeds, draw_text

from engine import Bundle
from engine.backends import graphs
from engine.backends.graphs import GraphRunner
from engine.manifest import Limits
from engine.network.model import InferenceModel
from engine.registry.config import NetworkConfig

CPU = torch.device("cpu")
LIMITS = Limits(max_batch=4, max_tokens=40)
EXACT = 2e-5  # float32 rounding: a bucket blocks its products otherwise


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

    def outputs_of(self, model, inputs):
        assert inputs["attention_mask"].max() <= 1  # a pass over another bucket's text may read out of bounds
        outputs = self.network(model, inputs)
        if self.capturing is not None:
            self.capturing.recorded = model, inputs, outputs
        elif self.current == "runs":
            self.log.append("pass")
        return outputs

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
        model, inputs, outputs = self.recorded
        cuda.seen.append({name: x.clone().numpy() for name, x in inputs.items()})
        time.sleep(cuda.pause)
        for other in cuda.graphs:
            for x in other.recorded[2].values():
                x.fill_(torch.nan)
        for name, x in cuda.network(model, inputs).items():
            outputs[name].copy_(x)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(graphs.outputs_of)
    monkeypatch.setattr(graphs, "outputs_of", fake.outputs_of)
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


def draw_images(sizes):
    random = np.random.default_rng(5)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="session")
def draw():
    """Functions that draw inputs of a tiny network.

    .text(batch, tokens, seed): ids and mask. .feeds(batch, tokens, seed): these and normalised images.
    .images(sizes): uint8 [H, W, 3] of these (height, width).
    """
    return SimpleNamespace(text=draw_text, feeds=draw_feeds, images=draw_images)


@pytest.fixture(scope="session")
def check_eager():
    """A function (outputs, model, feeds) that compares outputs with those of the network without buckets."""

    def check(outputs, model, feeds):
        inputs = {name: torch.from_numpy(x.copy()) for name, x in feeds.items()}
        wanted = {name: x.numpy() for name, x in model(**inputs)._asdict().items() if x is not None}
        assert outputs.keys() == wanted.keys()
        for name, array in outputs.items():
            assert (array.shape, array.dtype) == (wanted[name].shape, np.float32)
            assert np.abs(array - wanted[name]).max() <= EXACT, name

    return check
