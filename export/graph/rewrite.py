"""The network as it is exported: the trained one's tensors in the engine's definition."""

from __future__ import annotations

import copy

from dgm4.model import Detector
from engine.network.model import InferenceModel


def rewrite(model: Detector, stacked: bool = True) -> InferenceModel:
    """Compose the exact rewrites over a trained model, which stays as it is; unchanged weights are shared.

    `stacked` projects the image's keys and values for all fusion layers in one product.
    """
    config = model.config
    return InferenceModel.from_released(model.state_dict(), config, stacked)


def sharing(model: InferenceModel) -> InferenceModel:
    """A copy of the modules over the same tensors."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
