"""Casts a network: fp32, fp16 or bf16 with float32 islands, or FP8 in the Linear layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from engine.network.linear import FloatLinear, Fp8Linear, takes_fp8
from engine.network.model import InferenceModel
from engine.network.parts import Part

# fp8: what is not in eight bits.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def set_precision(
    model: InferenceModel,
    precision: str,
    scales: Mapping[str, float] | None = None,
    keep: Collection[str] = (),
) -> InferenceModel:
    """Cast a float32 network to "fp32", "fp16", "bf16" or "fp8", in place; original tensors are unchanged.

    `scales` are those of activations, by the Linear that reads them; without one each row has its own. Linear
    layers named in `keep` stay a step above: bf16 in fp8, float32 in fp16 and bf16.
    Raises KeyError for an unknown precision.
    """
    dtype, given = DTYPES[precision], scales or {}
    if precision == "fp8":
        for name, layer in list(fp8_layers(model)):
            if name not in keep:
                model.set_submodule(name, Fp8Linear(layer, dtype, given.get(name)))
    elif dtype != torch.float32:
        _keep_float(model, keep)
    return to_precision(model, dtype)


def _keep_float(model: InferenceModel, keep: Collection[str]) -> None:
    """Wrap the layers in `keep`, under every name they have."""
    made: dict[nn.Module, FloatLinear] = {}
    for name, layer in list(model.named_modules()):
        if name in keep and isinstance(layer, nn.Linear):
            made[layer] = FloatLinear(layer)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in made:
            model.set_submodule(name, made[layer])


def to_precision(model: InferenceModel, dtype: torch.dtype) -> InferenceModel:
    """Cast everything but the float32 islands to `dtype`, in place; its original tensors are unchanged."""
    islands = {id(p) for p in _islands(model)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in islands:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    return model


def float_layers(model: InferenceModel) -> list[str]:
    """Names of the modules of a cast network that hold float32 parameters: its islands."""
    layers = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    return sorted(layers)


def half_layers(model: InferenceModel) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers that fp16 and bf16 cast, by name: all but those of the float32 islands."""
    islands = {id(p) for p in _islands(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in islands:
            yield name, module


def _islands(model: InferenceModel) -> Iterator[nn.Parameter]:
    """Parameters that stay float32: what the parts say."""
    for module in model.modules():
        if isinstance(module, Part):
            yield from module.float_parameters()


def unquantised(model: InferenceModel, precision: str) -> set[int]:
    """The ids of the Linear layers that the parts keep out of "int8" or "fp8"."""
    parts = (module for module in model.modules() if isinstance(module, Part))
    return {id(layer) for part in parts for layer in part.unquantised(precision)}


def fp8_layers(model: InferenceModel) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers that fp8 quantises, by name: all over tokens whose sides suit eight bits."""
    kept = unquantised(model, "fp8")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in kept and takes_fp8(module):
            yield name, module
