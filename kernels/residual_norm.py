"""Residual sum and LayerNorm in one pass, with the rounding to eight bits that may follow.

    y = x + residual + shift;  out = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias

over the last axis; residual and shift (the bias of the projection that made x) may be absent, and y is an
output too where the next block needs it: pre-norm networks do, post-norm ones do not. Out may be codes of
float8_e4m3fn or int8 with a given scale or one a row (see kernels/rows.py). Statistics are in float32, of
the unrounded y. A NaN makes its row NaN, as in torch.

Shapes: x and residual [..., D], D <= 8192, rows by strides; weight, bias and shift [D], of any float type.
One read of each input and one write of each output: at 64 x 257 x 768 in bf16 the sum and the norm move
101 MB, 24 us at 4.3 TB/s; a launch each for shift, sum and norm moves 177 MB. Codes instead of bf16 save
13 MB here and the 38 MB of a rounding pass. By sm_90's code a row is 480 instructions of a warp: 9 us.
Source: arXiv:1607.06450.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from kernels.jit import check_tensor, jit, launchable, operator, tl
from kernels.onnx import ops as onnx_ops
from kernels.rows import (
    as_rows,
    check_codes,
    check_rows,
    chunk_mask,
    launch_rows,
    quantize_ref,
    row_offsets,
    row_output,
    store_rows,
)


class Normed(NamedTuple):
    """Outputs of a norm: codes or values [..., D], the sum y [..., D], and the codes' scale."""

    out: Tensor
    total: Tensor | None
    scale: Tensor | None


def residual_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain form: out [..., D] in at least the parameters' dtype, and y in that of x."""
    total = x if shift is None else x + shift.to(x.dtype)
    total = total if residual is None else total + residual
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps), total


# Long because of its signature; the three passes over the columns share the row in registers.
@jit
def _norm_kernel(
    x: tl.tensor,  # [B, N, D]
    residual: tl.tensor,  # [B, N, D], or None
    shift: tl.tensor,  # [D], or None
    weight: tl.tensor,  # [D]
    bias: tl.tensor,  # [D]
    out: tl.tensor,  # [B*N, D], dense; bytes for codes
    total: tl.tensor,  # [B*N, D], dense, or None
    scale: tl.tensor,  # [1], given, or [B*N], to write; None without codes
    n_rows: tl.tensor,
    n_inner: tl.tensor,  # N
    x_batch: tl.tensor,
    x_row: tl.tensor,
    residual_batch: tl.tensor,
    residual_row: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CODES: tl.constexpr,  # see store_rows
    OWN: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Programs: tiles of ROWS rows."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    p_x = x + row_offsets(o_row, n_inner, x_batch, x_row)
    if residual is not None:
        p_residual = residual + row_offsets(o_row, n_inner, residual_batch, residual_row)
    b_rows: tl.tuple = ()  # CHUNKS times (ROWS, CHUNK)
    b_sum = tl.zeros((ROWS, CHUNK), tl.float32)  # (ROWS, CHUNK)
    # All loads before the first store, which would hold them back.
    for i in tl.static_range(CHUNKS):
        o_col = i * CHUNK + tl.arange(0, CHUNK)
        m_tile = chunk_mask(m_row, o_col, WIDTH, CHUNK)
        b_row = tl.load(p_x + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)  # (ROWS, CHUNK)
        if shift is not None:
            b_row += tl.load(shift + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)
        if residual is not None:
            b_row += tl.load(p_residual + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_sum += b_row
        b_rows = b_rows + (b_row,)
    if total is not None:
        store_rows(total, None, b_rows, o_row, m_row, WIDTH, CHUNK, CHUNKS, "", False, False)
    b_mean = tl.sum(b_sum, 1)[:, None] / WIDTH  # (ROWS, 1)
    # A second pass, over registers: the squares' mean less the mean's square would cancel far from zero.
    b_squares = tl.zeros((ROWS, CHUNK), tl.float32)  # (ROWS, CHUNK)
    for i in tl.static_range(CHUNKS):
        b_centred = b_rows[i] - b_mean  # (ROWS, CHUNK)
        if WIDTH % CHUNK:  # past the width stand zeros, which are -mean once centred
            b_centred = tl.where((i * CHUNK + tl.arange(0, CHUNK) < WIDTH)[None, :], b_centred, 0.0)
        b_squares += b_centred * b_centred
    b_inverse = tl.rsqrt(tl.sum(b_squares, 1)[:, None] / WIDTH + eps)  # (ROWS, 1)
    b_normed: tl.tuple = ()  # CHUNKS times (ROWS, CHUNK)
    for i in tl.static_range(CHUNKS):
        o_col = i * CHUNK + tl.arange(0, CHUNK)
        m_tile = chunk_mask(m_row, o_col, WIDTH, CHUNK)
        # Loaded masked as the rows are, (ROWS, CHUNK): past the width the codes' maximum must meet zeros.
        b_weight = tl.load(weight + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_bias = tl.load(bias + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_normed = b_normed + ((b_rows[i] - b_mean) * b_inverse * b_weight + b_bias,)
    store_rows(out, scale, b_normed, o_row, m_row, WIDTH, CHUNK, CHUNKS, CODES, OWN, NATIVE)


def launch(
    kernel: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    summed: bool = False,
) -> Normed:
    """Launch `kernel`, `_norm_kernel` or its wrapping for torch.compile."""
    output = row_output(x, dtype, scale)
    total = x.new_empty(x.shape) if summed else None
    residual = None if residual is None else as_rows(residual)
    launch_rows(
        kernel,
        x,
        output,
        dtype,
        scale is not None,
        residual=residual,
        shift=None if shift is None else shift.contiguous(),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        total=total,
        residual_batch=0 if residual is None else residual.stride(0),
        residual_row=0 if residual is None else residual.stride(1),
        eps=eps,
    )
    return Normed(output.out, total, output.scale)


@operator("dgm4::residual_norm")
def _norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    dtype: torch.dtype | None,
    scale: Tensor | None,
    summed: bool,
) -> list[Tensor]:
    normed = launch(wrap_triton(_norm_kernel), x, residual, weight, bias, eps, shift, dtype, scale, summed)
    # An operator may not return one of its inputs: a given scale is left out.
    return [x for x in normed if x is not None and x is not scale]


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    summed: bool = False,
) -> Normed:
    """Add x, residual [..., D] and shift [D], and norm the sum with weight and bias [D].

    `summed` asks for the sum, in the type of x. `dtype`, float8_e4m3fn or int8, asks for codes, whose scale
    is the given float32 [1], or one a row, [...]. Raises ValueError for shapes, dtypes or devices,
    TypeError for the type of the residual, that do not go together.
    """
    _check(x, residual, {"weight": weight, "bias": bias, "shift": shift})
    check_codes(dtype, scale, x)
    if launchable(x) and not onnx_ops.exporting():
        out, *others = torch.ops.dgm4.residual_norm(
            x, residual, weight, bias, eps, shift, dtype, scale, summed
        )
        total = others.pop(0) if summed else None
        return Normed(out, total, others.pop() if others else scale)
    out, total = residual_norm_ref(x, residual, weight, bias, eps, shift)
    total = total if summed else None
    if dtype is None:
        return Normed(out.to(x.dtype), total, None)
    codes, scale = quantize_ref(out, dtype, scale)
    return Normed(codes, total, scale)


def _check(x: Tensor, residual: Tensor | None, vectors: dict[str, Tensor | None]) -> None:
    check_rows(x)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), x)
    for name, tensor in vectors.items():
        if tensor is not None:
            check_tensor(name, tensor, (x.shape[-1],), x, same_dtype=False)
