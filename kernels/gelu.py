"""Bias and exact GELU in one pass, with the rounding to eight bits that may follow; QuickGELU too.

    v = x + bias;  out = v (1 + erf(v / sqrt 2)) / 2 = max(v, 0) - |v| Q(|v|),  Q(a) = erfc(a / sqrt 2) / 2
    quick: out = v sigmoid(1.702 v), the activation that CLIP was trained with

Out may be codes of float8_e4m3fn or int8 with a given scale or one a row (see kernels/rows.py). Shapes:
x [..., D], D <= 8192, rows by strides; bias [D] of any float type, or absent. All inside is in float32. NaN
stays NaN. In half precision -inf gives its limit, 0, where the product of torch's form is NaN.

In float32 erf is the library's. In half precision log2 Q is a polynomial of degree 7, fitted here for the
least relative error of Q on [0, 8]: 3.5e-5, a fourteenth of what rounding to float16 costs; past 8, where the
output is below 5e-15, it falls on to zero. The whole kernel is then 17.5 instructions an element by sm_90's
code (37 in float32): 28 million of a warp at the shape below, two thirds of what an H200 issues while the
memory works; with the library's erf it would be twice that.

One read and one write: at 64 x 257 x 3072 in bf16 202 MB, 47 us at 4.3 TB/s; with the bias as a launch of its
own 404 MB. Codes make it 152 MB, and save 152 MB of a rounding pass of its own.
Source: arXiv:1606.08415, both forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from kernels.jit import LOG2E, check_tensor, jit, launchable, operator, tl
from kernels.onnx import ops as onnx_ops
from kernels.rows import (
    RowOutput,
    check_codes,
    check_rows,
    chunk_mask,
    launch_rows,
    quantize_ref,
    row_offsets,
    row_output,
    store_rows,
)

FAR = 16.0  # Q of it is zero in float32
QUICK = 1.702  # sigmoid(1.702 v) is within 0.01 of the normal distribution


def gelu_ref(x: Tensor, bias: Tensor | None = None, quick: bool = False) -> Tensor:
    """Plain form in the dtype of x."""
    x = x if bias is None else x + bias.to(x.dtype)
    return x * torch.sigmoid(QUICK * x) if quick else F.gelu(x)


@jit
def _gelu(b_value: tl.tensor, PRECISE: tl.constexpr, FAR: tl.constexpr) -> tl.tensor:
    """GELU of float32 values; PRECISE for an output in float32. As b_value"""
    if PRECISE:
        ROOT_HALF: tl.constexpr = 0.7071067811865476
        return 0.5 * b_value * (1.0 + tl.erf(b_value * ROOT_HALF))
    # Q in the form max(v, 0) - |v| Q(|v|): 1 + erf(v) of a large negative v would cancel.
    b_size = tl.minimum(tl.abs(b_value), FAR, propagate_nan=tl.PropagateNan.ALL)  # as b_value
    b_tail = -1.2624585e-06 * b_size + 4.8203306e-05  # as b_value
    b_tail = b_tail * b_size - 0.00080724857
    b_tail = b_tail * b_size + 0.0079445816
    b_tail = b_tail * b_size - 0.052635394
    b_tail = b_tail * b_size - 0.45995681
    b_tail = b_tail * b_size - 1.15061
    b_tail = tl.exp2(b_tail * b_size - 1.0000431)
    return tl.maximum(b_value, 0.0, propagate_nan=tl.PropagateNan.ALL) - b_size * b_tail


@jit
def _gelu_kernel(
    x: tl.tensor,  # [B, N, D]
    bias: tl.tensor,  # [D], or None
    out: tl.tensor,  # [B*N, D], dense; bytes for codes
    scale: tl.tensor,  # [1], given, or [B*N], to write; None without codes
    n_rows: tl.tensor,
    n_inner: tl.tensor,  # N
    x_batch: tl.tensor,
    x_row: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CODES: tl.constexpr,  # see store_rows
    OWN: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISE: tl.constexpr,
    FAR: tl.constexpr,
    QUICK: tl.constexpr,  # 1.702 log2(e) for QuickGELU, or None
) -> None:
    """Programs: tiles of ROWS rows."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    p_x = x + row_offsets(o_row, n_inner, x_batch, x_row)
    # All loads before the first store, which would hold them back.
    b_rows: tl.tuple = ()  # CHUNKS times (ROWS, CHUNK)
    for i in tl.static_range(CHUNKS):
        o_col = i * CHUNK + tl.arange(0, CHUNK)
        m_tile = chunk_mask(m_row, o_col, WIDTH, CHUNK)
        b_row = tl.load(p_x + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)  # (ROWS, CHUNK)
        if bias is not None:
            b_row += tl.load(bias + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32)
        if QUICK is None:
            b_rows = b_rows + (_gelu(b_row, PRECISE, FAR),)
        else:
            b_rows = b_rows + (b_row / (1.0 + tl.exp2(-QUICK * b_row)),)
    store_rows(out, scale, b_rows, o_row, m_row, WIDTH, CHUNK, CHUNKS, CODES, OWN, NATIVE)


def launch(
    kernel: Any,
    x: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    quick: bool = False,
) -> RowOutput:
    """Launch `kernel`, `_gelu_kernel` or its wrapping for torch.compile."""
    output = row_output(x, dtype, scale)
    bias = None if bias is None else bias.contiguous()
    precise = x.dtype == torch.float32
    options = {"PRECISE": precise, "FAR": FAR, "QUICK": QUICK * LOG2E if quick else None}
    launch_rows(kernel, x, output, dtype, scale is not None, bias=bias, **options)
    return output


@operator("dgm4::gelu")
def _gelu_op(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype | None, scale: Tensor | None, quick: bool
) -> list[Tensor]:
    output = launch(wrap_triton(_gelu_kernel), x, bias, dtype, scale, quick)
    # An operator may not return one of its inputs: a given scale is left out.
    return [tensor for tensor in output if tensor is not None and tensor is not scale]


def gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    quick: bool = False,
) -> RowOutput:
    """GELU of x [..., D] + bias [D], by erf, or as v sigmoid(1.702 v) where `quick`.

    `dtype`, float8_e4m3fn or int8, asks for codes, whose scale is the given float32 [1], or one a row, [...].
    Raises ValueError for shapes, dtypes or devices that do not go together.
    """
    check_rows(x)
    if bias is not None:
        check_tensor("bias", bias, (x.shape[-1],), x, same_dtype=False)
    check_codes(dtype, scale, x)
    if launchable(x) and not onnx_ops.exporting():
        out, *scales = torch.ops.dgm4.gelu(x, bias, dtype, scale, quick)
        return RowOutput(out, scales[0] if scales else scale)
    out = gelu_ref(x, bias, quick)
    return RowOutput(out, None) if dtype is None else RowOutput(*quantize_ref(out, dtype, scale))
