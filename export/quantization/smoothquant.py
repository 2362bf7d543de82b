"""SmoothQuant: peaks of single channels moved from activations, which have one scale, to weights by row.

shift_k = log2(max |x_k|^alpha / max |W_k|^(1 - alpha)), less its mean, rounded. `engine.network.rescale`
tells where it goes and why the float network stays what it was. A peak counts as at least `FLOOR` of its
layer's largest, so that a channel silent in calibration is not blown up.
Source: arXiv:2211.10438, equation 4; a layer's alpha by its own error as in arXiv:2306.00978, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.network.model import InferenceModel
from engine.network.rescale import seams
from export.quantization.ranges import Histogram
from kernels.rows import LEAST_PEAK, TOPS, quantize_ref

Smooth = Literal["off", "auto"] | float  # a number is alpha
ALPHAS = (0.25, 0.5, 0.75)  # that "auto" tries at every seam, besides none
FLOOR = 1e-4
ROWS = 8  # of what a layer reads in one call, kept to try the alphas on

Shifts = dict[str, list[int]]


class Channels(Histogram):
    """A histogram that also keeps each channel's largest magnitude, `peaks` [K], and a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: Tensor = torch.zeros(())
        self._rows: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Count values [..., K]."""
        super().add(values)
        rows = values.detach().float().flatten(0, -2)
        self.peaks = torch.maximum(self.peaks, rows.abs().amax(0))
        self._rows.append(rows[:: -(-len(rows) // ROWS)].clone())

    def rows(self) -> Tensor:
        """The rows that were kept, [R, K]."""
        return torch.cat(self._rows)


@dataclass(frozen=True)
class _Reader:
    """What a Linear reads, and its weight [N, K]."""

    read: Channels
    weight: Tensor


def choose_shifts(
    model: InferenceModel, found: Mapping[str, Channels], codes: torch.dtype, smooth: Smooth
) -> Shifts:
    """Shifts for the seams that a layer in `found` reads; `found` has what each rounded layer reads.

    "auto" gives each seam that of `ALPHAS` by which its readers' answers lose least, or leaves it alone.
    """
    chosen: Shifts = {}
    for seam in seams(model) if smooth != "off" else ():
        readers = [_Reader(found[name], _weight(model, name)) for name in seam.consumers if name in found]
        if readers:
            shift = _least_harm(readers, codes) if smooth == "auto" else _shift(readers, float(smooth))
            if shift.any():
                chosen[seam.name] = shift.int().tolist()
    return chosen


def readers_of(model: InferenceModel, shifts: Shifts) -> dict[str, str]:
    """The Linear layers, by name, that read a seam in `shifts`, and which."""
    return {reader: seam.name for seam in seams(model) if seam.name in shifts for reader in seam.consumers}


def shifted_peak(read: Channels, shift: Sequence[int]) -> float:
    """The largest magnitude once the channels are divided by 2**shift, as `Histogram.peak`."""
    return max(float((read.peaks / torch.tensor(shift).exp2()).max()), LEAST_PEAK)


def _weight(model: InferenceModel, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight").detach().float()


def _shift(readers: list[_Reader], alpha: float) -> Tensor:
    """Shifts [K] by the formula, of all readers at once."""
    peaks = torch.stack([r.read.peaks for r in readers]).amax(0)
    columns = torch.stack([r.weight.abs().amax(0) for r in readers]).amax(0)
    x, w = (v.clamp(min=max(float(v.max()) * FLOOR, LEAST_PEAK)).log2() for v in (peaks, columns))
    exact = alpha * x - (1 - alpha) * w
    return (exact - exact.mean()).round()


def _least_harm(readers: list[_Reader], codes: torch.dtype) -> Tensor:
    """The shifts [K] of no or some alpha whose error, summed over the readers, is least."""
    tried = [torch.zeros_like(readers[0].read.peaks), *(_shift(readers, alpha) for alpha in ALPHAS)]
    return min(tried, key=lambda shift: sum(_error(reader, codes, shift.exp2()) for reader in readers))


def _error(reader: _Reader, codes: torch.dtype, factor: Tensor) -> float:
    """Sum of squared errors of a rounded product over the sum of its squared answers."""
    rows, weight = reader.read.rows(), reader.weight
    scale = (reader.read.peaks / factor).amax() / TOPS[codes]
    read, _ = quantize_ref(rows / factor, codes, scale.clamp(min=LEAST_PEAK))
    held, scales = quantize_ref(weight * factor, codes)
    want = rows @ weight.T
    got = (read.float() * scale) @ (held.float() * scales[:, None]).T
    return float((got - want).square().sum() / want.square().sum().clamp(min=LEAST_PEAK))
