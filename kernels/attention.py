"""Attention of N queries over M keys, with key padding and the head-averaged score map of MGCA.

    scores = query @ key^T * d^-0.5;  out = softmax(scores) @ value;  map = mean over heads of scores

Queries, keys and values are [B, N or M, H*d], heads side by side, as the projections write them; the
answer has the layout the next projection reads. Padding: mask [B, M], 1 = valid, 0 = ignored; a row
whose keys are all ignored yields zeros. The map [B, N, M] is float32 and is taken before the softmax,
of unmasked attention only (the picture has no padding). Softmax is in float32.

Source of the map: ASAP, arXiv:2412.12718, section "Manipulation-Guided Cross Attention".
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import onnx_ops

PLAIN, MASKED, GUIDED = "HeadAttention", "MaskedHeadAttention", "GuidedHeadAttention"
MASKED_SCORE = -10000.0  # exp() of it is zero in float32, and it is representable in float16


def attention_ref(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain form in the inputs' own dtype: the answer [B, N, H*d] and the map [B, N, M]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    guide = scores.mean(1)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.nan_to_num(0.0)  # a row without a valid key
    return (weights @ v).transpose(1, 2).flatten(2), guide


def _body(name: str) -> onnx.FunctionProto:
    """Write the standard-operator form of one of the three variants."""
    mask, guide = name == MASKED, name == GUIDED
    masking = f"""
        keep_flat = Cast <to = {onnx.TensorProto.FLOAT}> (mask)
        heads_axes = Constant <value_ints = [1, 2]> ()
        keep = Unsqueeze (keep_flat, heads_axes)
        one = Constant <value_float = 1.0> ()
        ignored = Sub (one, keep)
        floor = Constant <value_float = {MASKED_SCORE}> ()
        bias = Mul (ignored, floor)
        biased = Add (scores, bias)
        masked_weights = Softmax <axis = -1> (biased)
        weights = Mul (masked_weights, keep)"""
    plain = "\n        weights = Softmax <axis = -1> (scores)"
    averaging = """
        heads_axis = Constant <value_ints = [1]> ()
        guide = ReduceMean <keepdims = 0> (scores, heads_axis)"""
    return onnx_ops.body(f"""
    {name} <heads, scale> (query, key, value{", mask" if mask else ""}) => (out{", guide" if guide else ""})
    {{
        keep_two = Constant <value_ints = [0, 0]> ()
        rest = Constant <value_ints = [-1]> ()
        head_count = Constant <value_ints: ints = @heads> ()
        split = Concat <axis = 0> (keep_two, head_count, rest)
        merge = Concat <axis = 0> (keep_two, rest)
        scale_float = Constant <value_float: float = @scale> ()
        scale_typed = CastLike (scale_float, query)
        query_heads = Reshape (query, split)
        query_rows = Transpose <perm = [0, 2, 1, 3]> (query_heads)
        scaled = Mul (query_rows, scale_typed)
        key_heads = Reshape (key, split)
        key_columns = Transpose <perm = [0, 2, 3, 1]> (key_heads)
        value_heads = Reshape (value, split)
        value_rows = Transpose <perm = [0, 2, 1, 3]> (value_heads)
        products = MatMul (scaled, key_columns)
        scores = Cast <to = {onnx.TensorProto.FLOAT}> (products){masking if mask else plain}{
        averaging if guide else ""
    }
        weights_typed = CastLike (weights, query)
        mixed = MatMul (weights_typed, value_rows)
        mixed_tokens = Transpose <perm = [0, 2, 1, 3]> (mixed)
        out = Reshape (mixed_tokens, merge)
    }}""")


for _name in (PLAIN, MASKED, GUIDED):
    onnx_ops.register_body(_name, lambda name=_name: _body(name))  # type: ignore[misc]


def _emit(name: str, inputs: tuple[Tensor, ...], heads: int) -> list[Tensor]:
    query, key = inputs[:2]
    shapes, dtypes = [query.shape], [query.dtype]
    if name == GUIDED:
        shapes.append(torch.Size((*query.shape[:2], key.shape[1])))
        dtypes.append(torch.float32)
    scale = (query.shape[-1] // heads) ** -0.5
    return list(onnx_ops.emit(name, inputs, shapes, dtypes, {"heads": [heads], "scale": scale}))


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attend; query [B, N, H*d], key and value [B, M, H*d], mask [B, M] or None -> [B, N, H*d]."""
    if onnx_ops.exporting():
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        return _emit(PLAIN if mask is None else MASKED, inputs, heads)[0]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    keep = None if mask is None else mask[:, None, None] != 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)


def guided_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attend and return the head-averaged scaled scores too: [B, N, H*d] and float32 [B, N, M]."""
    if onnx_ops.exporting():
        out, guide = _emit(GUIDED, (query, key, value), heads)
        return out, guide
    out, guide = attention_ref(query, key, value, heads)
    return out, guide.to(torch.promote_types(guide.dtype, torch.float32))
