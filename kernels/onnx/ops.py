"""How an operator leaves for ONNX: a node of our own domain, with a body of standard operators (bodies.py).

A runtime without our plugins inlines the body; one that has them takes the node. TensorRT reads the
plugin's namespace and version from the node's attributes and ignores the body then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DOMAIN = "dgm4"
VERSION = 1
# 20 is the first opset with Gelu, and the newest whose every operator here is native to ONNX Runtime,
# OpenVINO and TensorRT 10.13. Attention (23) is no gain: TensorRT refuses it in float32.
OPSET = 20
BF16_OPSET = 22  # the first whose Conv takes bfloat16


def exporting() -> bool:
    """Whether torch is tracing for ONNX, when operators leave as nodes of their own."""
    return torch.onnx.is_in_onnx_export()


def emit(
    name: str,
    inputs: Sequence[Tensor],
    shapes: Sequence[Sequence[int | torch.SymInt]],
    dtypes: Sequence[torch.dtype],
    attributes: dict[str, Sequence[int] | float],
) -> Sequence[Tensor]:
    """Leave a node `name` in the traced graph; shapes and dtypes are those of its outputs."""
    plugin: dict[str, str | int] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), "aot": 1}
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, {**attributes, **plugin}, dtypes=dtypes, shapes=shapes, version=VERSION
    )


def emit_linear(
    x: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, weight_scale: Tensor, zeros: Tensor
) -> Tensor:
    """Leave the product of a Linear in eight bits as standard nodes: both factors through Q/DQ.

    x [..., K], its scale [] and zero []; codes [K, N], weight_scale [N] and zeros [N]. The zeros have the
    type of the codes.
    """
    node = torch.onnx.ops.symbolic
    rounded = node("QuantizeLinear", (x, scale, zero), dtype=codes.dtype, shape=x.shape)
    back = node("DequantizeLinear", (rounded, scale, zero), dtype=x.dtype, shape=x.shape)
    stored = (codes, weight_scale, zeros)
    return back @ node("DequantizeLinear", stored, {"axis": 1}, dtype=x.dtype, shape=codes.shape)
