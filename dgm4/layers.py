"""Building blocks that the three networks share. B batch, N query tokens, M key tokens, D width, H heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import TORCH_EPS


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D/H] -> [B, N, D]."""
    return x.transpose(1, 2).flatten(2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention; query [B, H, N, d], key and value [B, H, M, d], bias added to the scores."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # Training on a CPU: torch's fused kernel takes twice as long here, forward and backward.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return F.dropout(weights, dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def padding_bias(attention_mask: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """Turn a mask [B, M] of ones (valid) and zeros (padding) into a bias [B, 1, 1, M] for the scores."""
    bias = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return bias.masked_fill(attention_mask == 0, value)[:, None, None]


class PackedAttention(nn.Module):
    """Multi-head attention with the parameter names of torch's nn.MultiheadAttention.

    `bias` is added to the scores, [B, 1, 1, M] or None. Returns [B, N, D].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """Let `query` [B, N, D] read `key` [B, M, D], which serves as values too."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = (query, key, key)
        q, k, v = (
            split_heads(F.linear(x, w, b), self.heads)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        return self.out_proj(merge_heads(attention(q, k, v, bias)))


class Head(nn.Sequential):
    """Linear(D, 2D) LN GELU Linear(2D, 2D) LN GELU Linear(2D, out)."""

    def __init__(self, width: int, out: int) -> None:
        hidden = 2 * width
        super().__init__(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden, eps=TORCH_EPS),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden, eps=TORCH_EPS),
            nn.GELU(),
            nn.Linear(hidden, out),
        )
