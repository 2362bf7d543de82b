"""Weights as they ship: what inference reads of a checkpoint, in float16."""

from __future__ import annotations

from pathlib import Path

import torch

from dgm4.checkpoint import load_checkpoint
from dgm4.saving import save_safetensors
from engine.errors import CheckpointError


def release(checkpoint: Path, out: Path, metadata: dict[str, str]) -> int:
    """Write what inference reads of a checkpoint as float16 safetensors; return the bytes written.

    Raises CheckpointError where the checkpoint does not load or a value does not fit float16.
    """
    network = load_checkpoint(checkpoint)
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        state[name] = value.to(torch.float16)
        if not bool(state[name].isfinite().all()):
            raise CheckpointError(f"{checkpoint}: {name} does not fit float16")
    save_safetensors(state, out, metadata)
    return out.stat().st_size
