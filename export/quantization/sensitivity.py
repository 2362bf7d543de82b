"""Which layer of a network loses the most in a lower precision.

Own error: of a Linear's output in the precision, given the float32 network's input. Accumulated error: of its
output in the network that is in that precision throughout. Both are the RMS of the difference from float32's
output over the RMS of that output, over all calls on all inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.backends.float32 import full_float32
from engine.backends.torch import load_float, read_scales
from engine.bundle import Bundle
from engine.inputs.text import CaptionTokenizer
from engine.network.model import InferenceModel
from export.graph.parity import case_inputs
from export.quantization.pairs import read_pairs
from export.quantization.qdq import lower, lowered_layers

PAIRS = 16  # that errors are measured on
ROWS = 2  # pairs a pass: the outputs of every layer are held at once


@dataclass(frozen=True)
class LayerError:
    """Errors of one layer, as ratios of RMS; `kept` where it is left in a higher precision."""

    name: str
    own: float
    accumulated: float
    kept: bool = False


def bundle_errors(
    bundle: Bundle,
    data: Path | None = None,
    split: str = "test",
    count: int = PAIRS,
    progress: Callable[[int], object] = lambda pairs: None,
) -> list[LayerError]:
    """Errors of a bundle's layers on `count` pairs of the folder `data`, or on drawn inputs without one.

    `progress` hears how many pairs each step took.
    Against float32 by the bundle's own weights; empty for a bundle in fp32. Raises BundleError, and
    InputError for data that cannot be used.
    """
    manifest = bundle.manifest
    reference, network = load_float(bundle), load_float(bundle)
    rounded = [name for name, _ in lowered_layers(reference, manifest.precision)]
    scales = read_scales(bundle, rounded)
    lowered = lower(network, manifest.precision, scales, manifest.kept_layers)
    batches: Iterable[dict[str, Tensor]] = case_inputs(reference.config)
    if data is not None:
        spec = manifest.preprocess
        words = CaptionTokenizer.of(bundle)
        batches = _drawn_pairs(data, count, words, spec.image_size, split)
    return layer_errors(reference, lowered, manifest.precision, batches, manifest.kept_layers, progress)


def _drawn_pairs(
    data: Path, count: int, words: CaptionTokenizer, image_size: int, split: str
) -> Iterator[dict[str, Tensor]]:
    for batch in read_pairs(data, count, words, image_size, split).batches():
        yield {name: torch.from_numpy(x) for name, x in batch.items()}


@dataclass
class _Sums:
    """Sums of squares: of float32's outputs, and of two differences from them."""

    reference: float = 0.0
    own: float = 0.0
    accumulated: float = 0.0

    def error(self, name: str, kept: bool) -> LayerError:
        scale = max(self.reference, math.ulp(0.0))
        return LayerError(name, math.sqrt(self.own / scale), math.sqrt(self.accumulated / scale), kept)


@dataclass
class _Calls:
    """Inputs and outputs of layers in one pass, call by call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


def layer_errors(
    reference: InferenceModel,
    lowered: InferenceModel,
    precision: str,
    batches: Iterable[Mapping[str, Tensor]],
    keep: Iterable[str] = (),
    progress: Callable[[int], object] = lambda pairs: None,
) -> list[LayerError]:
    """Compare `lowered`, made of `reference`'s tensors, with it layer by layer; the largest own error first.

    `batches` hold inputs by name; `progress` as for `bundle_errors`.
    """
    names = [name for name, _ in lowered_layers(reference, precision)]
    sums = {name: _Sums() for name in names}
    with full_float32("cpu"), torch.inference_mode():
        for batch in batches:
            for part in _parts(batch):
                _add(sums, reference, lowered, part)
                progress(len(part["image"]))
    higher = set(keep)
    return sorted((x.error(name, name in higher) for name, x in sums.items()), key=_harm, reverse=True)


def _harm(layer: LayerError) -> float:
    return math.inf if math.isnan(layer.own) else layer.own


def _parts(batch: Mapping[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    for start in range(0, len(batch["image"]), ROWS):
        yield {name: x[start : start + ROWS] for name, x in batch.items()}


def _add(
    sums: Mapping[str, _Sums], reference: InferenceModel, lowered: InferenceModel, batch: Mapping[str, Tensor]
) -> None:
    true, rounded = (_watch(model, sums, batch) for model in (reference, lowered))
    for name, total in sums.items():
        layer = lowered.get_submodule(name)
        for x, want, got in zip(true.inputs[name], true.outputs[name], rounded.outputs[name], strict=True):
            total.reference += _squares(want)
            total.own += _squares(layer(_cast_for(x, layer)).float() - want)
            total.accumulated += _squares(got.float() - want)


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def _cast_for(x: Tensor, layer: nn.Module) -> Tensor:
    """The float32 input in the type that a layer of lower precision takes."""
    dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else getattr(layer, "dtype", x.dtype)
    return x.to(dtype)


def _watch(model: InferenceModel, names: Iterable[str], batch: Mapping[str, Tensor]) -> _Calls:
    """Run a network on a batch and record the inputs and outputs of its layers."""
    calls = _Calls()

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        calls.inputs[name], calls.outputs[name] = [], []

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls.inputs[name].append(inputs[0])
            calls.outputs[name].append(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls
