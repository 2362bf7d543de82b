"""The exact rewrites: each takes trained modules and returns one that gives the same for less.

Every fold is computed in float64 and cast back, and none changes the modules it is given. What each
saves is stated with it. `export.inference` composes them. The list, by the numbers used in comments:

1. token logits from the fusion pass rather than from a second run of BERT (`dgm4` computes them so)
2. CAFormer's fusion at the token grid: `fold_conv_fusion`
3. the learnt query folded with the key projection: `fold_latent_query`
4. the last blocks of CALS on both streams as one batch (order of calls in `export.inference`)
5. keys and values of all fusion layers as one product: `stack_linears`
6. query, key and value of a BERT layer as one product: `SelfAttention.from_projections`
7. both passes of CALS's image branch share the text's keys and values: `CrossAttention.project`
8. no [CLS] query where nobody reads its answer (order of calls in `export.inference`)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.layers import PackedAttention
from dgm4.text import Projections
from dgm4.vision import CAFormer
from kernels.attention import attention, guided_attention
from kernels.conv_fusion import POSITIONS, conv_fusion
from kernels.latent_pool import latent_pool

KERNEL = 5  # side of CAFormer's convolution, for which the pixels of kernels/conv_fusion.py are counted


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A Linear with these parameters, [out, in] and [out], without a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def stack_linears(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Several Linears of one input as a single product, outputs side by side (rewrites 5 and 6)."""
    return linear(torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers]))


def split_packed(packed: PackedAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The query, key and value projections of a packed attention, as views."""
    weights, biases = packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3)
    query, key, value = (linear(w, b) for w, b in zip(weights, biases, strict=True))
    return query, key, value


class Norm(nn.Module):
    """LayerNorm that works in its own dtype whatever comes, a float32 island in a half-precision network."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y = F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class SelfAttention(nn.Module):
    """Self-attention from one product for query, key and value (rewrite 6)."""

    def __init__(self, qkv: nn.Linear, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, qkv, out

    @classmethod
    def from_packed(cls, packed: PackedAttention) -> SelfAttention:
        """From torch's packed layout."""
        return cls(linear(packed.in_proj_weight, packed.in_proj_bias), packed.out_proj, packed.heads)

    @classmethod
    def from_projections(cls, projections: Projections, out: nn.Linear) -> SelfAttention:
        """From BERT's three Linears. Saves two launches and two readings of the input a layer."""
        qkv = stack_linears([projections.query, projections.key, projections.value])
        return cls(qkv, out, projections.heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] and the mask [B, N] of its padding, or None -> [B, N, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, mask))


class CrossAttention(nn.Module):
    """Attention whose keys and values are projected once and may be read many times (rewrites 5 and 7)."""

    def __init__(self, query: nn.Linear, key_value: nn.Linear | None, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads, self.query, self.key_value, self.out = heads, query, key_value, out

    @classmethod
    def from_packed(cls, packed: PackedAttention) -> CrossAttention:
        """From torch's packed layout."""
        query, key, value = split_packed(packed)
        return cls(query, stack_linears([key, value]), packed.out_proj, packed.heads)

    @classmethod
    def from_projections(cls, projections: Projections, out: nn.Linear, stacked: bool) -> CrossAttention:
        """From BERT's three Linears; without its own key and value product where layers share one."""
        key_value = None if stacked else stack_linears([projections.key, projections.value])
        return cls(projections.query, key_value, out, projections.heads)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, D] each of memory [B, M, D]."""
        if self.key_value is None:
            raise ValueError("keys and values of this layer come from the stacked product of its network")
        key, value = self.key_value(memory).chunk(2, dim=-1)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x [B, N, D] read keys and values [B, M, D]; mask [B, M] or None."""
        return self.out(attention(self.query(x), key, value, self.heads, mask))

    def guided(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the map of MGCA [B, N, M] from the same pass."""
        mixed, guide = guided_attention(self.query(x), key, value, self.heads)
        return self.out(mixed), guide


class ConvFusion(nn.Module):
    """CAFormer's fusion without the full-size map (rewrite 2); see kernels/conv_fusion.py."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """image [B, 3, S, S], tokens [B, 1+P, D] after the post-norm block -> [B, 1+P, D]."""
        return conv_fusion(image, tokens, self.weight, self.bias)


def fold_conv_fusion(vision: CAFormer) -> ConvFusion:
    """Fold BatchNorm into the 5x5 kernel and put that at the four pixels the way down reads (rewrite 2).

    Output i of the bilinear way down from 16 G to G lies at 16i + 7.5: the mean of pixels 16i+7 and
    16i+8, which see 16i+5 .. 16i+10, a 6x6 window at stride 16. Saves 201 MB a picture and 255/256 of
    the convolution.
    """
    conv, norm = vision.Conv.conv, vision.Conv.bn2
    if norm.running_var is None or norm.running_mean is None:
        raise ValueError("the BatchNorm of CAFormer keeps no running statistics and cannot be folded")
    if conv.kernel_size != (KERNEL, KERNEL):
        raise ValueError(
            f"CAFormer: expected a {KERNEL}x{KERNEL} convolution to fold, got {conv.kernel_size}"
        )
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    kernel = conv.weight.double() * gain[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * gain
    placed = [F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    dtype = conv.weight.dtype
    return ConvFusion(torch.cat(placed).detach().to(dtype), bias.repeat(POSITIONS).detach().to(dtype))


class LatentPool(nn.Module):
    """Pooling by the learnt query, its key projection folded away (rewrite 3)."""

    def __init__(
        self, norm: nn.LayerNorm, query: Tensor, value: Tensor, bias: Tensor, out: nn.Linear
    ) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.query = nn.Parameter(query, requires_grad=False)
        self.value = nn.Parameter(value, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.out = out

    def forward(self, patches: Tensor) -> Tensor:
        """[B, P, D] -> [B, D]."""
        pooled = latent_pool(patches, self.norm.weight, self.norm.bias, self.query)
        values = (pooled[:, :, None] @ self.value)[:, :, 0] + self.bias
        return self.out(values.flatten(1))


def fold_latent_query(query: Tensor, norm: nn.LayerNorm, packed: PackedAttention) -> LatentPool:
    """Fold the constant query [1, 1, D] and the key projection into one matrix [H, D] (rewrite 3).

    scores_h = ((LN(q) Wq + bq)_h / sqrt(d)) . (Wk_h x + bk_h): the part with bk is the same for every
    patch and cancels in the softmax. The values are projected after the weighted mean, H vectors
    instead of P. Saves 2 P D^2 multiplications: 0.6 GFLOP of 61 at base size.
    """
    heads, width = packed.heads, packed.out_proj.in_features
    w_query, w_key, w_value = packed.in_proj_weight.double().chunk(3)
    b_query, _, b_value = packed.in_proj_bias.double().chunk(3)
    normed = F.layer_norm(query[0, 0].double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    projected = (w_query @ normed + b_query).unflatten(0, (heads, -1)) * (width // heads) ** -0.5
    folded = torch.einsum("hd,hdw->hw", projected, w_key.unflatten(0, (heads, -1)))
    value = w_value.unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
    parts = (folded, value, b_value.unflatten(0, (heads, -1)))
    dtype = packed.in_proj_weight.dtype
    folded, value, bias = (x.detach().to(dtype) for x in parts)
    return LatentPool(norm, folded, value, bias, packed.out_proj)
