"""Running a network of torch: as it comes, or in buckets of static shape as captured CUDA graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from engine.backends.buckets import Arrays, Bucket, bucket_of, cut, fill
from engine.manifest import Limits
from engine.network.model import InferenceModel

_WARM_UPS = 3  # as torch's documentation of CUDA graphs does: compilation, workspaces, lazy set-up
_CAPTURE = threading.Lock()  # torch allows one capture at a time in a process


def answers_of(model: InferenceModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the network answers, by name; without the map where it has none."""
    return {name: x for name, x in model(**inputs)._asdict().items() if x is not None}


class EagerRunner:
    """Any shape on the CPU, with `threads` threads."""

    def __init__(self, model: InferenceModel, threads: int) -> None:
        self._model, self._threads = model, threads

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Answer one batch."""
        # torch keeps the number by process, but a thread that has run before keeps its own.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(np.require(x, None, ["C", "W"])) for name, x in feeds.items()}
            return {name: x.numpy() for name, x in answers_of(self._model, inputs).items()}


class BucketRunner:
    """One bucket: host and device buffers that stay, and on a GPU one graph over them.

    A run holds the bucket's lock from the first copy to the last; other buckets run beside it.
    """

    def __init__(self, model: InferenceModel, bucket: Bucket, device: torch.device, capture: bool) -> None:
        self._model, self._device, self._capture_wanted = model, device, capture
        self._lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        size = model.config.image_size
        text = torch.zeros(tuple(bucket), dtype=torch.int64)
        # Captured on blank inputs: one valid token a caption.
        text[:, 0] = 1
        blank = {
            "image": torch.zeros(bucket.batch, 3, size, size),
            "input_ids": torch.zeros_like(text),
            "attention_mask": text,
        }
        self._host = {name: x.pin_memory() if cuda else x.clone() for name, x in blank.items()}
        self._inputs = {name: x.to(device, copy=True) for name, x in blank.items()}
        self._outputs: dict[str, Tensor] = {}
        self._answers: dict[str, Tensor] = {}

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Answer `batch` pairs of `tokens` tokens, which fit the bucket."""
        with self._lock, torch.inference_mode(), self._on_stream():
            if not self._answers:
                self._prepare()
            for name, values in feeds.items():
                fill(self._host[name].numpy(), values)
                self._inputs[name].copy_(self._host[name], non_blocking=True)
            outputs = self._replay()
            for name, answer in self._answers.items():
                answer.copy_(outputs[name], non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            return cut({name: x.numpy() for name, x in self._answers.items()}, batch, tokens)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """The bucket's own stream and its device, where there is one."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def _forward(self) -> dict[str, Tensor]:
        # cuDNN would round the inputs of float32 convolutions to TF32 otherwise.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return answers_of(self._model, self._inputs)

    def _prepare(self) -> None:
        """Warm up on the side stream, capture if asked for, and make room for the answers on the host."""
        for _ in range(_WARM_UPS if self._capture_wanted else 1):
            outputs = self._forward()
        if self._stream is not None:
            self._stream.synchronize()
        if self._capture_wanted:
            outputs = self._capture()
        pinned = self._device.type == "cuda"
        self._answers = {
            name: torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned) for name, x in outputs.items()
        }

    def _capture(self) -> dict[str, Tensor]:
        """Record one forward pass; its outputs stay where every replay writes them."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may copy or allocate meanwhile, hence "thread_local".
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with _CAPTURE, recording:
            self._outputs = self._forward()
        self._graph = graph
        return self._outputs

    def _replay(self) -> dict[str, Tensor]:
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._outputs


class BucketedRunner:
    """Every shape within `limits` through its bucket, which is made when it is first needed.

    Each graph keeps memory of its own for what lies between inputs and outputs.
    """

    def __init__(self, model: InferenceModel, limits: Limits, device: torch.device, capture: bool) -> None:
        self._model, self._limits, self._device, self._capture = model, limits, device, capture
        self._runners: dict[Bucket, BucketRunner] = {}
        self._lock = threading.Lock()

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError above the limits."""
        return self._runner(bucket_of(batch, tokens, self._limits)).run(feeds, batch, tokens)

    def _runner(self, bucket: Bucket) -> BucketRunner:
        with self._lock:
            if bucket not in self._runners:
                self._runners[bucket] = BucketRunner(self._model, bucket, self._device, self._capture)
            return self._runners[bucket]
