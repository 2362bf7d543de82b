"""Running a network of torch: as it comes on a CPU, as captured CUDA graphs of static shape on a GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.backends.buckets import Arrays, Bucket, bucket_of, cut, fill
from engine.backends.float32 import full_float32
from engine.manifest import Limits, Preprocess
from engine.network.model import InferenceModel
from kernels.resize import pack, resize_into
from kernels.resize_tables import Tables, make_tables

logger = logging.getLogger(__name__)

_WARM_UPS = 3  # as torch's documentation of CUDA graphs does: compilation, workspaces, lazy set-up
_CAPTURE = threading.Lock()  # torch allows one capture at a time in a process

Pictures = Sequence[np.ndarray]  # decoded, uint8 [H, W, 3] each of its own size


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
        with torch.inference_mode(), full_float32("cpu"):
            inputs = {name: torch.from_numpy(np.require(x, None, ["C", "W"])) for name, x in feeds.items()}
            return {name: x.numpy() for name, x in answers_of(self._model, inputs).items()}


class Inputs:
    """The input buffers of all buckets: each bucket's are the beginning of the largest's."""

    def __init__(self, limits: Limits, image_size: int, device: torch.device) -> None:
        self._image = torch.zeros(
            (limits.max_batch, 3, image_size, image_size), dtype=torch.float32, device=device
        )
        self._text = torch.zeros(2 * limits.max_batch * limits.max_tokens, dtype=torch.int64, device=device)

    def image(self, bucket: Bucket) -> Tensor:
        """Normalised pictures, float32 [B, 3, S, S]."""
        return self._image[: bucket.batch]

    def text(self, bucket: Bucket) -> Tensor:
        """Token ids and mask, int64 [2, B, N]."""
        return self._text[: 2 * bucket.batch * bucket.tokens].view(2, *bucket)

    def named(self, bucket: Bucket) -> dict[str, Tensor]:
        """The network's inputs by name."""
        input_ids, attention_mask = self.text(bucket)
        return {"image": self.image(bucket), "input_ids": input_ids, "attention_mask": attention_mask}


class Captured(NamedTuple):
    """A graph, and where each of its replays leaves its answers."""

    graph: torch.cuda.CUDAGraph
    answers: dict[str, Tensor]


class GraphRunner:
    """Every shape within `limits` on one GPU, as the graph of its bucket, captured when it is first needed.

    Two streams: copies to the device go on one, into memory of their own, and beside them on the other the
    batches before, each from those copies to the inputs, through the graph, to the host. 64 pictures of
    640 x 480 are 59 MB, about 1 ms at the 55 GB/s of pinned memory, where the network takes 6 to 8 ms.

    The graphs share their inputs and one pool of memory, which is as large as the largest needs where that
    is captured first. A replay overwrites what another left in the pool, its outputs too: so all replays
    are on one stream, and the copy of a replay's outputs stands there before the next replay. On one stream
    graphs of one pool may be replayed in any order (pytorch/pytorch #166975).
    """

    def __init__(self, model: InferenceModel, limits: Limits, spec: Preprocess, device: torch.device) -> None:
        self._model, self._limits, self._spec, self._device = model, limits, spec, device
        self._pinned = device.type == "cuda"  # copies from pinned memory alone run beside the host
        self._copies, self._runs = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Bucket, Captured] = {}
        self._lock = threading.Lock()  # of what enters `_runs`: a batch's steps stay together
        self._runs.wait_stream(torch.cuda.current_stream(device))  # which may still make the weights
        with torch.cuda.stream(self._runs):
            self._inputs = Inputs(limits, spec.image_size, device)

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Answer one batch of normalised pictures; raises BackendError above the limits."""
        return self.start(feeds["image"], feeds, batch, tokens)()

    def start(
        self, image: np.ndarray | Pictures, text: Arrays, batch: int, tokens: int
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to answer a batch and return what waits for its answers.

        `image` is normalised pictures, float32 [B, 3, S, S], or decoded ones. Raises BackendError above the
        limits.
        """
        bucket = bucket_of(batch, tokens, self._limits)
        with torch.inference_mode():
            with torch.cuda.stream(self._copies):
                write_image, sent_text = self._send_image(image), self._send_text(text, bucket)
                sent = self._copies.record_event()
            with self._lock, torch.cuda.stream(self._runs):
                self._runs.wait_event(sent)
                write_image(self._inputs.image(bucket)[:batch])
                self._inputs.image(bucket)[batch:].zero_()
                self._inputs.text(bucket).copy_(sent_text)
                # After the inputs: what another bucket left in them is no text of this one.
                captured = self._captured(bucket)
                captured.graph.replay()
                answers = {name: self._fetch(x) for name, x in captured.answers.items()}
                done = self._runs.record_event()
        return partial(self._wait, done, answers, batch, tokens)

    def close(self) -> None:
        """Wait for what was started: memory that is given back may not be written any more."""
        self._runs.synchronize()

    def _wait(
        self, done: torch.cuda.Event, answers: dict[str, Tensor], batch: int, tokens: int
    ) -> dict[str, np.ndarray]:
        done.synchronize()
        return cut({name: x.numpy() for name, x in answers.items()}, batch, tokens)

    def _send_image(self, image: np.ndarray | Pictures) -> Callable[[Tensor], object]:
        """Copy pictures to the device; what is returned writes them, normalised, into a buffer."""
        if isinstance(image, np.ndarray):
            host = torch.empty(image.shape, dtype=torch.float32, pin_memory=self._pinned)
            np.copyto(host.numpy(), image)
            pixels = self._send(host)
            return lambda buffer: buffer.copy_(pixels)
        packed, sizes = pack(image, self._pinned)
        mean, std = self._spec.mean, self._spec.std
        pixels = self._send(packed)
        tables = Tables(*map(self._send, make_tables(sizes, self._spec.image_size, mean, std)))
        return lambda buffer: resize_into(buffer, pixels, sizes, mean, std, tables)

    def _send_text(self, text: Arrays, bucket: Bucket) -> Tensor:
        """Copy ids and mask, padded to the bucket, to the device."""
        host = torch.empty((2, *bucket), dtype=torch.int64, pin_memory=self._pinned)
        for row, name in zip(host, ("input_ids", "attention_mask"), strict=True):
            fill(row.numpy(), text[name])
        return self._send(host)

    def _send(self, host: Tensor) -> Tensor:
        """Copy to memory of its own on the device, free again once `_runs` has read it."""
        sent = (host.pin_memory() if self._pinned else host).to(self._device, non_blocking=True)
        sent.record_stream(self._runs)
        return sent

    def _fetch(self, answer: Tensor) -> Tensor:
        """Copy an answer to the host; it is there once the stream has come so far."""
        host = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=self._pinned)
        return host.copy_(answer, non_blocking=True)

    def _captured(self, bucket: Bucket) -> Captured:
        if bucket not in self._graphs:
            try:
                captured = self._capture(self._inputs.named(bucket))
            except RuntimeError as error:
                # Where memory is short, an allocation in another thread can break a capture: the allocator
                # gives back no memory while one is under way. It does so now.
                logger.warning("the graph of %s is captured again: %s", bucket, error)
                torch.cuda.empty_cache()
                captured = self._capture(self._inputs.named(bucket))
            self._graphs[bucket] = captured
        return self._graphs[bucket]

    def _capture(self, inputs: Mapping[str, Tensor]) -> Captured:
        """Warm up, so that whatever a pass keeps for later ones lies outside the pool, and record a pass."""
        graph = torch.cuda.CUDAGraph()
        # By default cuDNN rounds float32 convolutions to TF32. A replay repeats the kernels chosen here.
        with _CAPTURE, full_float32("cuda"):
            for _ in range(_WARM_UPS):
                answers_of(self._model, inputs)
            self._runs.synchronize()
            # "thread_local": other threads may copy and allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._runs, capture_error_mode="thread_local"
            ):
                answers = answers_of(self._model, inputs)
        return Captured(graph, answers)
