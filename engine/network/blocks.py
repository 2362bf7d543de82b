"""Building blocks of the network. B batch, N query tokens, M key tokens, P patches, D width, H heads.

Their tensors come from `engine.network.released`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from engine.network.linear import LinearInput, output_codes
from engine.network.parts import Part, linears
from engine.registry.config import TORCH_EPS
from kernels.attention import attention, guided_attention
from kernels.conv_fusion import POSITIONS, WINDOW, conv_fusion, packed_shape
from kernels.gelu import gelu
from kernels.latent_pool import latent_pool
from kernels.residual_norm import residual_norm
from kernels.rows import RowOutput


def empty(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module whose parameters have one."""
    return next(module.parameters()).dtype


class Norm(Part):
    """LayerNorm of a residual sum, computed in float32 whatever the input dtype (float64 if that is float64).

    `consumer` is the Linear that alone reads the output; one in FP8 gets it as codes.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = empty(width), empty(width), eps

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """All: see `Part`."""
        return self.parameters()

    def forward(
        self, x: Tensor, residual: Tensor | None = None, consumer: nn.Module | None = None
    ) -> LinearInput:
        """Norm x + residual [..., D]."""
        norm = residual_norm(x, residual, self.weight, self.bias, self.eps, **output_codes(consumer))
        return norm.out if norm.scale is None else RowOutput(norm.out, norm.scale)

    def add(
        self, x: Tensor, residual: Tensor | None, consumer: nn.Module | None = None
    ) -> tuple[Tensor, LinearInput]:
        """The sum x + residual [..., D] and its norm, from one pass."""
        if residual is None:
            return x, self(x, None, consumer)
        codes = output_codes(consumer)
        norm = residual_norm(x, residual, self.weight, self.bias, self.eps, **codes, summed=True)
        out = norm.out if norm.scale is None else RowOutput(norm.out, norm.scale)
        return cast(Tensor, norm.total), out


class Gelu(nn.Module):
    """GELU by erf; as codes where `consumer`, the Linear that alone reads it, is in FP8."""

    quick = False

    def forward(self, x: Tensor, consumer: nn.Module | None = None) -> LinearInput:
        """[..., D] -> [..., D], or codes."""
        rows = gelu(x, **output_codes(consumer), quick=self.quick)
        return rows.out if rows.scale is None else rows


class QuickGelu(Gelu):
    """CLIP's activation, x sigmoid(1.702 x)."""

    quick = True


class Head(nn.Sequential, Part):
    """Linear(D, 2D) LN GELU Linear(2D, 2D) LN GELU Linear(2D, out); the norms keep their own dtype.

    A head has one row a pair, or makes the final logits of every token, so FP8 leaves it alone; not one
    whose output is features of all `tokens`. With `exact` it is float32 in every precision: a box's head has
    to promise values below 1e-4 where there is no box.
    """

    def __init__(self, width: int, out: int, exact: bool = False, tokens: bool = False) -> None:
        hidden = 2 * width
        super().__init__(
            nn.Linear(width, hidden),
            Norm(hidden, TORCH_EPS),
            Gelu(),
            nn.Linear(hidden, hidden),
            Norm(hidden, TORCH_EPS),
            Gelu(),
            nn.Linear(hidden, out),
        )
        self.exact, self.tokens = exact, tokens

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """See `Part`."""
        return self.parameters() if self.exact else iter(())

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """See `Part`."""
        return linears(self) if self.exact or (precision == "fp8" and not self.tokens) else iter(())


class SelfAttention(nn.Module):
    """Self-attention from one product for query, key and value (rewrite 6)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: LinearInput, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; mask [B, N] of padding, [B, N, N] of what each reads, or None."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, mask))


class CrossAttention(nn.Module):
    """Attention with keys and values that are projected once and may be used many times (rewrites 5 and 7).

    With `stacked` they come from a product that several layers share.
    """

    def __init__(self, width: int, heads: int, stacked: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = None if stacked else nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, D] each of memory [B, M, D]."""
        if self.key_value is None:
            raise ValueError("keys and values of this layer come from the stacked product of its network")
        key, value = self.key_value(memory).chunk(2, dim=-1)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x [B, N, D] to keys and values [B, M, D]; mask [B, M] or None."""
        return self.out(attention(self.query(x), key, value, self.heads, mask))

    def guided(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the map of MGCA [B, N, M] from the same pass."""
        mixed, guide = guided_attention(self.query(x), key, value, self.heads)
        return self.out(mixed), guide


class ConvFusion(nn.Module):
    """CAFormer's fusion without the full-size map (rewrite 2); see kernels/conv_fusion.py."""

    def __init__(self, width: int, branches: int = 1) -> None:
        super().__init__()
        channels = branches * POSITIONS * width
        self.weight, self.bias = empty(channels, 3, WINDOW, WINDOW), empty(channels)
        self.packed = empty(*packed_shape(width, branches))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image [B, 3, S, S], tokens [B, 1+P, D] after the post-norm block -> [B, 1+P, D]."""
        return conv_fusion(image, tokens, self.weight, self.bias, self.packed)


class Choice(nn.Module):
    """Which `count` have the largest scores, and which the smallest.

    A choice jumps where rounding decides it; `export.graph.choices` counts how many did.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, high: Tensor, low: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places [..., count] in scores [..., m] within [0, 1], largest of `high`, smallest of `low`.

        Those not `valid`, [..., m] of integers, come last.
        """
        if valid is not None:
            high, low = high.masked_fill(valid == 0, -1), low.masked_fill(valid == 0, 2)
        return high.topk(self.count, dim=-1).indices, low.topk(self.count, dim=-1, largest=False).indices


class LatentPool(Part):
    """Pooling by the learnt query, its key projection folded away (rewrite 3); `normed`: of normed ones."""

    def __init__(self, width: int, heads: int, normed: bool = True) -> None:
        super().__init__()
        self.norm = Norm(width, TORCH_EPS) if normed else None
        self.query = empty(heads, width)
        self.value = empty(heads, width, width // heads)
        self.bias = empty(heads, width // heads)
        self.out = nn.Linear(width, width)

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """The pooled scores'; see `Part`."""
        yield self.query

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """One row a pair; see `Part`."""
        return linears(self) if precision == "fp8" else iter(())

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, P, D] and the mask [B, P] of its padding, or None -> [B, D]; no mask without a norm."""
        pooled = self._mean(tokens, mask)
        values = (pooled[:, :, None] @ self.value)[:, :, 0] + self.bias
        return self.out(values.flatten(1))

    def _mean(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted mean of the tokens for each head, [B, H, D]."""
        if self.norm is not None:
            return latent_pool(tokens, self.norm.weight, self.norm.bias, self.query, mask)
        wide = tokens.to(self.query.dtype)
        weights = (wide @ self.query.T).softmax(1)
        return (weights.transpose(1, 2) @ wide).to(tokens.dtype)
