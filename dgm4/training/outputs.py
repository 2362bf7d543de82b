"""Run a network over a data set and join its outputs to the arrays that the metrics read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dgm4.data.dataset import Batch, PairDataset, collate
from dgm4.data.labels import join_outputs
from dgm4.metrics import LabelledOutputs
from dgm4.model import Output

_READ = ("logits_real_fake", "logits_multicls", "box", "logits_tok")


def collect(
    predict: Callable[[Batch], Output],
    data: PairDataset,
    batch: int,
    device: torch.device,
    workers: int = 0,
) -> LabelledOutputs:
    """Run `predict` over all of `data` and return outputs and labels, tokens padded to the longest."""
    batches: list[Batch] = []
    outputs: list[dict[str, np.ndarray]] = []
    # A generator of its own, since an iterator draws a number: torch's own stream stays where it was.
    loader = DataLoader(data, batch, collate_fn=collate, num_workers=workers, generator=torch.Generator())
    with torch.inference_mode():
        for part in loader:
            output = predict(to_device(part, device))._asdict()
            outputs.append({name: output[name].float().cpu().numpy() for name in _READ})
            batches.append(part._replace(image=part.image.new_empty(0)))
    boxes = np.concatenate([batch.box.numpy() for batch in batches])
    labels = [batch.token_labels.numpy() for batch in batches]
    return join_outputs(data.samples, boxes, labels, outputs)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`."""
    moved: dict[str, Any] = {
        k: None if v is None else v.to(device, non_blocking=True) for k, v in batch._asdict().items()
    }
    return Batch(**moved)
