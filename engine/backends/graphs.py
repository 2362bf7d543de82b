"""Runs a torch network: eager on a CPU, as captured CUDA graphs of static shapes on a GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.backends.buckets import Arrays, Bucket, bucket_of, cut, fill
from engine.backends.float32 import full_float32
from engine.manifest import Limits, Preprocess
from engine.network.model import InferenceModel
from engine.network.output import Output
from engine.registry import network_of
from engine.registry.record import Shape
from kernels.resize import pack, resize_into
from kernels.resize_tables import Tables, make_tables

logger = logging.getLogger(__name__)

_WARM_UPS = 3  # as torch's documentation of CUDA graphs does: compilation, workspaces, lazy set-up
_CAPTURE = threading.Lock()  # torch allows one capture at a time in a process

Images = Sequence[np.ndarray]  # uint8 [H, W, 3], each of its own size
WriteImages = Callable[[Tensor], object]  # writes a batch's normalised images into a buffer [B, 3, S, S]


def outputs_of(model: InferenceModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's outputs by name; without the map where it has none."""
    return by_name(model(**inputs))


def by_name(output: Output) -> dict[str, Tensor]:
    """Outputs by name; without the map where there is none."""
    return {name: x for name, x in output._asdict().items() if x is not None}


class _Threads:
    """Lends runs a number of torch's CPU threads, which is a setting of the whole process."""

    def __init__(self) -> None:
        self._lock, self._runs, self._before = threading.Lock(), 0, 0

    @contextmanager
    def set_to(self, count: int) -> Iterator[None]:
        """Run the block with `count` threads; afterwards the process has its own number again."""
        with self._lock:
            if not self._runs:
                self._before = torch.get_num_threads()
            self._runs += 1
        try:
            # A thread that has run before keeps the number it had then, so each run sets it.
            torch.set_num_threads(count)
            yield
        finally:
            with self._lock:
                self._runs -= 1
                torch.set_num_threads(self._before)


_THREADS = _Threads()


class EagerRunner:
    """Runs any shape on the CPU, with `threads` threads."""

    def __init__(self, model: InferenceModel, threads: int) -> None:
        self._model, self._threads = model, threads

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Run one batch and return its outputs by name."""
        with _THREADS.set_to(self._threads), torch.inference_mode(), full_float32("cpu"):
            if batch > 1 and not feeds["image"].strides[0]:  # one image, repeated by a view
                return self._share(feeds, batch)
            return {name: x.numpy() for name, x in outputs_of(self._model, _tensors(feeds)).items()}

    def _share(self, feeds: Arrays, batch: int) -> dict[str, np.ndarray]:
        """Answer several captions about one image, which the visual encoder sees once."""
        inputs = _tensors({**feeds, "image": feeds["image"][:1]})
        seen = [x.expand(batch, -1, -1) for x in self._model.see(inputs.pop("image"))]
        outputs = by_name(self._model.answer(*seen, **inputs))
        return {name: x.numpy() for name, x in outputs.items()}


def _tensors(feeds: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.require(x, None, ["C", "W"])) for name, x in feeds.items()}


class Inputs:
    """The input buffers of all buckets: each bucket's are the beginning of the largest's."""

    def __init__(
        self, limits: Limits, image_size: int, device: torch.device, others: Mapping[str, Shape]
    ) -> None:
        self._image = torch.zeros(
            (limits.max_batch, 3, image_size, image_size), dtype=torch.float32, device=device
        )
        self._text = torch.zeros(2 * limits.max_batch * limits.max_tokens, dtype=torch.int64, device=device)
        self._others = {
            name: torch.zeros((limits.max_batch, *map(int, shape)), device=device)
            for name, shape in others.items()
        }

    def image(self, bucket: Bucket) -> Tensor:
        """Normalised images, float32 [B, 3, S, S]."""
        return self._image[: bucket.batch]

    def text(self, bucket: Bucket) -> Tensor:
        """Token ids and mask, int64 [2, B, N]."""
        return self._text[: 2 * bucket.batch * bucket.tokens].view(2, *bucket)

    def others(self, bucket: Bucket) -> dict[str, Tensor]:
        """Inputs beside image and text, such as boxes, float32 [B, ...] by name."""
        return {name: buffer[: bucket.batch] for name, buffer in self._others.items()}

    def named(self, bucket: Bucket) -> dict[str, Tensor]:
        """The network's inputs by name."""
        input_ids, attention_mask = self.text(bucket)
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {"image": self.image(bucket), **text, **self.others(bucket)}


class Captured(NamedTuple):
    """A graph, and where each of its replays leaves its outputs."""

    graph: torch.cuda.CUDAGraph
    outputs: dict[str, Tensor]


class Replay(NamedTuple):
    """A batch on the GPU: its outputs, on the host once `done` has happened."""

    done: torch.cuda.Event
    outputs: dict[str, Tensor]
    batch: int
    tokens: int

    def result(self) -> dict[str, np.ndarray]:
        """Wait for the batch and return its outputs by name."""
        self.done.synchronize()
        arrays = {name: x.numpy() for name, x in self.outputs.items()}
        return cut(arrays, self.batch, self.tokens)


class GraphRunner:
    """Runs every shape within `limits` on one GPU, as the graph of its bucket, captured at its first use.

    One stream copies batches to the device, into memory of their own; meanwhile the other runs the batches
    before, each from that memory to the inputs, through the graph, to the host. 64 images of 640 x 480 are
    59 MB, about 1 ms at the 55 GB/s of pinned memory, where the network takes 6 to 8 ms.

    The graphs share their inputs and one pool of memory, which is as large as the largest needs where that
    is captured first. A replay overwrites what another left in the pool, its outputs too: so all replays
    are on one stream, and the copy of a replay's outputs is queued before the next replay. On one stream
    graphs of one pool may be replayed in any order (pytorch/pytorch #166975).
    """

    def __init__(self, model: InferenceModel, limits: Limits, spec: Preprocess, device: torch.device) -> None:
        self._model, self._limits, self._spec, self._device = model, limits, spec, device
        self._pinned = device.type == "cuda"  # only copies from pinned memory are asynchronous
        self._copies, self._runs = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Bucket, Captured] = {}
        self._lock = threading.Lock()  # of the queue of `_runs`: a batch's steps stay together
        self._runs.wait_stream(torch.cuda.current_stream(device))  # which may still make the weights
        with torch.cuda.stream(self._runs):
            others = network_of(model.config).further(model.config)
            self._inputs = Inputs(limits, spec.image_size, device, others)

    def run(self, feeds: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
        """Run one batch of normalised images; raises BackendError above the limits."""
        return self._replay(partial(self._send_pixels, feeds["image"]), feeds, batch, tokens).result()

    def start(self, images: Images, text: Arrays, batch: int, tokens: int) -> Replay:
        """Start one batch of images, which are resized on the GPU; raises BackendError above the limits."""
        return self._replay(partial(self._send_images, images), text, batch, tokens)

    def _replay(self, send: Callable[[], WriteImages], text: Arrays, batch: int, tokens: int) -> Replay:
        """Queue the copies to the device, the replay of the bucket's graph, and the copies of its outputs."""
        bucket = bucket_of(batch, tokens, self._limits)
        with torch.inference_mode():
            with torch.cuda.stream(self._copies):
                write_images, sent_text = send(), self._send_text(text, bucket)
                others = self._inputs.others(bucket)
                sent_others = {name: self._send(torch.from_numpy(text[name])) for name in others}
                sent = self._copies.record_event()
            with self._lock, torch.cuda.stream(self._runs):
                self._runs.wait_event(sent)
                write_images(self._inputs.image(bucket)[:batch])
                self._inputs.image(bucket)[batch:].zero_()
                self._inputs.text(bucket).copy_(sent_text)
                for name, buffer in others.items():
                    buffer[:batch].copy_(sent_others[name])
                    buffer[batch:].zero_()
                # After the inputs: captures run the network, and another bucket's text is not valid here.
                captured = self._captured(bucket)
                captured.graph.replay()
                outputs = {name: self._fetch(x) for name, x in captured.outputs.items()}
                return Replay(self._runs.record_event(), outputs, batch, tokens)

    def close(self) -> None:
        """Wait for the batches that were started: they write to memory that may be freed afterwards."""
        self._runs.synchronize()

    def _send_pixels(self, pixels: np.ndarray) -> WriteImages:
        """Copy normalised images, float32 [B, 3, S, S], to the device."""
        host = torch.empty(pixels.shape, dtype=torch.float32, pin_memory=self._pinned)
        np.copyto(host.numpy(), pixels)
        sent = self._send(host)
        return lambda buffer: buffer.copy_(sent)

    def _send_images(self, images: Images) -> WriteImages:
        """Copy images of any size to the device."""
        packed, sizes = pack(images, self._pinned)
        mean, std = self._spec.mean, self._spec.std
        sent = self._send(packed)
        tables = Tables(*map(self._send, make_tables(sizes, self._spec.image_size, mean, std)))
        return lambda buffer: resize_into(buffer, sent, sizes, mean, std, tables)

    def _send_text(self, text: Arrays, bucket: Bucket) -> Tensor:
        """Copy ids and mask, padded to the bucket, to the device."""
        host = torch.empty((2, *bucket), dtype=torch.int64, pin_memory=self._pinned)
        for row, name in zip(host, ("input_ids", "attention_mask"), strict=True):
            fill(row.numpy(), text[name])
        return self._send(host)

    def _send(self, host: Tensor) -> Tensor:
        """Copy to new memory on the device, which is free again once `_runs` has read it."""
        sent = (host.pin_memory() if self._pinned else host).to(self._device, non_blocking=True)
        sent.record_stream(self._runs)
        return sent

    def _fetch(self, output: Tensor) -> Tensor:
        """Copy an output to the host; it is there once the stream has reached this point."""
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=self._pinned)
        return host.copy_(output, non_blocking=True)

    def _captured(self, bucket: Bucket) -> Captured:
        if bucket not in self._graphs:
            captured = self._try_to_capture(bucket)
            if captured is None:  # only here is the error gone, whose traceback holds memory
                torch.cuda.empty_cache()
                captured = self._capture(self._inputs.named(bucket))
            self._graphs[bucket] = captured
        return self._graphs[bucket]

    def _try_to_capture(self, bucket: Bucket) -> Captured | None:
        """Capture a bucket's graph; None where that should be tried once more."""
        try:
            return self._capture(self._inputs.named(bucket))
        except RuntimeError as error:
            # Where memory is short, an allocation in another thread can break a capture: the allocator
            # gives back no memory while one is under way. It does so now.
            logger.warning("the graph of %s is captured again: %s", bucket, error)
            return None

    def _capture(self, inputs: Mapping[str, Tensor]) -> Captured:
        """Warm up, so that what a pass caches for later ones lies outside the pool, and record a pass."""
        graph = torch.cuda.CUDAGraph()
        # By default cuDNN rounds float32 convolutions to TF32. A replay repeats the kernels chosen here.
        with _CAPTURE, full_float32("cuda"):
            for _ in range(_WARM_UPS):
                outputs_of(self._model, inputs)
            self._runs.synchronize()
            # "thread_local": other threads may copy and allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._runs, capture_error_mode="thread_local"
            ):
                outputs = outputs_of(self._model, inputs)
        return Captured(graph, outputs)
