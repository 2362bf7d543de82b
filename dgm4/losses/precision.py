"""Losses are computed in float32 at least, whatever the network ran in."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """Return half-precision and integer tensors as float32; float32 and float64 pass unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
