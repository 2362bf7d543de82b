"""Run a network over a data set and join its outputs to the arrays that the metrics read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dgm4.data.dataset import Batch, PairDataset
from dgm4.data.labels import join_outputs
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
    boxes = np.concatenate([batch.box.numpy() for batch in batches])
    labels = [batch.token_labels.numpy() for batch in batches]
    return join_outputs(samples, boxes, labels, outputs)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`."""
    moved: dict[str, Any] = {
        k: None if v is None else v.to(device, non_blocking=True) for k, v in batch._asdict().items()
    }
    return Batch(**moved)
