"""A network's answers on a data set, as the arrays that the metrics read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dgm4.data.dataset import IGNORED, Batch, PairDataset, collate
from dgm4.metrics import Answers
from dgm4.model import Output


def collect(
    predict: Callable[[Batch], Output],
    data: PairDataset,
    batch: int,
    device: torch.device,
    workers: int = 0,
) -> Answers:
    """Run `predict` over all of `data` and return answers and labels, tokens padded to the longest."""
    rows: list[tuple[np.ndarray, ...]] = []
    # A generator of its own, since an iterator draws a number: torch's own stream stays where it was.
    loader = DataLoader(data, batch, collate_fn=collate, num_workers=workers, generator=torch.Generator())
    with torch.inference_mode():
        for part in loader:
            output = predict(to_device(part, device))
            kept = (output.logits_real_fake, output.logits_multicls, output.box, output.logits_tok)
            arrays = [value.float().cpu().numpy() for value in kept]
            rows.append((*arrays, part.box.numpy(), part.token_labels.numpy()))
    longest = max(row[3].shape[1] for row in rows)
    columns = list(zip(*rows, strict=True))
    real_fake, classes, boxes, true_boxes = (np.concatenate(columns[i]) for i in (0, 1, 2, 4))
    return Answers(
        labels=np.array([sample.fake_cls for sample in data.samples]),
        logits_real_fake=real_fake,
        logits_multicls=classes,
        pred_box=boxes,
        true_box=true_boxes,
        logits_tok=np.concatenate([_pad(tokens, longest, 0) for tokens in columns[3]]),
        token_labels=np.concatenate([_pad(labels, longest, IGNORED) for labels in columns[5]]),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch."""
    moved: dict[str, Any] = {
        k: None if v is None else v.to(device, non_blocking=True) for k, v in batch._asdict().items()
    }
    return Batch(**moved)


def _pad(array: np.ndarray, longest: int, value: int) -> np.ndarray:
    width = [(0, 0), (0, longest - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, width, constant_values=value)
