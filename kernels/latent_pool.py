"""Pooling of the patches by a learnt, and hence constant, query.

    n = LayerNorm(tokens);  weights = softmax over patches of n @ query^T;  out_h = sum_p weights[p, h] n[p]

The query of head h already holds the key projection (see export/rewrite.py), so no key is ever
computed, and the value projection follows on H vectors instead of P.
Shapes: tokens [B, P, D]; weight and bias of the norm [D]; query [H, D]; answer [B, H, D].
Softmax and norm are in float32.
"""

from __future__ import annotations

import onnx
from torch import Tensor
from torch.nn import functional as F

from kernels import onnx_ops

NAME = "LatentQueryPool"
EPS = 1e-5


def latent_pool_ref(tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    """Plain form in the inputs' own dtype."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], weight, bias, EPS)
    weights = (normed @ query.T).softmax(1)
    return weights.transpose(1, 2) @ normed


def _body() -> onnx.FunctionProto:
    """Write the standard-operator form."""
    return onnx_ops.body(f"""
    {NAME} (tokens, weight, bias, query) => (out)
    {{
        tokens_float = Cast <to = {onnx.TensorProto.FLOAT}> (tokens)
        weight_float = Cast <to = {onnx.TensorProto.FLOAT}> (weight)
        bias_float = Cast <to = {onnx.TensorProto.FLOAT}> (bias)
        query_float = Cast <to = {onnx.TensorProto.FLOAT}> (query)
        normed = LayerNormalization <axis = -1, epsilon = {EPS}> (tokens_float, weight_float, bias_float)
        columns = Transpose <perm = [1, 0]> (query_float)
        scores = MatMul (normed, columns)
        by_head = Transpose <perm = [0, 2, 1]> (scores)
        weights = Softmax <axis = -1> (by_head)
        pooled = MatMul (weights, normed)
        out = CastLike (pooled, tokens)
    }}""")


onnx_ops.register_body(NAME, _body)


def latent_pool(tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    """Pool tokens [B, P, D] to one vector a head, [B, H, D]."""
    if onnx_ops.exporting():
        shape = (tokens.shape[0], *query.shape)
        return onnx_ops.emit(NAME, (tokens, weight, bias, query), [shape], [tokens.dtype], {})[0]
    return latent_pool_ref(*(x.to(weight.dtype) for x in (tokens, weight, bias, query))).to(tokens.dtype)
