"""Running a network of torch: as it comes, or in buckets of static shape as captured CUDA graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

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

    def __init__(self, model: InferenceModel, bucket: Bucket, device: torch.device) -> None:
        self._model, self._lock = model, threading.Lock()
        self._pinned = device.type == "cuda"  # copies from pinned memory alone run beside the host
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        size = model.config.image_size
        buffers = {
            "image": ((bucket.batch, 3, size, size), torch.float32),
            "input_ids": (tuple(bucket), torch.int64),
            "attention_mask": (tuple(bucket), torch.int64),
        }
        self._host = {
            name: torch.zeros(shape, dtype=dtype, pin_memory=self._pinned)
            for name, (shape, dtype) in buffers.items()
        }
        self._inputs = {name: x.to(device, copy=True) for name, x in self._host.items()}
        self._outputs: dict[str, Tensor] = {}  # where every replay of the graph leaves its answers
        self._answers: dict[str, Tensor] = {}  # the same on the host

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Answer `batch` pairs of `tokens` tokens, which fit the bucket."""
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with self._lock, torch.inference_mode(), stream:
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

    def _prepare(self) -> None:
        """Capture where there is a stream to, and make room for the answers on the host."""
        outputs = (
            answers_of(self._model, self._inputs) if self._stream is None else self._capture(self._stream)
        )
        self._answers = {
            name: torch.empty(x.shape, dtype=x.dtype, pin_memory=self._pinned) for name, x in outputs.items()
        }

    def _capture(self, stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Warm up and record one forward pass on `stream`, a side stream."""
        graph = torch.cuda.CUDAGraph()
        # cuDNN would round float32 convolutions to TF32; its flags are the process's, hence inside the lock.
        with _CAPTURE, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for _ in range(_WARM_UPS):
                answers_of(self._model, self._inputs)
            stream.synchronize()
            # "thread_local": other threads may copy and allocate meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = answers_of(self._model, self._inputs)
        self._graph = graph
        return self._outputs

    def _replay(self) -> dict[str, Tensor]:
        if self._graph is None:
            return answers_of(self._model, self._inputs)
        self._graph.replay()
        return self._outputs


class BucketedRunner:
    """Every shape within `limits` through its bucket, which is made when it is first needed.

    Each graph keeps memory of its own for what lies between inputs and outputs.
    """

    def __init__(self, model: InferenceModel, limits: Limits, device: torch.device) -> None:
        self._model, self._limits, self._device = model, limits, device
        self._runners: dict[Bucket, BucketRunner] = {}
        self._lock = threading.Lock()

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError above the limits."""
        return self._runner(bucket_of(batch, tokens, self._limits)).run(feeds, batch, tokens)

    def _runner(self, bucket: Bucket) -> BucketRunner:
        with self._lock:
            if bucket not in self._runners:
                self._runners[bucket] = BucketRunner(self._model, bucket, self._device)
            return self._runners[bucket]
