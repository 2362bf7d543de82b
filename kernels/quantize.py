"""Rounding of a tensor's rows to eight bits, where no kernel before it could do so on its way out.

    out = round(x / scale), to even, saturating

in codes of float8_e4m3fn or int8, with a given scale or one a row (see kernels/rows.py). Shapes: x [..., D],
D <= 8192, rows by strides; out is dense.

One read and one write, the row's own scale included: at 64 x 257 x 768 in bf16 38 MB, 9 us at 4.3 TB/s; a
maximum, a division and a conversion one after another move 114 MB.
Source: arXiv:2209.05433.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from engine.errors import InputError
from kernels.jit import ceil_div, jit, launchable, operator, tl
from kernels.onnx import ops as onnx_ops
from kernels.rows import (
    MAX_WIDTH,
    TOPS,
    RowAnswer,
    as_rows,
    check_codes,
    chunk_mask,
    quantize_ref,
    row_answer,
    row_arguments,
    row_offsets,
    store_rows,
)


@jit
def _quantize_kernel(
    x: tl.tensor,  # [B, N, D]
    out: tl.tensor,  # [B*N, D], dense, bytes
    scale: tl.tensor,  # [1], given, or [B*N], to write
    n_rows: tl.tensor,
    n_inner: tl.tensor,  # N
    x_batch: tl.tensor,
    x_row: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP: tl.constexpr,  # the largest code
    DYNAMIC: tl.constexpr,  # whether the scale is each row's own
    E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
    LEAST_PEAK: tl.constexpr,
) -> None:
    """Programs: tiles of ROWS rows."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    p_x = x + row_offsets(o_row, n_inner, x_batch, x_row)
    b_rows: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        o_col = i * CHUNK + tl.arange(0, CHUNK)
        m_tile = chunk_mask(m_row, o_col, WIDTH, CHUNK)
        b_rows = b_rows + (tl.load(p_x + o_col[None, :], mask=m_tile, other=0.0).to(tl.float32),)
    store_rows(
        out,
        scale,
        b_rows,
        o_row,
        m_row,
        WIDTH,
        CHUNK,
        CHUNKS,
        TOP,
        DYNAMIC,
        E4M3,
        NATIVE,
        LEAST_PEAK,
    )


def launch(kernel: Any, x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> RowAnswer:
    """Launch `kernel`, `_quantize_kernel` or its wrapping for torch.compile."""
    answer = row_answer(x, dtype, scale)
    if x.numel() == 0:
        return answer
    arguments = row_arguments(x, dtype, answer, given=scale is not None)
    x = as_rows(x)
    kernel[(ceil_div(arguments["n_rows"], arguments["ROWS"]),)](
        x=x, n_inner=x.shape[1], x_batch=x.stride(0), x_row=x.stride(1), **arguments
    )
    return answer


@operator("dgm4::quantize_rows")
def _quantize_op(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> list[Tensor]:
    found = launch(wrap_triton(_quantize_kernel), x, dtype, scale)
    return [found.out] if found.scale is None or scale is not None else [found.out, found.scale]


def quantize_rows(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> RowAnswer:
    """Codes of x [..., D] in `dtype`, float8_e4m3fn or int8, and their scale.

    The scale is the given float32 [1], or one a row, [...]. Raises InputError for what does not go together.
    """
    width = x.shape[-1] if x.dim() else 0
    if not 1 <= width <= MAX_WIDTH:
        raise InputError(f"x: expected 1 to {MAX_WIDTH} columns, got the shape {tuple(x.shape)}")
    if dtype not in TOPS:
        raise InputError(f"dtype: expected one of {', '.join(map(str, TOPS))}, got {dtype}")
    check_codes(dtype, scale, x)
    if launchable(x) and not onnx_ops.exporting():
        out, *own = torch.ops.dgm4.quantize_rows(x, dtype, scale)
        return RowAnswer(out, own[0] if own else scale)
    return RowAnswer(*quantize_ref(x, dtype, scale))
