"""Run a network over a data set and join its outputs to the arrays that the metrics read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dgm4.data.annotations import Sample
from dgm4.data.dataset import IGNORED, Batch, PairDataset, collate
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
    return join_outputs(data.samples, batches, outputs)


def join_outputs(
    samples: Sequence[Sample], batches: Sequence[Batch], outputs: Sequence[Mapping[str, np.ndarray]]
) -> LabelledOutputs:
    """Join the outputs of batches of `samples`, in their order; tokens are padded to the longest of all.

    `outputs` holds the arrays of `Output` by name, one mapping a batch.
    """
    width = max(batch.token_labels.shape[1] for batch in batches)
    labels = np.full((len(samples), width), IGNORED)
    logits = np.zeros((len(samples), width, 2), dtype=np.float32)
    row = 0
    for batch, part in zip(batches, outputs, strict=True):
        count, length = batch.token_labels.shape
        labels[row : row + count, :length] = batch.token_labels.numpy()
        logits[row : row + count, :length] = part["logits_tok"]
        row += count
    return LabelledOutputs(
        labels=np.array([sample.fake_cls for sample in samples]),
        logits_real_fake=np.concatenate([part["logits_real_fake"] for part in outputs]),
        logits_multicls=np.concatenate([part["logits_multicls"] for part in outputs]),
        pred_box=np.concatenate([part["box"] for part in outputs]),
        true_box=np.concatenate([batch.box.numpy() for batch in batches]),
        # What a network says of padding depends on the batch.
        logits_tok=np.where(labels[..., None] == IGNORED, 0, logits).astype(np.float32),
        token_labels=labels,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`."""
    moved: dict[str, Any] = {
        k: None if v is None else v.to(device, non_blocking=True) for k, v in batch._asdict().items()
    }
    return Batch(**moved)
