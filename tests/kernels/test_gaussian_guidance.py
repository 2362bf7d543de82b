"""The Gaussian and its first convolution against pixels taken one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto

from kernels.gaussian_guidance import NAME, gaussian_guidance, gaussian_guidance_ref

EXACT = 1e-10
BOXES = [
    [0.5, 0.5, 0.2, 0.4],
    [0.1, 0.9, 0.05, 0.01],
    [1, 1, 1, 1],
    [0, 0, 1e-3, 0],
    [0.5, 0.25, 0, 0],
    [0.3, 0.3, 1e-6, 1e-6],
    [0.999, 0.001, 0.7, 0.02],
]


def formula(box, weight, bias, size):
    """The full map in float64, padded by one, windows of 4x4 at every second pixel, ReLU."""
    box, weight, bias = (np.asarray(x, np.float64) for x in (box, weight, bias))
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    out = np.empty((len(box), len(weight), size // 2, size // 2))
    for b, (cx, cy, w, h) in enumerate(size * box):
        spread = 2 * ((h / 2) ** 2 + (w / 2) ** 2) + 1e-8
        field = np.clip(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / spread), 0, 1)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(field, 1), (4, 4))[::2, ::2]
        out[b] = np.einsum("yxij,oij->oyx", windows, weight[:, 0]) + bias[:, None, None]
    return np.maximum(out, 0)


@pytest.fixture
def drawn(normal):
    def make(channels, dtype=torch.float64, boxes=BOXES):
        weight = normal(channels, 1, 4, 4, seed=1, dtype=dtype)
        return torch.tensor(boxes, dtype=dtype), weight, normal(channels, seed=2, dtype=dtype)

    return make


@pytest.mark.parametrize("size", [16, 34, 256])
@pytest.mark.parametrize("channels", [1, 7, 64])
def test_reference_is_the_formula(drawn, size, channels):
    tensors = drawn(channels)
    want = formula(*tensors, size)
    assert np.abs(gaussian_guidance_ref(*tensors, size).numpy() - want).max() <= EXACT
    assert np.abs(gaussian_guidance(*tensors, size).numpy() - want).max() <= EXACT


@pytest.mark.parametrize("box", BOXES)
def test_a_batch_of_one(drawn, box):
    tensors = drawn(7, boxes=[box])
    assert np.abs(gaussian_guidance(*tensors, 64).numpy() - formula(*tensors, 64)).max() <= EXACT


def test_strided_boxes(drawn):
    box, weight, bias = drawn(7)
    strided = torch.cat([box, box], dim=1).reshape(-1, 4)[::2]
    assert not strided.is_contiguous()
    assert torch.equal(gaussian_guidance(strided, weight, bias, 32), gaussian_guidance(box, weight, bias, 32))
    expanded = box[:1].expand(3, -1)
    assert (
        np.abs(
            gaussian_guidance(expanded, weight, bias, 32).numpy() - formula(expanded, weight, bias, 32)
        ).max()
        <= EXACT
    )


def test_an_empty_box_is_finite_in_every_precision(drawn):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = gaussian_guidance(*drawn(7, dtype, [[0.5, 0.5, 0, 0]]), 256)
        assert out.dtype == dtype
        assert out.isfinite().all()


def named(tensors):
    return dict(zip(("box", "weight", "bias"), (x.numpy() for x in tensors), strict=True))


@pytest.mark.parametrize("size", [16, 34, 256])
@pytest.mark.parametrize("channels", [1, 7, 64])
def test_onnx_body_is_the_reference(drawn, onnx_body, size, channels):
    tensors = drawn(channels, torch.float32)
    (got,) = onnx_body(NAME, named(tensors), {"out": TensorProto.FLOAT}, rank=4, size=[size])
    want = gaussian_guidance_ref(*tensors, size).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5


def test_onnx_body_in_half_precision(drawn, onnx_body, no_worse):
    """The box stays float32, as in the exported network; map and convolution are float16."""
    box, weight, bias = drawn(64, torch.float16)
    inputs = {"box": box.float().numpy(), "weight": weight.numpy(), "bias": bias.numpy()}
    (got,) = onnx_body(NAME, inputs, {"out": TensorProto.FLOAT16}, rank=4, size=[64])
    assert got.dtype == np.float16
    no_worse(got, gaussian_guidance_ref(box, weight, bias, 64), formula(box, weight, bias, 64), torch.float16)
