"""Annotated pairs for the calibration of static INT8."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dgm4.data.annotations import read_split
from dgm4.data.dataset import PairDataset, collate
from engine.errors import InputError
from engine.text import CaptionTokenizer
from export.onnx import INPUTS

log = logging.getLogger(__name__)

# What counts of an activation's values: their largest magnitude, a percentile, or the cut with the least
# divergence. On tiny networks, drawn and trained, the others were nowhere nearer to float32 by more than a
# tenth on unseen pairs, often further, and slower.
METHODS = ("minmax", "percentile", "entropy")
SPLIT, SEED = "train", 1
BATCH = 8  # pairs a run; the methods with histograms hold every product's inputs and outputs of one batch


class PairReader:
    """The graph's inputs for the drawn pairs, batch after batch, as ONNX Runtime's calibrators ask for them.

    Batches are padded to their longest caption, as they are in serving. `record` says of them what the
    manifest does: their number, their source and the seed.
    """

    def __init__(self, dataset: PairDataset, record: dict[str, Any]):
        self.dataset, self.record = dataset, record
        self._rest = self.batches()

    def __len__(self) -> int:
        return -(-len(self.dataset) // BATCH)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches from `start` to before `stop`; raises InputError where a picture is unusable."""
        for i in range(len(self))[start:stop]:
            last = min((i + 1) * BATCH, len(self.dataset))
            batch = collate([self.dataset[j] for j in range(i * BATCH, last)])
            yield {name: getattr(batch, name).numpy() for name in INPUTS}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with the batches from `start_index` to before `end_index`."""
        self._rest = self.batches(start_index, end_index)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None after the last; raises InputError where a picture is unusable."""
        return next(self._rest, None)


def read_pairs(data: Path, count: int, tokenizer: CaptionTokenizer, image_size: int) -> PairReader:
    """Draw `count` pairs of the folder's training split, the same at each call, in the order of its file.

    Takes all, with a warning, where there are fewer. Raises InputError where the folder cannot be read or
    has no usable pair.
    """
    samples = read_split(data, SPLIT).samples
    if not samples:
        raise InputError(f"{data}: expected annotated pairs in the split {SPLIT} to calibrate on, got none")
    if len(samples) < count:
        log.warning("%s: has %d usable pairs to calibrate on, not %d", data, len(samples), count)
        count = len(samples)
    chosen = np.random.default_rng(SEED).choice(len(samples), count, replace=False)
    record = {"pairs": count, "source": f"{data.resolve().name}, split {SPLIT}", "seed": SEED}
    return PairReader(PairDataset([samples[i] for i in np.sort(chosen)], tokenizer, image_size), record)
