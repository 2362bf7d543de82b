"""Shared by the kernels that work row by row: how a row lies on the lanes, and eight-bit codes.

A row belongs to as few warps as hold it with 32 values a lane, and it is taken in chunks of one widest load a
lane: 768 columns are three chunks of 256 in half precision and six of 128 in float32, with no lane idle and,
to 1024 columns, no exchange between warps. By sm_90's code a norm of 768 columns in bf16 is 480 instructions
of one warp so; padded to 1024 it is 872 or, a row over four warps, 1032, and three barriers.

Codes: q = round(v / scale), to even, saturating; v ~ q * scale. INT8 ends at -128 and 127, E4M3 at -448 and
448. A scale is given for the tensor, or is each row's own: max |v| / 127 or / 448. A NaN makes its row's own
scale NaN, and its E4M3 code. INT8 has no NaN: under a given scale it becomes -128, and the caller has to look
for it elsewhere.
Source of E4M3: arXiv:2209.05433; of the rounding by an added power of two: IEEE 754, section 4.3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.jit import (
    LARGEST_OFFSET,
    ceil_div,
    check_tensor,
    dense_columns,
    jit,
    launch_kernel,
    power_of_two,
    tl,
)

WARP = 32
LANE_BYTES = 16  # the widest load of a lane
LANE_VALUES = 32  # values of a row that a lane holds
LEAST_WARPS, MOST_ROWS = 4, 64
MAX_WIDTH = 8 * WARP * LANE_VALUES
TOPS = {torch.float8_e4m3fn: 448, torch.int8: 127}
CODES = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}  # how the kernels name them
LEAST_PEAK = 2.0**-64  # a row of zeros takes this for its maximum: scale and inverse stay finite
E4M3_CAPABILITY = (8, 9)  # from which the hardware rounds to E4M3


class RowTiles(NamedTuple):
    """Rows of a program, columns of a chunk, chunks of a row, and warps."""

    rows: int
    chunk: int
    chunks: int
    warps: int


class RowOutput(NamedTuple):
    """A kernel's output [..., D], values or codes, and the codes' scale, given or one a row."""

    out: Tensor
    scale: Tensor | None


def row_tiles(width: int, itemsize: int) -> RowTiles:
    """Place rows of `width` values of `itemsize` bytes. Chosen on paper for sm_90; no GPU has tuned it."""
    across = power_of_two(ceil_div(width, WARP * LANE_VALUES))
    load = across * WARP * LANE_BYTES // itemsize
    chunk, warps = min(power_of_two(width), load), max(across, LEAST_WARPS)
    rows = min(warps // across * (load // chunk), MOST_ROWS)
    return RowTiles(rows, chunk, ceil_div(width, chunk), warps)


def as_rows(x: Tensor) -> Tensor:
    """[..., D] -> [B, N, D] with a dense last axis; a view where the strides allow it."""
    x = dense_columns(x)
    return x.flatten(0, -3) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])


def rounds_e4m3(x: Tensor) -> bool:
    """Whether the GPU of `x` has E4M3 in hardware; elsewhere its codes are made of integers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= E4M3_CAPABILITY


def row_output(x: Tensor, dtype: torch.dtype | None, scale: Tensor | None) -> RowOutput:
    """Room for the output of `x`: codes of `dtype`, or values like those of x where it is None."""
    if dtype is None:
        return RowOutput(x.new_empty(x.shape), None)
    codes = x.new_empty(x.shape, dtype=torch.uint8).view(dtype)
    return RowOutput(codes, x.new_empty(x.shape[:-1], dtype=torch.float32) if scale is None else scale)


def launch_rows(
    kernel: Any, x: Tensor, output: RowOutput, dtype: torch.dtype | None, given: bool, **arguments: Any
) -> None:
    """Launch a kernel that reads rows of x and ends in `store_rows`, into `output`; nothing for no rows.

    `given` tells a given scale from each row's own. Raises ValueError for more rows than int32 counts.
    """
    n_rows = x.shape[:-1].numel()
    if n_rows == 0:
        return
    tiles = row_tiles(x.shape[-1], x.element_size())
    if n_rows > LARGEST_OFFSET - tiles.rows:
        raise ValueError(f"x: expected less than 2^31 rows, got {n_rows}")
    native = rounds_e4m3(x)
    x = as_rows(x)
    launch_kernel(
        kernel,
        (ceil_div(n_rows, tiles.rows),),
        x,
        x=x,
        out=output.out if dtype is None else output.out.view(torch.uint8),
        scale=output.scale,
        n_rows=n_rows,
        n_inner=x.shape[1],
        x_batch=x.stride(0),
        x_row=x.stride(1),
        WIDTH=x.shape[-1],
        ROWS=tiles.rows,
        CHUNK=tiles.chunk,
        CHUNKS=tiles.chunks,
        CODES="" if dtype is None else CODES[dtype],
        OWN=dtype is not None and not given,
        NATIVE=native,
        num_warps=tiles.warps,
        num_stages=1,
        **arguments,
    )


def check_rows(x: Tensor) -> None:
    """Raise ValueError unless the kernels take rows as wide as `x` has, TypeError unless it is floating."""
    width = x.shape[-1] if x.dim() else 0
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x: expected 1 to {MAX_WIDTH} columns, got the shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating point, got {x.dtype}")


def check_codes(dtype: torch.dtype | None, scale: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `dtype` is None or has codes, and `scale` None or one float32 beside `x`."""
    if dtype is not None and dtype not in TOPS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, TOPS))}, got {dtype}")
    if scale is None:
        return
    if dtype is None:
        raise ValueError("scale: expected a dtype of codes beside it, got None")
    if scale.numel() != 1 or scale.dim() > 1 or scale.dtype != torch.float32:
        raise ValueError(
            f"scale: expected one float32, [] or [1], got {scale.dtype} of shape {tuple(scale.shape)}"
        )
    check_tensor("scale", scale, tuple(scale.shape), x, same_dtype=False)


def quantize_ref(values: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [..., D] of `values`, and their scale: the given one, or each row's [...] in float32."""
    if scale is None:
        scale = values.abs().amax(-1).float().clamp(min=LEAST_PEAK) / TOPS[dtype]
    scaled = values / (scale[..., None] if scale.dim() else scale)
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).nan_to_num(nan=-128).to(dtype), scale
    return scaled.clamp(-TOPS[dtype], TOPS[dtype]).to(dtype), scale


@jit
def row_offsets(
    o_row: tl.tensor,  # (ROWS)
    n_inner: tl.tensor,
    batch_stride: tl.tensor,
    row_stride: tl.tensor,
) -> tl.tensor:
    """Where the rows of a [B, N, D] tensor start. (ROWS, 1)"""
    # Divided in int32, of which a row has a few instructions; int64 before the strides, past 2^31 elements.
    o_batch, o_inner = (o_row // n_inner).to(tl.int64), (o_row % n_inner).to(tl.int64)
    return (o_batch * batch_stride + o_inner * row_stride)[:, None]


@jit
def chunk_mask(m_row: tl.tensor, o_col: tl.tensor, WIDTH: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """Which elements of a chunk exist; one comparison where chunks fill the row. (ROWS, CHUNK)"""
    if WIDTH % CHUNK == 0:
        return m_row[:, None] & (o_col >= 0)[None, :]
    return m_row[:, None] & (o_col < WIDTH)[None, :]


@jit
def magnitude(b_values: tl.tensor) -> tl.tensor:
    """The bits of |v|: as integers they order as the values do, with NaN above infinity. As b_values"""
    return b_values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def scale_of(b_peak: tl.tensor, CODES: tl.constexpr) -> tl.tensor:
    """Scales of rows from the bits of their largest magnitudes. (ROWS)"""
    LEAST: tl.constexpr = 0x1F800000  # the bits of LEAST_PEAK, 2**-64
    return tl.maximum(b_peak, LEAST).to(tl.float32, bitcast=True) / (127 if CODES == "int8" else 448)


@jit
def encode(b_scaled: tl.tensor, CODES: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """Codes of float32 values that their scale has divided, as bytes. As b_scaled"""
    if CODES == "int8":
        ROUND: tl.constexpr = 12582912.0  # 1.5 * 2**23, whose last bit is worth 1 and whose low byte is 0
        b_near = tl.maximum(b_scaled, -128.0)  # as b_scaled; -128 for NaN, which int8 has not got
        b_near = tl.minimum(b_near, 127.0) + ROUND
        return b_near.to(tl.int32, bitcast=True).to(tl.uint8)
    if NATIVE:
        return b_scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    b_size = tl.minimum(tl.abs(b_scaled), 448.0)  # as b_scaled, as all below; NaN comes back at the end
    b_bits = b_size.to(tl.int32, bitcast=True)
    # Normal codes: 20 of the 23 bits of the fraction rounded away, the bias of 127 made 7.
    b_normal = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 codes are multiples of 2**-9, the worth of the last bit of 2**14 = 0x46800000.
    b_code = tl.where(b_size < 0.015625, (b_size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000, b_normal)
    b_code = tl.where(b_scaled == b_scaled, b_code, 0x7F)
    return (b_code | ((b_scaled.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@jit
def store_rows(
    out: tl.tensor,
    scale: tl.tensor,
    b_rows: tl.tuple,  # CHUNKS times (ROWS, CHUNK)
    o_row: tl.tensor,  # (ROWS)
    m_row: tl.tensor,  # (ROWS)
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CODES: tl.constexpr,  # "" for plain values, "int8" or "e4m3"
    OWN: tl.constexpr,  # whether the scale is each row's own, to be written
    NATIVE: tl.constexpr,  # whether the hardware rounds to E4M3
) -> None:
    """Store rows that are zero past their width, as they are or as codes; write a scale of their own."""
    if OWN:
        b_peak = magnitude(b_rows[0])  # (ROWS, CHUNK)
        for i in tl.static_range(1, CHUNKS):
            b_peak = tl.maximum(b_peak, magnitude(b_rows[i]))
        b_scale = scale_of(tl.max(b_peak, 1), CODES)  # (ROWS)
        tl.store(scale + o_row, b_scale, mask=m_row)
        b_share = 1.0 / b_scale[:, None]  # (ROWS, 1)
    elif CODES != "":
        b_share = 1.0 / tl.load(scale)
    # Dense, and so contiguous from one program to the next; int64 for outputs past 2^31 elements.
    p_out = out + o_row.to(tl.int64)[:, None] * WIDTH
    for i in tl.static_range(CHUNKS):
        o_col = i * CHUNK + tl.arange(0, CHUNK)
        m_tile = chunk_mask(m_row, o_col, WIDTH, CHUNK)
        if CODES != "":
            tl.store(p_out + o_col[None, :], encode(b_rows[i] * b_share, CODES, NATIVE), mask=m_tile)
        else:
            tl.store(p_out + o_col[None, :], b_rows[i].to(out.dtype.element_ty), mask=m_tile)
