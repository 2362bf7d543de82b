"""Annotated pairs for calibration, and for the errors of layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dgm4.data.annotations import read_split
from dgm4.data.dataset import PairDataset, collate
from engine.inputs.boxes import WHOLE
from engine.inputs.text import CaptionTokenizer
from engine.manifest import INPUTS

log = logging.getLogger(__name__)

SEED = 1
BATCH = 8  # pairs a run


class PairReader:
    """The graph's inputs for the drawn pairs, batch by batch.

    Batches are padded to their longest caption, as in serving. `record` is what the manifest records of them:
    their number, their source and the seed. `box` is the name of the graph's input of boxes, None where it
    has none: the annotated one, or that of the whole image.
    """

    def __init__(self, dataset: PairDataset, record: dict[str, Any], box: str | None = None):
        self.dataset, self.record, self.box = dataset, record, box

    def __len__(self) -> int:
        return -(-len(self.dataset) // BATCH)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches from `start` to before `stop`; raises InputError where an image is unusable."""
        for i in range(len(self))[start:stop]:
            last = min((i + 1) * BATCH, len(self.dataset))
            batch = collate([self.dataset[j] for j in range(i * BATCH, last)])
            inputs = {name: getattr(batch, name).numpy() for name in INPUTS}
            if self.box is not None:
                boxes = batch.box.numpy()
                inputs[self.box] = np.where(boxes.any(1, keepdims=True), boxes, WHOLE)
            yield inputs


def read_pairs(
    data: Path,
    count: int,
    tokenizer: CaptionTokenizer,
    image_size: int,
    split: str = "train",
    box: str | None = None,
) -> PairReader:
    """Draw `count` pairs of a split of the folder, the same at each call, in the order of its file.

    Takes all, with a warning, where there are fewer. Raises InputError where the folder cannot be read or
    has no usable pair.
    """
    samples = read_split(data, split).usable(f"{data}, split {split}")
    if len(samples) < count:
        log.warning("%s: has %d usable pairs to calibrate on, not %d", data, len(samples), count)
        count = len(samples)
    chosen = np.random.default_rng(SEED).choice(len(samples), count, replace=False)
    record = {"pairs": count, "source": f"{data.resolve().name}, split {split}", "seed": SEED}
    dataset = PairDataset([samples[i] for i in np.sort(chosen)], tokenizer, image_size)
    return PairReader(dataset, record, box)
