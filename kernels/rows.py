"""What the kernels that work row by row share: how a row lies on the lanes, and eight-bit codes.

A row belongs to as few warps as hold it with 32 values a lane, and it is taken in chunks of one widest load a
lane: 768 columns are three chunks of 256 in half precision and six of 128 in float32, with no lane idle and,
to 1024 columns, no exchange between warps. By sm_90's code a norm of 768 columns in bf16 is 480 instructions
of one warp so; padded to 1024 it is 872 or, a row over four warps, 1032, and three barriers.

Codes: q = round(v / scale), to even, saturating; v ~ q * scale. INT8 ends at -128 and 127, E4M3 at -448 and
448. A scale is given for the tensor, or is each row's own: max |v| / 127 or / 448. A NaN makes its row's own
scale NaN, and its E4M3 code; INT8 under a given scale has no NaN.
Source of E4M3: arXiv:2209.05433; of the rounding by an added power of two: IEEE 754, section 4.3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import InputError
from kernels.jit import ceil_div, check_tensor, jit, power_of_two, tl

WARP = 32
LANE_BYTES = 16  # the widest load of a lane
LANE_VALUES = 32  # values of a row that a lane holds
LEAST_WARPS, MOST_ROWS = 4, 64
MAX_WIDTH = 8 * WARP * LANE_VALUES
TOPS = {torch.float8_e4m3fn: 448, torch.int8: 127}
LEAST_PEAK = 2.0**-64  # a row of zeros takes this for its maximum: scale and inverse stay finite
E4M3_CAPABILITY = (8, 9)  # from which the hardware rounds to E4M3


class RowTiles(NamedTuple):
    """Rows of a program, columns of a chunk, chunks of a row, and warps."""

    rows: int
    chunk: int
    chunks: int
    warps: int


class RowAnswer(NamedTuple):
    """A kernel's answer [..., D], values or codes, and the codes' scale, given or one a row."""

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
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -3) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])


def rounds_e4m3(x: Tensor) -> bool:
    """Whether the GPU of `x` has E4M3 in hardware; elsewhere its codes are made of integers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= E4M3_CAPABILITY


def row_answer(x: Tensor, dtype: torch.dtype | None, scale: Tensor | None) -> RowAnswer:
    """Room for the answer to `x`: codes of `dtype`, or values like those of x where it is None."""
    if dtype is None:
        return RowAnswer(x.new_empty(x.shape), None)
    codes = x.new_empty(x.shape, dtype=torch.uint8).view(dtype)
    return RowAnswer(codes, x.new_empty(x.shape[:-1], dtype=torch.float32) if scale is None else scale)


def row_arguments(x: Tensor, dtype: torch.dtype | None, answer: RowAnswer, given: bool) -> dict[str, Any]:
    """What a kernel that ends in `store_rows` takes for it, by name."""
    tiles = row_tiles(x.shape[-1], x.element_size())
    return {
        "out": answer.out if dtype is None else answer.out.view(torch.uint8),
        "scale": answer.scale,
        "n_rows": x.shape[:-1].numel(),
        "WIDTH": x.shape[-1],
        "ROWS": tiles.rows,
        "CHUNK": tiles.chunk,
        "CHUNKS": tiles.chunks,
        "TOP": 0 if dtype is None else TOPS[dtype],
        "DYNAMIC": dtype is not None and not given,
        "E4M3": dtype == torch.float8_e4m3fn,
        "NATIVE": rounds_e4m3(x),
        "LEAST_PEAK": LEAST_PEAK,
        "num_warps": tiles.warps,
        "num_stages": 1,
    }


def check_codes(dtype: torch.dtype | None, scale: Tensor | None, x: Tensor) -> None:
    """Raise InputError unless `dtype` is None or has codes, and `scale` None or one float32 beside `x`."""
    if dtype is not None and dtype not in TOPS:
        raise InputError(f"dtype: expected one of {', '.join(map(str, TOPS))}, got {dtype}")
    if scale is None:
        return
    if dtype is None:
        raise InputError("scale: expected a dtype of codes beside it, got None")
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise InputError(f"scale: expected one float32, got {scale.dtype} of shape {tuple(scale.shape)}")
    check_tensor("scale", scale, tuple(scale.shape), x, same_dtype=False)


def quantize_ref(values: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [..., D] of `values`, and their scale: the given one, or each row's [...] in float32."""
    if scale is None:
        scale = values.abs().amax(-1).float().clamp(min=LEAST_PEAK) / TOPS[dtype]
    scaled = values / (scale[..., None] if scale.dim() else scale)
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(dtype), scale
    return scaled.clamp(-TOPS[dtype], TOPS[dtype]).to(dtype), scale


@jit
def row_offsets(
    o_row: tl.tensor, n_inner: tl.tensor, batch_stride: tl.tensor, row_stride: tl.tensor
) -> tl.tensor:
    """Where the rows of a [B, N, D] tensor start, as a column."""
    return ((o_row // n_inner).to(tl.int64) * batch_stride + (o_row % n_inner) * row_stride)[:, None]


@jit
def chunk_mask(m_row: tl.tensor, o_col: tl.tensor, WIDTH: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """Which elements of a chunk exist, (rows, columns); one comparison where chunks fill the row."""
    if WIDTH % CHUNK == 0:
        return m_row[:, None] & (o_col >= 0)[None, :]
    return m_row[:, None] & (o_col < WIDTH)[None, :]


@jit
def magnitude(b_values: tl.tensor) -> tl.tensor:
    """The bits of |v|: as integers they order as the values do, with NaN above infinity."""
    return b_values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def scale_of(b_peak: tl.tensor, TOP: tl.constexpr, LEAST_PEAK: tl.constexpr) -> tl.tensor:
    """Scales of rows from the bits of their largest magnitudes."""
    b_least = tl.full(b_peak.shape, LEAST_PEAK, tl.float32).to(tl.int32, bitcast=True)
    return tl.maximum(b_peak, b_least).to(tl.float32, bitcast=True) / TOP


@jit
def encode(b_scaled: tl.tensor, E4M3: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """Codes of float32 values that their scale has divided, as bytes."""
    if not E4M3:
        ROUND: tl.constexpr = 12582912.0  # 1.5 * 2**23, whose last bit is worth 1 and whose low byte is 0
        b_near = tl.minimum(tl.maximum(b_scaled, -128.0), 127.0) + ROUND
        return b_near.to(tl.int32, bitcast=True).to(tl.uint8)
    if NATIVE:
        return b_scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    b_size = tl.minimum(tl.abs(b_scaled), 448.0)
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
    b_rows: tl.tuple,  # chunks (ROWS, CHUNK)
    o_row: tl.tensor,
    m_row: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP: tl.constexpr,
    DYNAMIC: tl.constexpr,
    E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
    LEAST_PEAK: tl.constexpr,
) -> None:
    """Store rows that are zero past their width, as they are or as codes; write a scale of their own."""
    if DYNAMIC:
        b_peak = magnitude(b_rows[0])
        for i in tl.static_range(1, CHUNKS):
            b_peak = tl.maximum(b_peak, magnitude(b_rows[i]))
        b_scale = scale_of(tl.max(b_peak, 1), TOP, LEAST_PEAK)
        tl.store(scale + o_row, b_scale, mask=m_row)
        b_share = 1.0 / b_scale[:, None]
    elif TOP:
        b_share = 1.0 / tl.load(scale)
    p_out = out + o_row.to(tl.int64)[:, None] * WIDTH
    for i in tl.static_range(CHUNKS):
        o_col = i * CHUNK + tl.arange(0, CHUNK)
        m_tile = chunk_mask(m_row, o_col, WIDTH, CHUNK)
        if TOP:
            tl.store(p_out + o_col[None, :], encode(b_rows[i] * b_share, E4M3, NATIVE), mask=m_tile)
        else:
            tl.store(p_out + o_col[None, :], b_rows[i].to(out.dtype.element_ty), mask=m_tile)
