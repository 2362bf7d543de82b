"""Attention of N queries over M keys, with masks, an additive bias and the head-averaged score map of MGCA.

    scores = query @ key^T * d^-0.5;  out = softmax(scores + bias) @ value;  map = mean over heads of scores

Queries, keys and values are [B, N or M, H*d], heads side by side, as the projections write them; the
output has the layout that the next projection reads. The mask, 1 = valid, 0 = ignored, is of keys [B, M], as
padding is, or of pairs [B, N, M], as neighbours are; a query whose keys are all ignored yields zeros. The
bias [H, N, M] is shared by the batch, as BEiT's relative positions are. The map [B, N, M] is float32 and is
taken before the softmax, of attention without mask and bias only (images have no padding). Softmax is in
float32. A NaN makes the rows that read it NaN, as in torch; keys and values past the last valid one of a mask
of keys are not read.

On a GPU one Triton launch does it, with the softmax online, so that no score leaves the chip:

- Columns of a fused projection are read in place, by strides; only the last axis must be dense.
- A sum over heads of products over d columns is one product over all H*d columns. So the map needs neither
  the softmax nor another head's programs: extra programs of the same launch write one tile of it each.
- Keys past the last valid one of a mask of keys are never read: padded text costs nothing.
- 257 keys are 1 + 256: the first is taken as a vector, which leaves whole blocks for the matrix units, and
  where every block is whole and nothing is masked no score is compared with the end.

Floor, B = 64, 50 x 257, H = 12, d = 64, bf16: query and output 4.9 MB each, keys and values 25.3 MB each, the
map 3.3 MB: 63.6 MB, 15 us at 4.3 TB/s; 2.5 GFLOP, 3.8 with the map: 5 us at 790 TFLOP/s. A block of 64
keys is about 320 instructions of a warp by sm_90's code, eight of them wgmma: in all 6 us of what an H200
issues. At 257 x 257 memory takes 24 us, the exponentials 18 and the instructions, the longest, 31. Never
written are the scores [B, 12, 50, 257], 19.7 MB in bf16 and 39.5 MB in float32, in each of the plain form's
four passes. A bias [12, 257, 257] is 1.6 MB, stays in the second-level cache and adds a third of the code.

Neighbours are a mask of pairs, not gathered keys. B = 64, 256 patches of which each reads 16, 4 heads of 192,
bf16: query, key, value and output are 100.7 MB either way, 23 us; products and exponentials of all 256 keys
take less. From the second-level cache tiles of 64 queries read 201 MB of keys and values, gathered rows 805.

Source of the map: ASAP, arXiv:2412.12718, section "Manipulation-Guided Cross Attention"; online softmax:
arXiv:1805.02867, arXiv:2205.14135.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from kernels.attention_tiles import head_tile
from kernels.jit import (
    LOG2E,
    SMALLEST_DOT,
    Tiles,
    ceil_div,
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
from kernels.onnx.attention import emit
from kernels.onnx.ops import exporting


def attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain form in the dtype of the inputs: the output [B, N, H*d] and the map [B, N, M]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    guide = scores.mean(1)
    if bias is not None:
        scores = scores + bias
    keep = None if mask is None else _keep(mask)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    weights = scores.softmax(-1)
    if keep is not None:  # softmax makes NaN of a row without a valid key; any other NaN stays
        weights = torch.where(keep.any(-1, keepdim=True), weights, 0.0)
    return (weights @ v).transpose(1, 2).flatten(2), guide


def _keep(mask: Tensor) -> Tensor:
    """A mask [B, M] or [B, N, M] as truth values that go with scores: [B, 1, 1 or N, M]."""
    return (mask[:, None, None] if mask.dim() == 2 else mask[:, None]) != 0


# Long because the formatter gives each argument a line, of the signature and of the call of head_tile.
@jit
def _attention_kernel(
    query: tl.tensor,  # [B, N, H*d], rows query_row apart
    key: tl.tensor,  # [B, M, H*d]
    value: tl.tensor,  # [B, M, H*d]
    mask: tl.tensor,  # [B, M] or [B, N, M] of any integer type, dense along M, or None
    bias: tl.tensor,  # [H, N, M], dense along M, or None
    n_queries: tl.tensor,
    n_keys: tl.tensor,
    query_batch: tl.tensor,
    query_row: tl.tensor,
    key_batch: tl.tensor,
    key_row: tl.tensor,
    value_batch: tl.tensor,
    value_row: tl.tensor,
    mask_batch: tl.tensor,
    mask_row: tl.tensor,  # None for a mask [B, M]
    bias_head: tl.tensor,  # None without a bias, as bias_row
    bias_row: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,  # [B, N, H*d], dense
    guide: tl.tensor,  # [B, N, M] float32, dense, or None
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # d <= PART * PARTS
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK: tl.constexpr,  # M, up to a power of two
    BLOCK_K: tl.constexpr,  # columns of a step of the map
    LEAD: tl.constexpr,  # 1 where the first key is taken apart, else 0
    EVEN: tl.constexpr,  # whether every block of keys is whole and valid
    LOG2E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Programs: query tiles x (heads, then the map's key tiles) x batch."""
    i_head, i_batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query += i_batch * query_batch
    key += i_batch * key_batch
    if i_head < HEADS:
        column = i_head * WIDTH
        if mask is not None:
            mask += i_batch * mask_batch
        if bias is not None:
            bias += i_head.to(tl.int64) * bias_head
        head_tile(
            query + column,
            key + column,
            value + i_batch * value_batch + column,
            mask,
            bias,
            out + i_batch * n_queries * HEADS * WIDTH + column,
            o_query,
            n_queries,
            n_keys,
            query_row,
            key_row,
            value_row,
            mask_row,
            bias_row,
            HEADS * WIDTH,
            scale * LOG2E,  # exp2 is one instruction, exp is two
            1.0 / scale,
            WIDTH,
            PART,
            PARTS,
            BLOCK_N,
            BLOCK_MASK,
            LEAD,
            EVEN,
            PRECISION,
        )
    elif guide is not None:
        # The mean over heads of products over d columns is one product over the columns of all heads.
        o_key = (i_head - HEADS) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_map = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # (BLOCK_M, BLOCK_N)
        for i_col in range(0, HEADS * WIDTH, BLOCK_K):
            o_col = i_col + tl.arange(0, BLOCK_K)
            b_query = load_tile(query, o_query, o_col, query_row, n_queries, HEADS * WIDTH)
            b_key = load_tile(key, o_key, o_col, key_row, n_keys, HEADS * WIDTH)  # (BLOCK_N, BLOCK_K)
            b_map = tl.dot(b_query, tl.trans(b_key), b_map, input_precision=PRECISION)
        p_row = guide + i_batch * n_queries * n_keys + o_query.to(tl.int64)[:, None] * n_keys
        m_map = (o_query < n_queries)[:, None] & (o_key < n_keys)[None, :]
        tl.store(p_row + o_key[None, :], b_map * (scale / HEADS), mask=m_map)


def schedules(queries: int, keys: int, width: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Block shapes of a launch: the first is the default, the best on paper for sm_90.

    Nothing chooses between them at run time: the others are for benchmarks/kernels, and tactics of the plugin
    that TensorRT times. No GPU has tuned them yet.
    """
    if dtype == torch.float32:  # multiplied by the scalar units, from registers
        return (Tiles(block_m=32, block_n=32, warps=4, stages=2),)
    block_m = min(power_of_two(queries, SMALLEST_DOT), 64)
    # A wide head's output fills the registers: at 192, blocks of 32 keys spill on sm_80.
    most = 64 if width <= 64 else 32 if width <= 128 else 16
    block_n = min(power_of_two(keys, SMALLEST_DOT), most)
    return (
        Tiles(block_m, block_n, warps=4, stages=2),
        Tiles(block_m, min(block_n, 32), warps=4, stages=3),
        Tiles(block_m, 2 * block_n, warps=4, stages=2),
        Tiles(2 * block_m, block_n, warps=8, stages=2),
    )


def grid(
    batch: int, queries: int, keys: int, heads: int, guided: bool, schedule: Tiles
) -> tuple[int, int, int]:
    """Programs of a launch; batch and queries may be TensorRT's shape expressions."""
    map_tiles = ceil_div(keys, schedule.block_n) if guided else 0
    return ceil_div(queries, schedule.block_m), heads + map_tiles, batch


def launch(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    guided: bool = False,
    schedule: Tiles | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch `kernel` or its wrapping by `schedule`, else the first of `schedules`: (output, map or None)."""
    batch, n_queries, columns = query.shape
    n_keys, width = key.shape[1], columns // heads
    query, key, value = map(dense_columns, (query, key, value))
    mask, bias = (None if x is None else dense_columns(x) for x in (mask, bias))
    out = query.new_empty(batch, n_queries, columns)
    guide = query.new_empty(batch, n_queries, n_keys, dtype=torch.float32) if guided else None
    if out.numel() == 0:
        return out, guide
    schedule = schedule or schedules(n_queries, n_keys, width, query.dtype)[0]
    launch_kernel(
        kernel,
        grid(batch, n_queries, n_keys, heads, guided, schedule),
        query,
        query=query,
        key=key,
        value=value,
        mask=mask,
        bias=bias,
        out=out,
        guide=guide,
        n_queries=n_queries,
        n_keys=n_keys,
        query_batch=query.stride(0),
        query_row=query.stride(1),
        key_batch=key.stride(0),
        key_row=key.stride(1),
        value_batch=value.stride(0),
        value_row=value.stride(1),
        mask_batch=0 if mask is None else mask.stride(0),
        mask_row=None if mask is None or mask.dim() == 2 else mask.stride(1),
        bias_head=None if bias is None else bias.stride(0),
        bias_row=None if bias is None else bias.stride(1),
        scale=width**-0.5,
        **_constants(n_keys, heads, width, query.dtype, mask is not None, schedule),
    )
    return out, guide


def _constants(
    n_keys: int, heads: int, width: int, dtype: torch.dtype, masked: bool, schedule: Tiles
) -> dict[str, Any]:
    """What is compiled into the kernel, by name."""
    part, count = column_parts(width)
    lead = int(not masked and n_keys > 1 and n_keys % schedule.block_n == 1)
    return {
        "HEADS": heads,
        "WIDTH": width,
        "PART": part,
        "PARTS": count,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_MASK": power_of_two(n_keys),
        "BLOCK_K": 32 if dtype == torch.float32 else 64,
        "LEAD": lead,
        "EVEN": not masked and (n_keys - lead) % schedule.block_n == 0,
        "LOG2E": LOG2E,
        "PRECISION": dot_precision(dtype),
        "num_warps": schedule.warps,
        "num_stages": schedule.stages,
    }


@operator("dgm4::attention")
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return launch(wrap_triton(_attention_kernel), query, key, value, heads, mask, bias=bias)[0]


@operator("dgm4::guided_attention")
def _guided_op(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    out, guide = launch(wrap_triton(_attention_kernel), query, key, value, heads, guided=True)
    return out, cast(Tensor, guide)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend; query [B, N, H*d], key and value [B, M, H*d] -> [B, N, H*d].

    The mask [B, M] or [B, N, M] is of integers or truth values, 0 = ignored. The bias [H, N, M] has the type
    of the query and is added to the scores; it has to be finite, for a mask says what is ignored.

    Raises ValueError for shapes or devices, TypeError for types, that do not go together.
    """
    if exporting():
        return emit(query, key, value, heads, mask, bias)[0]
    _check(query, key, value, heads, mask, bias)
    if launchable(query):
        return torch.ops.dgm4.attention(query, key, value, heads, mask, bias)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    keep = None if mask is None else _keep(mask)
    if bias is not None:
        keep = bias[None] if keep is None else bias.masked_fill(~keep, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)


def guided_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attend and return the head-averaged scaled scores too: [B, N, H*d] and float32 [B, N, M].

    Raises as `attention` does.
    """
    if exporting():
        out, guide = emit(query, key, value, heads, guided=True)
        return out, guide
    _check(query, key, value, heads)
    if launchable(query):
        return torch.ops.dgm4.guided_attention(query, key, value, heads)
    out, guide = attention_ref(query, key, value, heads)
    return out, guide.to(torch.promote_types(guide.dtype, torch.float32))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_axes(name, tensor, "B, N, heads * d")
    if heads < 1 or query.shape[-1] % heads:
        raise ValueError(f"query: expected [B, N, heads * d] with {heads} heads, got {tuple(query.shape)}")
    (batch, queries, columns), keys = query.shape, key.shape[1]
    check_tensor("key", key, (batch, keys, columns), query)
    check_tensor("value", value, (batch, keys, columns), query)
    if mask is not None:
        if mask.shape not in ((batch, keys), (batch, queries, keys)):
            raise ValueError(
                f"mask: expected [B, M] or [B, N, M], {(batch, keys)} or {(batch, queries, keys)}, "
                f"got the shape {tuple(mask.shape)}"
            )
        check_tensor("mask", mask, tuple(mask.shape), query, same_dtype=False)
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"mask: expected integers, 1 valid and 0 ignored, got {mask.dtype}")
    if bias is not None:
        check_tensor("bias", bias, (heads, queries, keys), query)
