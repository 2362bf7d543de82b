"""The float32 network of torch that a bundle is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import dgm4
from dgm4.model import Detector
from engine.backends.float32 import full_float32
from engine.bundle import Bundle
from engine.errors import InputError
from engine.files import sha256_of
from engine.layout import WEIGHTS
from engine.manifest import Manifest
from engine.registry.config import NetworkConfig


class TorchNetwork:
    """A trained network of torch as it is, float32 on the CPU."""

    def __init__(self, model: Detector):
        self.model = model.float().eval()

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch, as a backend does."""
        with full_float32("cpu"), torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: value.numpy() for name, value in output._asdict().items() if value is not None}


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_reference(bundle: Bundle, checkpoint: Path | None) -> tuple[TorchNetwork, str, str]:
    """Load the network of the checkpoint if one is given, else of the bundle's own weights.

    Returns it, where it came from, and what to know about it. Raises CheckpointError and BundleError for what
    does not load.
    """
    manifest = bundle.manifest
    config = manifest.model.config
    if checkpoint is not None:
        model = _load_checkpoint(checkpoint, config)
        return TorchNetwork(model), checkpoint.name, _origin_note(checkpoint, manifest)
    with bundle.held(WEIGHTS):
        model = dgm4.load_checkpoint(bundle.path / WEIGHTS, config.name, config)
    note = ""
    if manifest.precision != "fp32":
        note = "the reference's weights are the bundle's, rounded to float16; --checkpoint for the exact ones"
    return TorchNetwork(model), f"{WEIGHTS} of the bundle", note


def _load_checkpoint(path: Path, config: NetworkConfig) -> Detector:
    checkpoint = dgm4.read_checkpoint(path)
    if checkpoint.layout == "albef":
        raise InputError(
            f"{path}: is an ALBEF initialisation, whose heads are drawn at each load; leave --checkpoint out "
            "to compare with the bundle's own weights"
        )
    return dgm4.load_state(checkpoint, config.name, config)


def _origin_note(checkpoint: Path, manifest: Manifest) -> str:
    """What to know about a reference whose file is not the one that the bundle was made of."""
    if sha256_of(checkpoint) == manifest.weights.sha256:
        return ""
    return f"{checkpoint.name} is not the file that the bundle was made of ({manifest.weights.source})"
