"""Static precisions: scales, and shifts of channels, from what rounded layers read on calibration pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.manifest import Smoothing
from engine.network.linear import E4M3
from engine.network.model import InferenceModel
from engine.network.rescale import rescale
from export.graph.parity import Arrays, relative_errors, torch_answers
from export.graph.rewrite import sharing
from export.quantization.qdq import lower, lowered_layers
from export.quantization.ranges import Histogram, observe, scales_of
from export.quantization.smoothquant import Channels, Shifts, Smooth, choose_shifts, readers_of, shifted_peak
from kernels.rows import TOPS

CODES = {"int8": torch.int8, "fp8": E4M3}
TRIED = 4  # batches of calibration pairs on which the network is tried with and without shifts

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Calibrated:
    """Scales of activations by layer, the shifts that they are for, and what those did if they were tried."""

    scales: dict[str, float]
    shifts: Shifts
    smoothing: Smoothing | None = None

    def record(self) -> dict[str, Any]:
        """What the manifest says beside the pairs."""
        return {} if self.smoothing is None else {"smoothing": asdict(self.smoothing)}


def calibrate(
    model: InferenceModel, precision: str, method: str, smooth: Smooth, batches: Batches
) -> Calibrated:
    """Scales for `precision` by `method` from all `batches` of inputs by name; the model stays as it is.

    With "auto" there are no shifts where the whole network's error is not less with them.
    """
    layers, codes = lowered_layers(model, precision), CODES[precision]
    if smooth == "off":
        return Calibrated(scales_of(observe(model, layers, batches(), Histogram), codes, method), {})
    found = observe(model, layers, batches(), Channels)
    shifts = choose_shifts(model, found, codes, smooth)
    plain = Calibrated(scales_of(found, codes, method), {})
    shifted = Calibrated(_shifted_scales(model, found, shifts, codes, method, batches), shifts)
    feeds = list(islice(batches(), TRIED))
    before, after = (output_error(model, precision, made, feeds) for made in (plain, shifted))
    kept = shifted if smooth != "auto" or after < before else plain
    smoothing = Smoothing(str(smooth), len(kept.shifts), before, after)
    return Calibrated(kept.scales, kept.shifts, smoothing)


def _shifted_scales(
    model: InferenceModel,
    found: Mapping[str, Channels],
    shifts: Shifts,
    codes: torch.dtype,
    method: str,
    batches: Batches,
) -> dict[str, float]:
    """Scales of the rescaled network: largest magnitudes follow from the channels', the rest is seen anew."""
    shifted = {name: shifts[seam] for name, seam in readers_of(model, shifts).items() if name in found}
    if method == "minmax":
        top = TOPS[codes]
        own = {name: shifted_peak(found[name], shift) / top for name, shift in shifted.items()}
    else:
        own = scales_of(observe_shifted(model, shifts, shifted, batches), codes, method)
    return {**scales_of(found, codes, method), **own}


def observe_shifted(
    model: InferenceModel, shifts: Shifts, names: Iterable[str], batches: Batches
) -> dict[str, Histogram]:
    """What the layers `names` read once the model is rescaled, which itself stays as it is."""
    moved = rescale(sharing(model), shifts)
    layers = [(name, moved.get_submodule(name)) for name in names]
    return observe(moved, layers, batches(), Histogram)


def output_error(
    model: InferenceModel, precision: str, made: Calibrated, feeds: Iterable[Mapping[str, Tensor]]
) -> float:
    """Error of the rounded network's outputs: RMS over float32's, the RMS of that over the outputs.

    The box is left out: one pair's that jumps would be all there is to see.
    """
    feeds = list(feeds)
    lowered = lower(rescale(sharing(model), made.shifts), precision, made.scales)
    answers: list[list[Arrays]] = [torch_answers(x, model.config, feeds=feeds) for x in (model, lowered)]
    errors = [error for name, error in relative_errors(*answers).items() if name != "box"]
    return float(np.sqrt(np.mean(np.square(errors))))
