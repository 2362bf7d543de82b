"""The precision a network answers in: fp32, fp16 or bf16 with float32 islands, FP8 for the Linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from engine.network.blocks import LatentPool, Norm
from engine.network.branch import CalsBranch
from engine.network.linear import E4M3, Fp8Linear, takes_fp8
from engine.network.model import InferenceModel
from kernels.rows import LEAST_PEAK, TOPS

# fp8: what is not in eight bits.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def set_precision(
    model: InferenceModel, precision: str, scales: Mapping[str, float] | None = None
) -> InferenceModel:
    """Bring a float32 network to "fp32", "fp16", "bf16" or "fp8", in place; what it was made of stays.

    `scales` are those of activations, by the Linear that reads them (see `activation_scales`); one that has
    none there rounds each row by its own. Raises KeyError for an unknown precision.
    """
    dtype, given = DTYPES[precision], scales or {}
    if precision == "fp8":
        for name, layer in list(fp8_layers(model)):
            model.set_submodule(name, Fp8Linear(layer, dtype, given.get(name)))
    return to_precision(model, dtype)


def to_precision(model: InferenceModel, dtype: torch.dtype) -> InferenceModel:
    """Cast everything but the float32 islands to `dtype`, in place; what it was made of stays."""
    islands = {id(p) for p in _islands(model)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in islands:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    return model


def _islands(model: InferenceModel) -> Iterator[nn.Parameter]:
    """Parameters that stay float32: norms, the box head, the pooled scores, CALS's patch reductions."""
    for module in model.modules():
        if isinstance(module, Norm):
            yield from module.parameters()
        if isinstance(module, LatentPool):
            yield module.query
    yield from model.branch.bbox_head.parameters()
    if isinstance(model.branch, CalsBranch):
        yield from model.branch.faces.parameters()


def fp8_layers(model: InferenceModel) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers that fp8 means, by name: all over tokens, whose sides suit eight bits.

    The heads are not: they read one row a pair, or are the last word on every token.
    """
    heads = {id(layer) for head in _heads(model) for layer in head.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in heads and takes_fp8(module):
            yield name, module


def _heads(model: InferenceModel) -> Iterator[nn.Module]:
    yield model.text.classifier
    for module in model.branch.children():
        if isinstance(module, nn.Sequential | LatentPool) or module is getattr(model.branch, "faces", None):
            yield module


@torch.inference_mode()
def activation_scales(model: InferenceModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Scales of what every layer of `fp8_layers` reads: the largest magnitude over `batches`, at code 448.

    `model` is in float32; a batch holds its inputs by name.
    """
    peaks: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, read: tuple[Tensor, ...]) -> None:
            peaks[name] = max(peaks.get(name, LEAST_PEAK), float(read[0].abs().max()))

        return record

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in fp8_layers(model)]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: peak / TOPS[E4M3] for name, peak in peaks.items()}
