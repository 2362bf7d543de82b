"""Scales of activations for static int8 and fp8: the largest magnitudes on calibration pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from engine.backends.float32 import full_float32
from engine.errors import NumericalError
from engine.network.linear import E4M3
from kernels.rows import LEAST_PEAK, TOPS

CODES = {"int8": torch.int8, "fp8": E4M3}
METHOD = "minmax"  # as the manifest names it


def calibrate(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    batches: Iterable[Mapping[str, Tensor]],
    codes: torch.dtype,
) -> dict[str, float]:
    """Return the scale of each layer's input: its largest magnitude over the largest of `codes`.

    `layers` are modules of `model` by name; `batches` hold the model's inputs by name; `codes` is int8 or
    E4M3. The model is not changed. Raises NumericalError where a layer reads NaN or infinity.
    """
    peaks: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        peaks[name] = LEAST_PEAK

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peak = float(inputs[0].detach().float().abs().max())
            if not math.isfinite(peak):  # max() would drop a NaN, and the scale would look sound
                raise NumericalError(
                    f"{name}: the float32 network reads {peak} there on a calibration pair; "
                    "check the checkpoint with --precision fp32 first"
                )
            peaks[name] = max(peaks[name], peak)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers]
    try:
        with full_float32("cpu"), torch.inference_mode():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: peak / TOPS[codes] for name, peak in peaks.items()}
