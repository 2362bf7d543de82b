"""GELU against the error function of Python's own library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.gelu import gelu

EXACT = 1e-12


def formula(x, bias=0.0):
    values = np.asarray(x, np.float64) + np.asarray(bias, np.float64)
    return np.vectorize(lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)))(values)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 50, 96), (2, 2, 3, 197)])
def test_is_the_formula(normal, shape):
    x, bias = 3 * normal(*shape), normal(shape[-1], seed=1)
    assert np.abs(gelu(x).out.numpy() - formula(x)).max() <= EXACT
    found = gelu(x, bias)
    assert np.abs(found.out.numpy() - formula(x, bias)).max() <= EXACT
    assert found.scale is None


def test_it_is_no_approximation_by_tanh():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    want = [-0.004049694, -0.158655254, 0.0, 0.841344746, 2.995950306]
    assert (gelu(x).out - torch.tensor(want, dtype=torch.float64)).abs().max() <= 1e-9


def test_quick_form_is_clips():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    assert (
        np.abs(gelu(x, quick=True).out.numpy() - [v / (1 + math.exp(-1.702 * v)) for v in x]).max() <= EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_a_float32_bias(normal, no_worse, dtype):
    x, bias = normal(4, 96).to(dtype), normal(96, seed=1).float()
    found = gelu(x, bias).out
    assert found.dtype == dtype
    no_worse(found, torch.nn.functional.gelu(x + bias.to(dtype)), formula(x.double(), bias), dtype)


@pytest.mark.parametrize(("dtype", "top"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_codes(normal, dtype, top):
    x, bias = 3 * normal(5, 96), normal(96, seed=1)
    want = formula(x, bias)
    found = gelu(x, bias, dtype=dtype)
    assert (found.out.dtype, found.scale.shape) == (dtype, (5,))
    assert np.allclose(found.scale.numpy(), want.max(-1) / top, rtol=1e-6)
    back = found.out.double().numpy() * found.scale.numpy()[:, None]
    half_step = 0.5 * found.scale.numpy()[:, None]
    if dtype == torch.float8_e4m3fn:
        half_step = np.maximum(np.abs(want) / 16, half_step * 2**-9)
    assert (np.abs(back - want) <= 1.001 * half_step).all()
    scale = torch.tensor(0.01)
    given = gelu(x, bias, dtype=dtype, scale=scale)
    assert given.scale is scale
    assert given.out.double().max() == top


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8193)}, "x: expected 1 to 8192 columns, got the shape (2, 8193)"),
        ({"bias": torch.zeros(1)}, "bias: expected the shape (8,), got (1,)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: expected it on cpu as the rest, got meta"),
        ({"dtype": torch.float16}, "dtype: expected one of torch.float8_e4m3fn, torch.int8, got"),
        ({"scale": torch.ones(1).double()}, "scale: expected one float32"),
        ({"scale": torch.ones(1, device="meta")}, "scale: expected it on cpu as the rest, got meta"),
        ({"dtype": None, "scale": torch.ones(1)}, "scale: expected a dtype of codes beside it"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    given = {"x": torch.zeros(2, 8), "bias": torch.zeros(8), "dtype": torch.int8, **change}
    with pytest.raises(ValueError) as caught:
        gelu(**given)
    assert message in str(caught.value)
