"""Pooling of the patches by a learnt, and hence constant, query.

    n = LayerNorm(tokens);  weights = softmax over patches of n @ query^T;  out_h = sum_p weights[p, h] n[p]

The query of head h already holds the key projection (see engine/network/fold.py), so no key is
ever computed, and the value projection follows on H vectors instead of P.
Shapes: tokens [B, P, D]; weight and bias of the norm [D]; query [H, D]; answer [B, H, D].
Softmax and norm are in float32.
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
    check_tensor,
    dot_precision,
    jit,
    launchable,
    operator,
    power_of_two,
    tl,
)
from kernels.onnx import ops as onnx_ops

NAME = "LatentQueryPool"
EPS = 1e-5


def latent_pool_ref(tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    """Plain form in the inputs' own dtype."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], weight, bias, EPS)
    weights = (normed @ query.T).softmax(1)
    return weights.transpose(1, 2) @ normed


@jit
def _fold(
    query: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    o_head: tl.tensor,
    o_col: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Columns o_col of the norm's scale and shift, of the query times the scale, and the sums it needs."""
    m_col = o_col < WIDTH
    b_scale = tl.load(weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_shift = tl.load(bias + o_col, mask=m_col, other=0.0).to(tl.float32)
    p_query = query + o_head[:, None] * WIDTH + o_col[None, :]
    b_query = tl.load(p_query, mask=(o_head < HEADS)[:, None] & m_col[None, :], other=0.0).to(tl.float32)
    b_offset = tl.sum(b_query * b_shift[None, :], 1)
    b_query *= b_scale[None, :]
    return b_scale, b_shift, b_query, b_offset, tl.sum(b_query, 1)


@jit
def _pool_kernel(
    tokens: tl.tensor,  # [B, P, D], rows token_row apart
    weight: tl.tensor,  # [D]
    bias: tl.tensor,  # [D]
    query: tl.tensor,  # [H, D], dense
    out: tl.tensor,  # [B, H, D], dense
    n_tokens: tl.tensor,
    token_batch: tl.tensor,
    token_row: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # D <= MAIN + REST; both are powers of two, REST may be 0
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,  # H, up to a power of two
    BLOCK_P: tl.constexpr,
    EPS: tl.constexpr,
    LOG2E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Programs: pairs. The norm's affine part moves into the query and behind the sum."""
    i_batch = tl.program_id(0).to(tl.int64)
    tokens += i_batch * token_batch
    o_head = tl.arange(0, BLOCK_H)
    o_main, o_rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1)
    b_scale, b_shift, b_query, b_offset, b_total = _fold(query, weight, bias, o_head, o_main, HEADS, WIDTH)
    b_query = b_query.to(tokens.dtype.element_ty)
    b_out = tl.zeros((BLOCK_H, MAIN), tl.float32)
    if REST:
        b_scale_rest, b_shift_rest, b_query_rest, b_offset_rest, b_total_rest = _fold(
            query, weight, bias, o_head, o_rest, HEADS, WIDTH
        )
        b_query_rest = b_query_rest.to(tokens.dtype.element_ty)
        b_offset += b_offset_rest
        b_total += b_total_rest
        b_out_rest = tl.zeros((BLOCK_H, REST), tl.float32)
    b_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_H,), tl.float32)
    b_mean_sum = tl.zeros((BLOCK_H,), tl.float32)
    for i_token in range(0, n_tokens, BLOCK_P):
        o_token = i_token + tl.arange(0, BLOCK_P)
        m_token = o_token < n_tokens
        p_token = tokens + o_token[:, None] * token_row
        b_token = tl.load(
            p_token + o_main[None, :], mask=m_token[:, None] & (o_main < WIDTH)[None, :], other=0.0
        )
        b_scores = tl.dot(b_query, tl.trans(b_token), input_precision=PRECISION)  # (BLOCK_H, BLOCK_P)
        b_mean = tl.sum(b_token.to(tl.float32), 1)
        if REST:
            m_rest = m_token[:, None] & (o_rest < WIDTH)[None, :]
            b_token_rest = tl.load(p_token + o_rest[None, :], mask=m_rest, other=0.0)
            b_scores = tl.dot(b_query_rest, tl.trans(b_token_rest), b_scores, input_precision=PRECISION)
            b_mean += tl.sum(b_token_rest.to(tl.float32), 1)
        b_mean /= WIDTH
        b_centred = tl.where((o_main < WIDTH)[None, :], b_token.to(tl.float32) - b_mean[:, None], 0.0)
        b_variance = tl.sum(b_centred * b_centred, 1)
        if REST:
            b_centred = tl.where(
                (o_rest < WIDTH)[None, :], b_token_rest.to(tl.float32) - b_mean[:, None], 0.0
            )
            b_variance += tl.sum(b_centred * b_centred, 1)
        b_inverse = tl.rsqrt(b_variance / WIDTH + EPS)
        b_scores = (b_scores - b_total[:, None] * b_mean[None, :]) * b_inverse[None, :] + b_offset[:, None]
        b_scores = tl.where(m_token[None, :], b_scores * LOG2E, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2(b_scores - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_max = b_new
        b_sum = b_sum * b_shrink + tl.sum(b_weights, 1)
        b_weights *= b_inverse[None, :]
        b_mean_sum = b_mean_sum * b_shrink + tl.sum(b_weights * b_mean[None, :], 1)
        b_weights = b_weights.to(tokens.dtype.element_ty)
        b_out = tl.dot(b_weights, b_token, b_out * b_shrink[:, None], input_precision=PRECISION)
        if REST:
            b_out_rest = tl.dot(
                b_weights, b_token_rest, b_out_rest * b_shrink[:, None], input_precision=PRECISION
            )
    out += i_batch * HEADS * WIDTH
    p_out = out + o_head[:, None] * WIDTH
    b_out = (b_out - b_mean_sum[:, None]) / b_sum[:, None] * b_scale[None, :] + b_shift[None, :]
    m_out = (o_head < HEADS)[:, None] & (o_main < WIDTH)[None, :]
    tl.store(p_out + o_main[None, :], b_out.to(out.dtype.element_ty), mask=m_out)
    if REST:
        b_out = (b_out_rest - b_mean_sum[:, None]) / b_sum[:, None] * b_scale_rest[None, :] + b_shift_rest[
            None, :
        ]
        m_out = (o_head < HEADS)[:, None] & (o_rest < WIDTH)[None, :]
        tl.store(p_out + o_rest[None, :], b_out.to(out.dtype.element_ty), mask=m_out)


def launch(kernel: Any, tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    """Launch `kernel`, `_pool_kernel` or its wrapping for torch.compile."""
    batch, n_tokens, width = tokens.shape
    heads = query.shape[0]
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    out = tokens.new_empty(batch, heads, width)
    if out.numel() == 0:
        return out
    main = max(power_of_two(width + 1) // 2, SMALLEST_DOT)
    kernel[(batch,)](
        tokens=tokens,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        query=query.contiguous(),
        out=out,
        n_tokens=n_tokens,
        token_batch=tokens.stride(0),
        token_row=tokens.stride(1),
        HEADS=heads,
        WIDTH=width,
        MAIN=main,
        REST=power_of_two(width - main, SMALLEST_DOT) if width > main else 0,
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
def _pool_op(tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    return launch(wrap_triton(_pool_kernel), tokens, weight, bias, query)


def latent_pool(tokens: Tensor, weight: Tensor, bias: Tensor, query: Tensor) -> Tensor:
    """Pool tokens [B, P, D] to one vector a head, [B, H, D].

    Raises InputError for shapes or devices that do not go together.
    """
    if onnx_ops.exporting():
        shape = (tokens.shape[0], *query.shape)
        return onnx_ops.emit(NAME, (tokens, weight, bias, query), [shape], [tokens.dtype], {})[0]
    width = tokens.shape[-1]
    check_tensor("weight", weight, (width,), tokens, same_dtype=False)
    check_tensor("bias", bias, (width,), weight)
    check_tensor("query", query, (len(query), width), weight)
    if launchable(tokens):
        return torch.ops.dgm4.latent_pool(tokens, weight, bias, query)
    return latent_pool_ref(*(x.to(weight.dtype) for x in (tokens, weight, bias, query))).to(tokens.dtype)
