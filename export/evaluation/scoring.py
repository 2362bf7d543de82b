"""Run networks over annotated pairs and keep their raw outputs beside the labels. Needs no torch.

Pairs are prepared in threads while the networks run, two batches ahead, so that a run takes as long as the
networks do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np

from dgm4.data.annotations import Box, Problem, Sample
from dgm4.data.labels import join_outputs, label_tokens, normalize_box
from dgm4.metrics import TOKEN_PADDING, LabelledOutputs
from engine.backends import usable_cores
from engine.errors import InputError, quoted
from engine.inputs.network_input import join_slots
from engine.inputs.options import Decode, ImageOptions
from engine.inputs.preparation import Item, Preparation
from engine.inputs.text import CaptionTokenizer, Tokens
from engine.manifest import Manifest
from engine.progress import progress_bar
from engine.registry import TENSORS, network_of

_MAX_WORKERS = 4
_BATCHES_AHEAD = 2
WAITING = "waiting for images"  # a key of the JSON report


class Network(Protocol):
    """What `score` runs: a backend of the engine, or the reference."""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch: arrays by input name in, arrays by output name out."""
        ...


class _Wordless(InputError):
    """A caption without words, for a network that answers half of its outputs only where there are some."""


class Pair(NamedTuple):
    """A sample as the network reads it: the prepared pair, its true box in [0, 1] and its tokens' labels."""

    sample: Sample
    item: Item
    box: Box | None
    labels: np.ndarray


class Pairs:
    """Annotated samples, prepared for one bundle as its Predictor would prepare them."""

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: CaptionTokenizer,
        manifest: Manifest,
        decode: Decode = "exact",
    ) -> None:
        self.samples = samples
        self._tokenizer = tokenizer
        # Annotated boxes refer to the image as it is stored.
        as_stored = ImageOptions(apply_orientation=False, decode=decode)
        spec, network = manifest.preprocess, network_of(manifest.model.config)
        self._preparation = Preparation(spec, network, tokenizer, as_stored, thumbnail=0, resize=True)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Pair:
        """Prepare one sample; raises InputError, naming its id, where its image, text or box is unusable."""
        sample = self.samples[index]
        name = f"sample {sample.id}"
        picture = self._preparation.picture(name, sample.picture)
        item = self._preparation.caption(name, picture, sample.text)
        if item.absent:
            raise _Wordless(
                f"{name}: expected a caption with words, got {quoted(sample.text)}; this network compares "
                "the image with them, and answers the verdict alone without: leave the sample out"
            )
        # The bundle may read fewer words than annotations name.
        labels = label_tokens(sample, self._tokenizer)[1][: len(item.tokens.ids) - 1]
        return Pair(sample, item, normalize_box(sample, *(picture.size or (0, 0))), labels)

    def feeds(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """Return the network's inputs by name for a batch."""
        images = [pair.item.picture.pixels for pair in pairs]
        return {"image": join_slots(images), **self._preparation.text([pair.item for pair in pairs])}


@dataclass(frozen=True)
class Scored:
    """The readable samples and their tokens, every network's outputs, what failed, and seconds by part."""

    samples: tuple[Sample, ...]
    tokens: tuple[Tokens, ...]
    outputs: dict[str, LabelledOutputs]
    problems: tuple[Problem, ...]
    seconds: dict[str, float]


def score(
    networks: Mapping[str, Network],
    pairs: Pairs,
    batch_size: int,
    on_bad: str = "skip",
    progress: bool = False,
) -> Scored:
    """Run every network over the same batches of `pairs`.

    A pair that cannot be used is left out and listed, or raises InputError with on_bad="raise". Raises
    InputError where no pair is left, and what the networks raise. `progress` shows a bar on stderr.
    """
    reader = _Reader(pairs, on_bad)
    read: list[Pair] = []
    labels: list[np.ndarray] = []
    outputs: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in networks}
    seconds = dict.fromkeys([*networks, WAITING], 0.0)
    with progress_bar("evaluate", len(pairs), "pairs", progress) as bar:
        started = perf_counter()
        for batch in reader.batches(batch_size):
            feeds = pairs.feeds(batch)
            seconds[WAITING] += perf_counter() - started
            for name, network in networks.items():
                started = perf_counter()
                outputs[name].append(_run(network, feeds))
                seconds[name] += perf_counter() - started
            bar.update(len(batch))
            labels.append(_pad_labels(batch, feeds["input_ids"].shape[1] - 1))
            # The image is the bulk of a pair, and nothing after this reads it.
            read += [pair._replace(item=_without_pixels(pair.item)) for pair in batch]
            started = perf_counter()
    if not read:
        first = next((problem.message for problem in reader.problems), "there is none")
        raise InputError(f"expected at least one usable pair, got none of {len(pairs)}, the first: {first}")
    samples, tokens = tuple(pair.sample for pair in read), tuple(pair.item.tokens for pair in read)
    boxes = np.array([pair.box or (0.0,) * 4 for pair in read], dtype=np.float32)
    joined = {name: join_outputs(samples, boxes, labels, parts) for name, parts in outputs.items()}
    return Scored(samples, tokens, joined, tuple(reader.problems), seconds)


def _without_pixels(item: Item) -> Item:
    return item._replace(picture=item.picture._replace(pixels=np.empty(0)))


def _pad_labels(batch: Sequence[Pair], width: int) -> np.ndarray:
    labels = np.full((len(batch), width), TOKEN_PADDING)
    for row, pair in zip(labels, batch, strict=True):
        row[: len(pair.labels)] = pair.labels
    return labels


class _Reader:
    """Reads pairs in order and ahead of their use."""

    def __init__(self, pairs: Pairs, on_bad: str):
        self.pairs, self.on_bad = pairs, on_bad
        self.problems: list[Problem] = []

    def batches(self, size: int) -> Iterator[list[Pair]]:
        """Yield batches of up to `size` pairs; a batch is smaller where pairs of it cannot be read."""
        pool = ThreadPoolExecutor(min(_MAX_WORKERS, usable_cores()), thread_name_prefix="read")
        ahead: deque[list[Future[Pair | Problem]]] = deque()
        try:
            count = len(self.pairs)
            for start in range(0, count, size):
                ahead.append([pool.submit(self._read, i) for i in range(start, min(start + size, count))])
                if len(ahead) > _BATCHES_AHEAD:
                    yield from self._collect(ahead.popleft())
            while ahead:
                yield from self._collect(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, index: int) -> Pair | Problem:
        try:
            return self.pairs.read(index)
        except InputError as error:
            if self.on_bad == "raise":
                raise
            sample = self.pairs.samples[index]
            kind = "caption_without_words" if isinstance(error, _Wordless) else "picture_unreadable"
            return Problem(sample.picture, sample.id, str(error), kind)

    def _collect(self, futures: Sequence[Future[Pair | Problem]]) -> Iterator[list[Pair]]:
        """Yield one batch, or none where nothing of it could be read."""
        results = [future.result() for future in futures]
        self.problems += [x for x in results if isinstance(x, Problem)]
        batch = [x for x in results if isinstance(x, Pair)]
        if batch:
            yield batch


def _run(network: Network, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in network.run(feeds).items() if TENSORS[name].heatmap is None}
