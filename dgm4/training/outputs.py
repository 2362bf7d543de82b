"""Run a network over a data set and join its outputs to the arrays that the metrics read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dgm4.data.annotations import Sample
from dgm4.data.dataset import IGNORED, Batch, PairDataset
from dgm4.metrics import LabelledOutputs
from dgm4.model import Output
from dgm4.training.reading import Unreadable, load, make_loader
from engine.errors import InputError
from engine.progress import progress_bar

_READ = ("logits_real_fake", "logits_multicls", "box", "logits_tok")


def collect(
    predict: Callable[[Batch], Output],
    data: PairDataset,
    batch: int,
    device: torch.device,
    workers: int = 0,
    progress: bool = False,
    unreadable: Unreadable | None = None,
) -> LabelledOutputs:
    """Run `predict` over all of `data` and return outputs and labels, tokens padded to the longest.

    An image that cannot be read is counted by `unreadable` and left out; raises InputError where there are
    too many, or no other.
    """
    unreadable = unreadable or Unreadable("val", len(data))
    batches: list[Batch] = []
    outputs: list[dict[str, np.ndarray]] = []
    with torch.inference_mode(), progress_bar("judge", len(data), "pairs", progress) as bar:
        for part, problems in load(make_loader(data, workers, batch)):
            unreadable.add(problems)
            bar.update(len(problems))
            if part is None:
                continue
            output = predict(to_device(part, device))._asdict()
            outputs.append({name: output[name].float().cpu().numpy() for name in _READ})
            batches.append(part._replace(image=part.image.new_empty(0)))
            bar.update(len(part.indices))
    if not batches:
        raise InputError(f"expected at least one readable image, got none of {len(data)}")
    samples = [data.samples[i] for part in batches for i in part.indices.tolist()]
    return join_outputs(samples, batches, outputs)


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
