"""What of an activation's values its eight-bit codes cover: scales from calibration pairs.

The largest magnitude, the `PERCENTILE` of all magnitudes, or the cut after which 128 levels of int8 diverge
least from the distribution (Kullback-Leibler; Migacz, "8-bit Inference with TensorRT", GTC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kernels.rows import LEAST_PEAK, TOPS

METHODS = ("minmax", "percentile", "entropy")
BINS, PERCENTILE = 2048, 99.999
_LEVELS = 128  # int8 codes of one sign
_STEP = 8  # bins between the cuts that are tried
_FLOOR = 1e-7  # of a probability, so that an empty level is no infinite divergence


class Histogram:
    """Counts of magnitudes in `BINS` equal bins of [0, top]; `top` doubles as larger ones come."""

    def __init__(self) -> None:
        self.peak = LEAST_PEAK
        self.top = 0.0
        self.counts = np.zeros(BINS)

    def add(self, values: Tensor) -> None:
        """Count the magnitudes of finite `values`, of any shape."""
        sizes = values.detach().float().abs()
        largest = max(float(sizes.max()), LEAST_PEAK)
        self.peak, self.top = max(self.peak, largest), self.top or largest
        while self.top < largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.top *= 2
        self.counts += torch.histc(sizes, BINS, 0, self.top).cpu().numpy()

    def range(self, method: str) -> float:
        """The magnitude that gets the largest code, by one of `METHODS`."""
        if method == "minmax":
            return self.peak
        cut = self._percentile() if method == "percentile" else self._least_divergence()
        return min(self.peak, cut * self.top / BINS)

    def _percentile(self) -> int:
        whole = np.cumsum(self.counts)
        return int(np.searchsorted(whole, whole[-1] * PERCENTILE / 100)) + 1

    def _least_divergence(self) -> int:
        cuts = range(_LEVELS, BINS + 1, _STEP)
        return min(cuts, key=lambda cut: _divergence(self.counts, cut))


def _divergence(counts: np.ndarray, cut: int) -> float:
    """KL divergence of `counts`, what lies past `cut` moved onto it, from its form in 128 levels."""
    kept = counts[:cut]
    clipped = kept.copy()
    clipped[-1] += counts[cut:].sum()
    level = np.arange(cut) * _LEVELS // cut
    filled = np.bincount(level, kept > 0, _LEVELS)
    spread = (np.bincount(level, kept, _LEVELS) / np.maximum(filled, 1))[level] * (kept > 0)
    p, q = (x / max(x.sum(), 1) + _FLOOR for x in (clipped, spread))
    return float(np.sum(p * np.log(p / q)))


Seen = TypeVar("Seen", bound=Histogram)


def observe(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    batches: Iterable[Mapping[str, Tensor]],
    make: Callable[[], Seen],
) -> dict[str, Seen]:
    """What each of `layers`, by name, reads while `model` answers `batches`, kept by what `make` makes.

    A batch holds inputs by name.
    """
    found: dict[str, Seen] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        found[name] = make()
        return lambda _, read: found[name].add(read[0])

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers]
    try:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def read_histograms(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module]], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Histogram]:
    """Magnitudes of what each of `layers` reads; see `observe`."""
    return observe(model, layers, batches, Histogram)


def scales_of(
    histograms: Mapping[str, Histogram], codes: torch.dtype, method: str = METHODS[0]
) -> dict[str, float]:
    """Scales of activations: what `method` makes of their values, at the largest of `codes`."""
    return {name: histogram.range(method) / TOPS[codes] for name, histogram in histograms.items()}
