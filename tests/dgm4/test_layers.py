"""The shared blocks against torch's own and against formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgm4.layers import Head, PackedAttention, attention, merge_heads, padding_bias, split_heads

EXACT = 1e-10


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_split_and_merge_are_inverse():
    x = random(2, 5, 24)
    split = split_heads(x, 4)
    assert split.shape == (2, 4, 5, 6)
    assert torch.equal(split[0, 2, 3], x[0, 3, 12:18])
    assert torch.equal(merge_heads(split), x)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 50), (7, 63), (33, 2)])
def test_attention_is_the_formula(queries, keys):
    q, k, v = random(2, 3, queries, 8), random(2, 3, keys, 8, seed=1), random(2, 3, keys, 8, seed=2)
    bias = random(2, 1, 1, keys, seed=3)
    weights = torch.exp(torch.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5 + bias)
    want = torch.einsum("bhnm,bhmd->bhnd", weights, v) / weights.sum(-1, keepdim=True)
    assert (attention(q, k, v, bias) - want).abs().max() <= EXACT


def test_padding_bias():
    bias = padding_bias(torch.tensor([[1, 1, 0], [1, 0, 0]]), -7.0, torch.float64)
    assert bias.shape == (2, 1, 1, 3)
    assert bias.dtype == torch.float64
    assert bias[:, 0, 0].tolist() == [[0, 0, -7], [0, -7, -7]]


@pytest.mark.parametrize(("queries", "keys"), [(1, 256), (257, 40), (5, 5)])
def test_packed_attention_is_torchs(queries, keys):
    """With the same parameter names, so a state of one loads into the other."""
    ours = PackedAttention(24, 4).double()
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).double()
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, memory = random(3, queries, 24), random(3, keys, 24, seed=1)
    mask = torch.arange(keys)[None] < torch.tensor([[keys], [max(keys // 2, 1)], [1]])
    want, _ = theirs(x, memory, memory, key_padding_mask=~mask)
    got = ours(x, memory, padding_bias(mask.long(), float("-inf"), torch.float64))
    assert (got - want).abs().max() <= EXACT


def test_ignored_keys_are_not_read():
    packed = PackedAttention(24, 4).double()
    x, memory = random(1, 5, 24), random(1, 6, 24, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    changed = torch.cat([memory[:, :3], 1e6 * random(1, 3, 24, seed=2)], dim=1)
    bias = padding_bias(mask, float("-inf"), torch.float64)
    assert torch.equal(packed(x, memory, bias), packed(x, changed, bias))
    assert (packed(x, memory, bias) - packed(x, memory[:, :3])).abs().max() <= EXACT


def test_head_is_the_formula():
    head = Head(6, 3).double()
    x = random(4, 6)

    def norm(y, layer):
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    y = x
    for first in (0, 3):
        y = norm(y @ head[first].weight.T + head[first].bias, head[first + 1])
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    want = y @ head[6].weight.T + head[6].bias
    assert (head(x) - want).abs().max() <= EXACT
    assert head[0].out_features == 12


def test_bfloat16_on_a_cpu_is_the_same_attention():
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, generator=random) for n in (5, 7, 7))
    bias = torch.tensor([0.0, 0, 0, 0, 0, float("-inf"), float("-inf")])[None, None, None]
    want = attention(query, key, value, bias)
    halves = [x.bfloat16() for x in (query, key, value, bias)]
    assert (attention(*halves).float() - want).abs().max() <= 2e-2
    torch.manual_seed(0)
    dropped = attention(*halves[:3], dropout=0.5)
    assert (dropped != attention(*halves[:3])).any()
