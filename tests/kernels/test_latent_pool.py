"""Pooling by a constant query against the formula, one head at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto

from kernels.latent_pool import MASKED, NAME, latent_pool, latent_pool_ref

EXACT = 1e-10
SHAPES = [(1, 1, 1, 3), (2, 7, 2, 24), (7, 256, 12, 50), (1, 63, 16, 768)]


def formula(tokens, weight, bias, query):
    tokens, weight, bias, query = (np.asarray(x, np.float64) for x in (tokens, weight, bias, query))
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    out = np.empty((len(tokens), *query.shape))
    for h, q in enumerate(query):
        scores = normed @ q
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = np.einsum("bp,bpd->bd", weights / weights.sum(1, keepdims=True), normed)
    return out


@pytest.fixture
def drawn(normal):
    def make(batch, patches, heads, width, dtype=torch.float64):
        query = normal(heads, width, seed=4, dtype=dtype) / width**0.5
        tokens = 3 + 2 * normal(batch, patches, width, seed=1, dtype=dtype)
        return tokens, normal(width, seed=2, dtype=dtype), normal(width, seed=3, dtype=dtype), query

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(drawn, shape):
    tensors = drawn(*shape)
    want = formula(*tensors)
    assert np.abs(latent_pool_ref(*tensors).numpy() - want).max() <= EXACT
    assert np.abs(latent_pool(*tensors).numpy() - want).max() <= EXACT


def test_strided_tokens(drawn):
    """The patches behind a [CLS], and one picture expanded to a batch."""
    tokens, *rest = drawn(3, 10, 2, 24)
    assert np.abs(latent_pool(tokens[:, 1:], *rest).numpy() - formula(tokens[:, 1:], *rest)).max() <= EXACT
    expanded = tokens[:1].expand(3, -1, -1)
    assert np.abs(latent_pool(expanded, *rest).numpy() - formula(expanded, *rest)).max() <= EXACT


def masked(batch, patches):
    """Captions of every length, none included, and a hole in the first."""
    mask = (torch.arange(patches)[None] < torch.arange(patches, patches - batch, -1)[:, None]).int()
    mask[0, 0], mask[-1] = 0, 0
    return mask


def test_padding_is_as_good_as_absent(drawn):
    tensors, mask = drawn(3, 7, 2, 24), masked(3, 7)
    out = latent_pool(*tensors, mask)
    for i in range(2):
        kept = tensors[0][i : i + 1, mask[i] == 1]
        assert np.abs(out[i].numpy() - formula(kept, *tensors[1:])[0]).max() <= EXACT
    assert not out[2].any()


def test_onnx_body_with_padding(drawn, onnx_body):
    tensors, mask = drawn(3, 7, 2, 24, torch.float32), masked(3, 7)
    (got,) = onnx_body(MASKED, named(tensors) | {"mask": mask.numpy()}, {"out": TensorProto.FLOAT})
    want = latent_pool_ref(*(x.double() for x in tensors), mask).numpy()
    assert np.abs(got - want).max() <= 1e-5


def test_equal_patches_are_kept(drawn):
    """eps matters here: the norm of a constant row is its bias."""
    _, weight, bias, query = drawn(1, 4, 2, 24)
    out = latent_pool(torch.full((1, 4, 24), 7.0, dtype=torch.float64), weight, bias, query)
    assert (out - bias).abs().max() <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_pooled_in_float32(drawn, no_worse, dtype):
    tokens, *rest = drawn(2, 256, 12, 48)
    rest = [x.float() for x in rest]
    got = latent_pool(tokens.to(dtype), *rest)
    assert got.dtype == dtype
    want = latent_pool_ref(*(x.double() for x in (tokens.to(dtype), *rest)))
    no_worse(got, want.to(dtype), want, dtype)


def named(tensors):
    return dict(zip(("tokens", "weight", "bias", "query"), (x.numpy() for x in tensors), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_body_is_the_reference(drawn, onnx_body, shape):
    tensors = drawn(*shape, torch.float32)
    (got,) = onnx_body(NAME, named(tensors), {"out": TensorProto.FLOAT})
    want = latent_pool_ref(*(x.double() for x in tensors)).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5


def test_onnx_body_with_half_precision_tokens(drawn, onnx_body, no_worse):
    tokens, *rest = drawn(2, 256, 12, 48)
    tensors = (tokens.half(), *(x.float() for x in rest))
    (got,) = onnx_body(NAME, named(tensors), {"out": TensorProto.FLOAT16})
    assert got.dtype == np.float16
    want = latent_pool_ref(*(x.double() for x in tensors))
    no_worse(got, want.half(), want, torch.float16)
