"""CAFormer's fusion at the token grid against pixels taken one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch.nn import functional as F

from kernels.conv_fusion import (
    BLUR,
    MARGIN,
    NAME,
    POSITIONS,
    STRIDE,
    blur_matrix,
    conv_fusion,
    conv_fusion_ref,
    pack,
)

EXACT = 1e-10


def formula(image, tokens, weight, bias):
    """One patch after another: a 6x6 window, four kernels, ReLU, their mean; and the blurred tokens."""
    image, tokens, weight, bias = (np.asarray(x, np.float64) for x in (image, tokens, weight, bias))
    grid = image.shape[-1] // STRIDE
    field = tokens[:, 1:].reshape(len(tokens), grid, grid, -1)
    padded = np.pad(field, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    out = tokens.copy()
    for y in range(grid):
        for x in range(grid):
            top, left = STRIDE * y + MARGIN, STRIDE * x + MARGIN
            window = image[:, :, top : top + 6, left : left + 6]
            answers = np.einsum("bcyx,ocyx->bo", window, weight) + bias
            local = np.maximum(answers, 0).reshape(len(image), POSITIONS, -1).mean(1)
            around = padded[:, y : y + 3, x : x + 3]
            out[:, 1 + y * grid + x] = np.einsum("byxd,y,x->bd", around, BLUR, BLUR) + local
    return out


@pytest.fixture
def drawn(normal):
    def make(batch, grid, width, dtype=torch.float64):
        size = STRIDE * grid
        return (
            normal(batch, 3, size, size, seed=1, dtype=dtype),
            normal(batch, 1 + grid**2, width, seed=2, dtype=dtype),
            normal(POSITIONS * width, 3, 6, 6, seed=3, dtype=dtype) / 10,
            normal(POSITIONS * width, seed=4, dtype=dtype),
        )

    return make


@pytest.mark.parametrize(("batch", "grid", "width"), [(1, 2, 1), (2, 3, 7), (7, 2, 24), (1, 16, 50)])
def test_reference_is_the_formula(drawn, batch, grid, width):
    tensors = drawn(batch, grid, width)
    want = formula(*tensors)
    assert np.abs(conv_fusion_ref(*tensors).numpy() - want).max() <= EXACT
    assert np.abs(conv_fusion(*tensors).numpy() - want).max() <= EXACT


def test_packed_kernels_are_rows_and_a_bias(normal):
    kernel, bias = normal(2, 3, 3, 5, 5), normal(2, 3, seed=1)
    placed = torch.stack([F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)], 1)
    packed = pack(placed.flatten(0, 2), bias[:, None].expand(-1, 4, -1).flatten(), 3)
    assert packed.shape == (2, 3, 5, 16)
    for row in range(5):
        assert torch.equal(packed[:, :, row, :15], torch.cat(kernel[..., row, :].unbind(2), -1))
    assert torch.equal(packed[..., 0, 15], bias)
    assert not packed[:, :, 1:, 15].any()


def test_packed_kernels_of_another_shape_are_refused(drawn):
    with pytest.raises(
        (TypeError, ValueError), match=r"packed: expected the shape \(1, 8, 5, 16\), got \(8, 5, 16\)"
    ):
        conv_fusion(*drawn(1, 2, 8), packed=torch.zeros(8, 5, 16).double())


def test_strided_inputs(drawn):
    image, tokens, weight, bias = drawn(3, 3, 8)
    wide = torch.cat([tokens, tokens], dim=-1)[..., ::2]
    planes = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not wide.is_contiguous()
    assert not planes.is_contiguous()
    want = formula(planes, wide, weight, bias)
    assert np.abs(conv_fusion(planes, wide, weight, bias).numpy() - want).max() <= EXACT
    expanded = image[:1].expand(3, -1, -1, -1)
    assert (
        np.abs(conv_fusion(expanded, tokens, weight, bias) - formula(expanded, tokens, weight, bias)).max()
        <= EXACT
    )


def test_the_blur_is_up_and_down_bilinearly():
    """Up to 16 times the grid and down again, by torch."""
    for grid in (2, 3, 16):
        field = torch.eye(grid, dtype=torch.float64)[None, :, :, None].expand(1, grid, grid, 5)
        up = F.interpolate(field, size=(STRIDE * grid, 5 * STRIDE), mode="bilinear", align_corners=False)
        down = F.interpolate(up, size=(grid, 5), mode="bilinear", align_corners=False)
        assert (down[0, :, :, 0] - blur_matrix(grid).T).abs().max() <= EXACT
        assert (blur_matrix(grid).sum(1) - 1).abs().max() <= EXACT


def test_cls_passes_by(drawn):
    tensors = drawn(2, 3, 4)
    assert torch.equal(conv_fusion(*tensors)[:, 0], tensors[1][:, 0])


def named(tensors):
    return dict(zip(("image", "tokens", "weight", "bias"), (x.numpy() for x in tensors), strict=True))


@pytest.mark.parametrize(("batch", "width"), [(1, 1), (2, 7), (7, 24), (3, 50)])
def test_onnx_body_is_the_reference(drawn, onnx_body, batch, width):
    tensors = drawn(batch, 16, width, torch.float32)
    (got,) = onnx_body(NAME, named(tensors), {"out": TensorProto.FLOAT})
    want = conv_fusion_ref(*(x.double() for x in tensors)).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5


def test_onnx_body_in_half_precision(drawn, onnx_body, no_worse):
    tensors = drawn(2, 16, 24, torch.float16)
    (got,) = onnx_body(NAME, named(tensors), {"out": TensorProto.FLOAT16})
    assert got.dtype == np.float16
    no_worse(got, conv_fusion_ref(*tensors), conv_fusion_ref(*(x.double() for x in tensors)), torch.float16)


def test_two_branches_are_added(drawn, onnx_body, normal):
    """A second set of kernels beside the first, in torch and in the body; tokens are blurred once."""
    image, tokens, weight, bias = drawn(1, 16, 7, torch.float32)
    other = normal(*weight.shape, seed=8, dtype=torch.float32) / 10
    both = (image, tokens, torch.cat([weight, other]), torch.cat([bias, -bias]))
    want = formula(image, tokens, weight, bias) + formula(image, 0 * tokens, other, -bias)
    assert np.abs(conv_fusion(*both).numpy() - want).max() <= 1e-5
    (got,) = onnx_body(NAME, named(both), {"out": TensorProto.FLOAT})
    assert np.abs(got - want).max() <= 1e-5
