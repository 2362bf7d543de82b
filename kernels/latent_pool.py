"""Pooling of the patches by a learnt, and hence constant, query.

    n = LayerNorm(tokens);  weights = softmax over patches of n @ query^T;  out_h = sum_p weights[p, h] n[p]

The query of head h already holds the key projection (see engine/network/fold.py), so no key is
ever computed, and the value projection follows on H vectors instead of P.
Shapes: tokens [B, P, D]; weight and bias of the norm [D]; query [H, D]; output [B, H, D]. Padding: mask
[B, P], 1 = valid, 0 = ignored; where all are ignored the output is zeros. Softmax and norm are in float32.
A NaN in a token makes the whole output of its image NaN, as in torch.

The kernel never stores n. With n = (x - mean) / std * weight + bias, the scores are
(x @ (query * weight)^T - mean sum(query * weight)) / std + query @ bias, and the mean goes out of the sum
over patches likewise: both products read the tokens as they lie. What is subtracted is summed from the
rounded factors of the product, so that their rounding cancels however far from zero a token's mean is: at a
mean of 10 deviations that keeps the error of bf16 at 2.8e-3, where sums of the unrounded ones make it 1.7e-2.
In float32 the subtraction there costs 8e-7, twice torch's error. To centre the tokens before the products
would cost nothing in accuracy, but in float32 it spills 500 bytes a thread.

One program an image: at B = 1 a single SM works. Splitting the patches would need a second launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from kernels.jit import (
    LOG2E,
    SMALLEST_DOT,
    check_axes,
    check_tensor,
    column_parts,
    dense_columns,
    dot_precision,
    jit,
    launch_kernel,
    launchable,
    load_tile,
    operator,
    power_of_two,
    tl,
)
from kernels.onnx import ops as onnx_ops

NAME, MASKED = "LatentQueryPool", "MaskedLatentQueryPool"
EPS = 1e-5


def latent_pool_ref(
    tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Plain form in the dtype of the inputs."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], weight, bias, EPS)
    scores = normed @ query.T
    if mask is None:
        weights = scores.softmax(1)
    else:
        valid = mask[..., None] != 0
        weights = scores.masked_fill(~valid, float("-inf")).softmax(1)
        weights = torch.where(valid.any(1, keepdim=True), weights, 0.0)  # NaN without a valid token
    return weights.transpose(1, 2) @ normed


@jit
def _load_vector(start: tl.tensor, o_col: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Load columns o_col of a vector in float32; zeros outside. (columns)"""
    return tl.load(start + o_col, mask=o_col < WIDTH, other=0.0).to(tl.float32)


# Long because of its signature and because the two passes over the columns share the tiles of a step.
@jit
def _pool_kernel(
    tokens: tl.tensor,  # [B, P, D], rows token_row apart
    weight: tl.tensor,  # [D]
    bias: tl.tensor,  # [D]
    query: tl.tensor,  # [H, D], dense
    mask: tl.tensor,  # [B, P] of any integer type, dense, or None
    out: tl.tensor,  # [B, H, D], dense
    n_tokens: tl.tensor,
    token_batch: tl.tensor,
    token_row: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # D <= PART * PARTS
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,  # H, up to a power of two
    BLOCK_P: tl.constexpr,
    EPS: tl.constexpr,
    LOG2E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Programs: batch. The norm's affine part moves into the query and behind the sum."""
    i_batch = tl.program_id(0).to(tl.int64)
    tokens += i_batch * token_batch
    o_part, o_head = tl.arange(0, PART), tl.arange(0, BLOCK_H)
    b_query: tl.tuple = ()  # PARTS times (BLOCK_H, PART)
    b_out: tl.tuple = ()  # PARTS times (BLOCK_H, PART)
    b_offset = tl.zeros((BLOCK_H,), tl.float32)  # (BLOCK_H)
    b_total = tl.zeros((BLOCK_H,), tl.float32)  # (BLOCK_H)
    for i in tl.static_range(PARTS):
        o_col = i * PART + o_part
        b_plain = load_tile(query, o_head, o_col, WIDTH, HEADS, WIDTH).to(tl.float32)  # (BLOCK_H, PART)
        b_offset += tl.sum(b_plain * _load_vector(bias, o_col, WIDTH)[None, :], 1)
        b_scaled = b_plain * _load_vector(weight, o_col, WIDTH)[None, :]  # (BLOCK_H, PART)
        b_scaled = b_scaled.to(tokens.dtype.element_ty)
        # Of the rounded query, which is what the product below multiplies the mean by.
        b_total += tl.sum(b_scaled.to(tl.float32), 1)
        b_query = b_query + (b_scaled,)
        b_out = b_out + (tl.zeros((BLOCK_H, PART), tl.float32),)
    b_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)  # (BLOCK_H)
    b_sum = tl.zeros((BLOCK_H,), tl.float32)  # (BLOCK_H)
    b_mean_sum = tl.zeros((BLOCK_H,), tl.float32)  # (BLOCK_H)
    for i_token in range(0, n_tokens, BLOCK_P):
        o_token = i_token + tl.arange(0, BLOCK_P)
        m_token = o_token < n_tokens
        if mask is not None:
            m_token = tl.load(mask + i_batch * n_tokens + o_token, mask=m_token, other=0) != 0
        b_tokens: tl.tuple = ()  # PARTS times (BLOCK_P, PART)
        b_scores = tl.zeros((BLOCK_H, BLOCK_P), tl.float32)  # (BLOCK_H, BLOCK_P)
        b_mean = tl.zeros((BLOCK_P,), tl.float32)  # (BLOCK_P)
        for i in tl.static_range(PARTS):
            b_token = load_tile(tokens, o_token, i * PART + o_part, token_row, n_tokens, WIDTH)
            b_scores = tl.dot(b_query[i], tl.trans(b_token), b_scores, input_precision=PRECISION)
            b_mean += tl.sum(b_token.to(tl.float32), 1)
            b_tokens = b_tokens + (b_token,)
        b_mean /= WIDTH
        b_variance = tl.zeros((BLOCK_P,), tl.float32)  # (BLOCK_P)
        for i in tl.static_range(PARTS):
            # In two passes: the squares' mean less the mean's square would cancel.
            b_centred = b_tokens[i].to(tl.float32) - b_mean[:, None]  # (BLOCK_P, PART)
            b_centred = tl.where((i * PART + o_part < WIDTH)[None, :], b_centred, 0.0)
            b_variance += tl.sum(b_centred * b_centred, 1)
        b_inverse = tl.rsqrt(b_variance / WIDTH + EPS)  # (BLOCK_P)
        b_scores = (b_scores - b_total[:, None] * b_mean[None, :]) * b_inverse[None, :] + b_offset[:, None]
        b_scores = tl.where(m_token[None, :], b_scores * LOG2E, float("-inf"))
        # Both maxima drop a NaN; b_weights brings it back.
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))  # (BLOCK_H)
        b_pivot = b_new  # (BLOCK_H)
        if mask is not None:  # finite before the first valid token: -inf - (-inf) would be NaN
            b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weights = tl.exp2(b_scores - b_pivot[:, None])  # (BLOCK_H, BLOCK_P)
        b_shrink = tl.exp2(b_max - b_pivot)  # (BLOCK_H)
        b_max = b_new
        b_sum = b_sum * b_shrink + tl.sum(b_weights, 1)
        b_weights = (b_weights * b_inverse[None, :]).to(tokens.dtype.element_ty)
        # Of the rounded weights, for the same reason.
        b_mean_sum = b_mean_sum * b_shrink + tl.sum(b_weights.to(tl.float32) * b_mean[None, :], 1)
        b_mixed: tl.tuple = ()  # PARTS times (BLOCK_H, PART)
        for i in tl.static_range(PARTS):
            b_shrunk = b_out[i] * b_shrink[:, None]  # (BLOCK_H, PART)
            b_mixed = b_mixed + (tl.dot(b_weights, b_tokens[i], b_shrunk, input_precision=PRECISION),)
        b_out = b_mixed
    if mask is not None:
        b_sum = tl.where(b_max == float("-inf"), 1.0, b_sum)
    p_out = out + i_batch * HEADS * WIDTH + o_head[:, None] * WIDTH
    for i in tl.static_range(PARTS):
        o_col = i * PART + o_part
        b_normed = (b_out[i] - b_mean_sum[:, None]) / b_sum[:, None]  # (BLOCK_H, PART)
        b_normed = b_normed * _load_vector(weight, o_col, WIDTH)[None, :]
        b_normed += _load_vector(bias, o_col, WIDTH)[None, :]
        if mask is not None:
            b_normed = tl.where((b_max == float("-inf"))[:, None], 0.0, b_normed)
        m_out = (o_head < HEADS)[:, None] & (o_col < WIDTH)[None, :]
        tl.store(p_out + o_col[None, :], b_normed.to(out.dtype.element_ty), mask=m_out)


def launch(
    kernel: Any, tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Launch `kernel`, `_pool_kernel` or its wrapping for torch.compile."""
    batch, n_tokens, width = tokens.shape
    heads = query.shape[0]
    tokens = dense_columns(tokens)
    out = tokens.new_empty(batch, heads, width)
    if out.numel() == 0 or n_tokens == 0:
        return out.zero_()  # as an empty sum is
    part, count = column_parts(width)
    launch_kernel(
        kernel,
        (batch,),
        tokens,
        tokens=tokens,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        query=query.contiguous(),
        mask=None if mask is None else mask.contiguous(),
        out=out,
        n_tokens=n_tokens,
        token_batch=tokens.stride(0),
        token_row=tokens.stride(1),
        HEADS=heads,
        WIDTH=width,
        PART=part,
        PARTS=count,
        BLOCK_H=power_of_two(heads, SMALLEST_DOT),
        BLOCK_P=SMALLEST_DOT,
        EPS=EPS,
        LOG2E=LOG2E,
        PRECISION=dot_precision(tokens.dtype),
        num_warps=8,
        num_stages=2,
    )
    return out


@operator("dgm4::latent_pool")
def _pool_op(tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    return launch(wrap_triton(_pool_kernel), tokens, weight, bias, query, mask)


def latent_pool(
    tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Pool tokens [B, P, D] to one vector a head, [B, H, D], in the type of the tokens.

    weight and bias are [D], query [H, D], of one type; mask [B, P] of integers, or None. Raises ValueError
    for shapes or devices, TypeError for types, that do not go together.
    """
    if onnx_ops.exporting():
        inputs = (tokens, weight, bias, query) if mask is None else (tokens, weight, bias, query, mask)
        shape = (tokens.shape[0], *query.shape)
        return onnx_ops.emit(NAME if mask is None else MASKED, inputs, [shape], [tokens.dtype], {})[0]
    check_axes("tokens", tokens, "B, P, D")
    check_axes("query", query, "H, D")
    width = tokens.shape[-1]
    check_tensor("weight", weight, (width,), tokens, same_dtype=False)
    check_tensor("bias", bias, (width,), weight)
    check_tensor("query", query, (len(query), width), weight)
    if mask is not None:
        check_tensor("mask", mask, tokens.shape[:2], tokens, same_dtype=False)
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"mask: expected integers, 1 valid and 0 ignored, got {mask.dtype}")
    if launchable(tokens):
        return torch.ops.dgm4.latent_pool(tokens, weight, bias, query, mask)
    wide = weight.dtype
    return latent_pool_ref(tokens.to(wide), weight, bias.to(wide), query.to(wide), mask).to(tokens.dtype)
