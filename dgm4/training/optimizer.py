"""AdamW with the papers' two learning rates, and a cosine with linear warm-up."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dgm4.training.options import TrainOptions


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW in four groups: the visual encoder has its own rate, and vectors and scalars do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vision = "visual_encoder." in name
            groups.setdefault((vision, parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": options.lr_vision if vision else options.lr,
                "weight_decay": options.weight_decay if matrix else 0.0,
            }
            for (vision, matrix), parameters in groups.items()
        ]
    )


def make_schedule(optimizer: torch.optim.Optimizer, options: TrainOptions, updates: int) -> LambdaLR:
    """Rate of each of the run's `updates`: linear warm-up, then half a cosine down to `min_lr`."""
    warmup = min(options.warmup_epochs / options.epochs, 1.0) * updates

    def factor(update: int, base: float) -> float:
        floor = min(options.min_lr / base, 1.0)
        if update < warmup:
            return floor + (1 - floor) * (update + 1) / (warmup + 1)
        progress = min((update - warmup) / max(updates - warmup, 1), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    bases = [group["lr"] for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(factor, base=base) for base in bases])
