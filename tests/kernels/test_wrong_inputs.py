"""What the public functions refuse: other axes, integers, scales of other shapes. On any machine."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import attention, guided_attention
from kernels.conv_fusion import conv_fusion, conv_fusion_ref
from kernels.gaussian_guidance import gaussian_guidance
from kernels.gelu import gelu
from kernels.latent_pool import latent_pool
from kernels.quantize import quantize_rows
from kernels.residual_norm import residual_norm

WIDTH = 8


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fusion(image=None, tokens=None):
    """The operands of a fusion of 2 x 2 patches; all four places of a kernel are zero, so alike."""
    kernels = torch.zeros(4 * WIDTH, 3, 6, 6)
    image = randn(1, 3, 32, 32) if image is None else image
    return image, randn(1, 5, WIDTH) if tokens is None else tokens, kernels, torch.ones(4 * WIDTH)


X, VECTOR = randn(2, 4, WIDTH), randn(WIDTH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(X, VECTOR, X, 2), "key: expected"),
        (lambda: attention(X, X, torch.tensor(1.0), 2), "value: expected"),
        (lambda: attention(X[0], X, X, 2), "query: expected"),
        (lambda: guided_attention(X, X, VECTOR, 2), "value: expected"),
        (lambda: latent_pool(X[0], VECTOR, VECTOR, X[0]), "tokens: expected"),
        (lambda: latent_pool(torch.tensor(1.0), VECTOR, VECTOR, X[0]), "tokens: expected"),
        (lambda: latent_pool(X, VECTOR, VECTOR, torch.tensor(1.0)), "query: expected"),
        (lambda: gaussian_guidance(torch.tensor(1.0), randn(4, 1, 3, 3), randn(4), 8), "box: expected"),
        (lambda: conv_fusion(*fusion(tokens=randn(1, 5, 0))), "tokens: expected"),
        (lambda: conv_fusion(*fusion(tokens=randn(1, 1, WIDTH))), "tokens: expected"),
        (lambda: conv_fusion(*fusion(tokens=randn(1, 0, WIDTH))), "tokens: expected"),
        (lambda: conv_fusion(*fusion(image=randn(3, 32, 32))), "image: expected"),
        (lambda: quantize_rows(X, torch.int8, torch.ones(1, 1)), r"scale: expected one float32, \[\] or"),
        (lambda: gelu(X, dtype=torch.int8, scale=torch.ones(1, 1, 1, 1)), "scale: expected one float32"),
        (lambda: gelu(torch.tensor(1.0)), "x: expected 1 to"),
    ],
)
def test_other_shapes_are_value_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention(X.int(), X.int(), X.int(), 2),
        lambda: gelu(X.int()),
        lambda: quantize_rows(X.int(), torch.int8),
        lambda: residual_norm(X.int(), None, VECTOR, VECTOR, 1e-5),
        lambda: latent_pool(X.int(), VECTOR, VECTOR, X[0]),
        lambda: conv_fusion(*fusion(image=torch.zeros(1, 3, 32, 32, dtype=torch.uint8))),
    ],
)
def test_integers_are_type_errors(call):
    with pytest.raises(TypeError, match="expected floating point, got torch"):
        call()


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5])])
def test_codes_have_the_shape_of_their_values(scale):
    codes = quantize_rows(X[0], torch.int8, scale)
    assert codes.out.shape == X[0].shape
    assert torch.equal(codes.out, (X[0] / 0.5).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_image_may_be_wider_than_the_tokens(dtype):
    image, tokens, kernels, bias = fusion()
    half = tokens.to(dtype), kernels.to(dtype), bias.to(dtype)
    assert torch.equal(conv_fusion(image, *half), conv_fusion_ref(image.to(dtype), *half))
