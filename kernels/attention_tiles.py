"""A tile of attention: some queries of one head over all keys, the softmax online. See attention.py."""

from __future__ import annotations

from kernels.jit import jit, load_tile, tl


@jit
def _pair_tile(
    start: tl.tensor,
    o_query: tl.tensor,  # (BLOCK_M)
    o_key: tl.tensor,  # (BLOCK_N)
    row: tl.tensor,
    n_queries: tl.tensor,
    n_keys: tl.tensor,  # None where all keys exist
) -> tl.tensor:
    """Load what a matrix [N, M] says of queries and keys; zeros outside. (BLOCK_M, BLOCK_N)"""
    m_tile = (o_query < n_queries)[:, None]
    if n_keys is not None:
        m_tile = m_tile & (o_key < n_keys)[None, :]
    p_row = start + o_query.to(tl.int64)[:, None] * row
    return tl.load(p_row + o_key[None, :], mask=m_tile, other=0)


# Long because the formatter gives each of its arguments a line; its steps share too many tiles to be split.
@jit
def head_tile(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    o_query: tl.tensor,  # (BLOCK_M)
    n_queries: tl.tensor,
    n_keys: tl.tensor,
    query_row: tl.tensor,
    key_row: tl.tensor,
    value_row: tl.tensor,
    mask_row: tl.tensor,  # None where the mask is one of keys
    bias_row: tl.tensor,
    out_row: tl.tensor,
    scale: tl.tensor,  # of scores, to exponents of two
    bias_scale: tl.tensor,  # of the bias, to scores before that
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
    LEAD: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of queries of one head, over all keys."""
    BLOCK_M: tl.constexpr = o_query.shape[0]
    o_part = tl.arange(0, PART)
    end = n_keys
    if mask_row is not None:
        b_some = tl.zeros((BLOCK_M,), tl.int32)  # (BLOCK_M), 1 where a valid key was met
    elif mask is not None:
        # Blocks of padding behind the last valid key are skipped, not masked.
        o_mask = tl.arange(0, BLOCK_MASK)
        b_mask = tl.load(mask + o_mask, mask=o_mask < n_keys, other=0)  # (BLOCK_MASK)
        end = tl.max(tl.where(b_mask != 0, o_mask + 1, 0), 0)
    b_max = tl.full((BLOCK_M,), 0.0 if LEAD else float("-inf"), tl.float32)  # (BLOCK_M)
    if LEAD and bias is not None:
        b_lead = tl.load(bias + o_query.to(tl.int64) * bias_row, mask=o_query < n_queries, other=0.0)
        b_max += b_lead.to(tl.float32) * bias_scale * scale  # (BLOCK_M)
    b_sum = tl.full((BLOCK_M,), LEAD, tl.float32)  # (BLOCK_M)
    b_query: tl.tuple = ()  # PARTS times (BLOCK_M, PART)
    b_out: tl.tuple = ()  # PARTS times (BLOCK_M, PART)
    for i in tl.static_range(PARTS):
        o_col = i * PART + o_part
        b_query = b_query + (load_tile(query, o_query, o_col, query_row, n_queries, WIDTH),)
        b_first = tl.zeros((PART,), tl.float32)  # (PART), of the first key and then of its value
        if LEAD:
            # A key left over would cost a whole block; as a vector it only sets where the softmax starts.
            b_first = tl.load(key + o_col, mask=o_col < WIDTH, other=0.0).to(tl.float32)
            b_max += tl.sum(b_query[i].to(tl.float32) * b_first[None, :], 1) * scale
            b_first = tl.load(value + o_col, mask=o_col < WIDTH, other=0.0).to(tl.float32)
        b_out = b_out + (tl.zeros((BLOCK_M, PART), tl.float32) + b_first[None, :],)
    rows = None if EVEN else end
    for i_key in range(LEAD, end, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        b_scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # (BLOCK_M, BLOCK_N)
        for i in tl.static_range(PARTS):
            b_key = load_tile(key, o_key, i * PART + o_part, key_row, rows, WIDTH)  # (BLOCK_N, PART)
            b_scores = tl.dot(b_query[i], tl.trans(b_key), b_scores, input_precision=PRECISION)
        if bias is not None:
            # Added before the scale, so that scaling stays one multiplication and addition with the pivot.
            b_bias = _pair_tile(bias, o_query, o_key, bias_row, n_queries, rows)  # (BLOCK_M, BLOCK_N)
            b_scores += b_bias.to(tl.float32) * bias_scale
        if mask_row is not None:
            m_pair = _pair_tile(mask, o_query, o_key, mask_row, n_queries, end) != 0  # (BLOCK_M, BLOCK_N)
            b_some = tl.maximum(b_some, tl.max(m_pair.to(tl.int32), 1))
            b_scores = tl.where(m_pair, b_scores, float("-inf"))
        elif not EVEN:
            m_key = o_key < end
            if mask is not None:
                m_key = tl.load(mask + o_key, mask=m_key, other=0) != 0
            b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))
        # Both maxima drop a NaN; it comes back through b_weights, and through b_shrink from the first key.
        b_new = tl.maximum(b_max, tl.max(b_scores, 1) * scale)  # (BLOCK_M)
        # Finite while a row has met no valid key: -inf - (-inf) would be NaN.
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)  # (BLOCK_M)
        b_weights = tl.exp2(b_scores * scale - b_pivot[:, None])  # (BLOCK_M, BLOCK_N)
        b_shrink = tl.exp2(b_max - b_pivot)  # (BLOCK_M)
        b_sum = b_sum * b_shrink + tl.sum(b_weights, 1)
        b_max = b_new
        b_weights = b_weights.to(value.dtype.element_ty)
        b_mixed: tl.tuple = ()  # PARTS times (BLOCK_M, PART)
        for i in tl.static_range(PARTS):
            b_value = load_tile(value, o_key, i * PART + o_part, value_row, rows, WIDTH)  # (BLOCK_N, PART)
            b_shrunk = b_out[i] * b_shrink[:, None]  # (BLOCK_M, PART)
            b_mixed = b_mixed + (tl.dot(b_weights, b_value, b_shrunk, input_precision=PRECISION),)
        b_out = b_mixed
    # Zeros only without a valid key: where all scores are -inf, 0 / 0 is NaN as in torch, and so it shows.
    m_none = end == 0 if mask_row is None else b_some == 0
    b_share = 1.0 / tl.where(m_none, 1.0, b_sum)[:, None]  # (BLOCK_M, 1)
    p_row = out + o_query.to(tl.int64)[:, None] * out_row
    for i in tl.static_range(PARTS):
        o_col = i * PART + o_part
        m_tile = (o_query < n_queries)[:, None] & (o_col < WIDTH)[None, :]
        tl.store(p_row + o_col[None, :], (b_out[i] * b_share).to(out.dtype.element_ty), mask=m_tile)
