"""Rounding of rows against Python's own round, and E4M3 against the list of its values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.quantize import quantize_rows

# Sign, four bits of exponent with bias 7, three of fraction; the last of the 128 is NaN.
E4M3 = np.array([(m + 8 * (e > 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])
E4M3 = np.concatenate([-E4M3[:0:-1], E4M3])


def nearest_e4m3(values):
    return E4M3[np.abs(np.asarray(values)[..., None] - E4M3).argmin(-1)]


def nearest_int8(values):
    return np.clip(np.vectorize(round)(values), -128, 127)


CODES = pytest.mark.parametrize(
    ("dtype", "top", "nearest"),
    [(torch.int8, 127, nearest_int8), (torch.float8_e4m3fn, 448, nearest_e4m3)],
    ids=["int8", "e4m3"],
)


@CODES
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 50, 96), (2, 2, 3, 197)])
def test_is_the_nearest_code(normal, shape, dtype, top, nearest):
    x = 3 * normal(*shape)
    found = quantize_rows(x, dtype)
    assert (found.out.shape, found.out.dtype) == (shape, dtype)
    assert (found.scale.shape, found.scale.dtype) == (shape[:-1], torch.float32)
    scale = found.scale.double().numpy()[..., None]
    assert np.allclose(scale[..., 0], np.abs(x.numpy()).max(-1) / top, rtol=1e-6)
    assert np.array_equal(found.out.double().numpy(), nearest(x.numpy() / scale))


@CODES
def test_a_given_scale_saturates(normal, dtype, top, nearest):
    x, scale = 3 * normal(5, 96), torch.full((1,), 2.0**-9)
    found = quantize_rows(x, dtype, scale)
    assert found.scale is scale
    assert found.out.double().max() == top
    assert np.array_equal(found.out.double().numpy(), nearest(x.numpy() * 2.0**9))


def test_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.4], [0.0, 0.0, 0.0]])
    assert quantize_rows(x, torch.int8).out.tolist() == [[64, -127, 25], [0, 0, 0]]  # 63.5 goes to the even
    given = quantize_rows(x, torch.float8_e4m3fn, torch.tensor([0.5]))
    assert given.out.tolist() == [[2.0, -4.0, 0.8125], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8193)}, "x: expected 1 to 8192 columns, got the shape (2, 8193)"),
        ({"x": torch.zeros(())}, "x: expected 1 to 8192 columns, got the shape ()"),
        ({"dtype": torch.float16}, "dtype: expected one of torch.float8_e4m3fn, torch.int8, got"),
        ({"dtype": None}, "dtype: expected one of torch.float8_e4m3fn, torch.int8, got None"),
        ({"scale": torch.ones(1).double()}, "scale: expected one float32"),
        ({"scale": torch.ones(1, device="meta")}, "scale: expected it on cpu as the rest, got meta"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError) as caught:
        quantize_rows(**{"x": torch.zeros(2, 8), "dtype": torch.int8, **change})
    assert message in str(caught.value)
