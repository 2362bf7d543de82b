"""Residual sum and LayerNorm against the formula, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.residual_norm import residual_norm, residual_norm_ref

EXACT = 1e-10
EPS = 1e-6


def formula(x, residual, weight, bias, eps=EPS, shift=0.0):
    total = np.asarray(x, np.float64) + np.asarray(residual, np.float64) + np.asarray(shift, np.float64)
    out = np.empty_like(total)
    for index in np.ndindex(total.shape[:-1]):
        row = total[index]
        centred = row - row.sum() / len(row)
        deviation = ((centred @ centred) / len(row) + eps) ** 0.5
        out[index] = centred / deviation * np.asarray(weight) + np.asarray(bias)
    return out, total


@pytest.fixture
def drawn(normal):
    """x, residual, weight, bias and shift; rows far from zero."""

    def make(*shape, dtype=torch.float64):
        x, residual = (3 + normal(*shape, seed=i, dtype=dtype) for i in (1, 2))
        return x, residual, *(normal(shape[-1], seed=i, dtype=dtype) for i in (3, 4, 5))

    return make


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 50, 128), (2, 3, 2, 97), (768,)])
def test_is_the_formula(drawn, shape):
    x, residual, weight, bias, shift = drawn(*shape)
    found = residual_norm(x, residual, weight, bias, EPS, shift=shift, summed=True)
    want, total = formula(x, residual, weight, bias, shift=shift)
    assert np.abs(found.out.numpy() - want).max() <= EXACT
    assert np.abs(found.total.numpy() - total).max() <= EXACT
    assert found.scale is None
    plain = residual_norm(x, None, weight, bias, EPS)
    assert np.abs(plain.out.numpy() - formula(x, 0 * x, weight, bias)[0]).max() <= EXACT
    assert plain.total is None


def test_by_hand():
    """Rows (1, 2, 3) and constant: the norm of the first is -+sqrt(3/2); eps keeps the second finite."""
    x = torch.tensor([[0.0, 1.0, 2.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    weight, bias = torch.tensor([1.0, 1.0, 2.0]).double(), torch.tensor([0.0, 5.0, 0.0]).double()
    out = residual_norm(x, torch.ones_like(x), weight, bias, 1e-12).out
    want = torch.tensor([[-(1.5**0.5), 5.0, 2 * 1.5**0.5], [0.0, 5.0, 0.0]], dtype=torch.float64)
    assert (out - want).abs().max() <= 1e-9


def test_eps_is_of_the_variance(drawn):
    x, _, weight, bias, _ = drawn(4, 64)
    want, _ = formula(1e-3 * x, 0 * x, weight, bias, eps=1e-5)
    assert np.abs(residual_norm(1e-3 * x, None, weight, bias, 1e-5).out.numpy() - want).max() <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_float32_parameters(drawn, no_worse, dtype):
    x, residual, *vectors = drawn(2, 50, 96)
    x, residual = x.to(dtype), residual.to(dtype)
    vectors = [y.float() for y in vectors]
    found = residual_norm(x, residual, *vectors[:2], EPS, shift=vectors[2], summed=True)
    assert (found.out.dtype, found.total.dtype) == (dtype, dtype)
    want, total = formula(*(y.double() for y in (x, residual, *vectors[:2])), shift=vectors[2].double())
    plain = residual_norm_ref(x, residual, *vectors[:2], EPS, vectors[2])
    no_worse(found.out, plain[0].to(dtype), want, dtype)
    no_worse(found.total, plain[1], total, dtype)


@pytest.mark.parametrize(("dtype", "top"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_codes(drawn, dtype, top):
    """A row's own scale takes its largest to the last code; steps are 1, or a 16th for E4M3."""
    x, residual, weight, bias, _ = drawn(2, 5, 96)
    want, total = formula(x, residual, weight, bias)
    found = residual_norm(x, residual, weight, bias, EPS, dtype=dtype, summed=True)
    assert (found.out.dtype, found.scale.shape, found.scale.dtype) == (dtype, (2, 5), torch.float32)
    assert np.allclose(found.scale.numpy(), np.abs(want).max(-1) / top, rtol=1e-6)
    assert np.abs(found.total.numpy() - total).max() <= EXACT
    back = found.out.double().numpy() * found.scale.numpy()[..., None]
    half_step = 0.5 * found.scale.numpy()[..., None]
    if dtype == torch.float8_e4m3fn:
        half_step = np.maximum(np.abs(want) / 16, half_step * 2**-9)
    assert (np.abs(back - want) <= 1.001 * half_step).all()
    scale = torch.tensor([0.01])
    given = residual_norm(x, residual, weight, bias, EPS, dtype=dtype, scale=scale)
    assert given.scale is scale
    back = given.out.double().numpy() * 0.01
    inside = np.clip(want, (-128 if dtype == torch.int8 else -top) * 0.01, top * 0.01)
    assert np.abs(back - inside).max() <= (0.0051 if dtype == torch.int8 else 0.163)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0)}, "x: expected 1 to 8192 columns, got the shape (2, 0)"),
        ({"x": torch.tensor(1.0)}, "x: expected 1 to 8192 columns, got the shape ()"),
        ({"residual": torch.zeros(3, 8)}, "residual: expected the shape (2, 8), got (3, 8)"),
        (
            {"residual": torch.zeros(2, 8).half()},
            "residual: expected torch.float32 as the rest, got torch.float16",
        ),
        ({"weight": torch.zeros(7)}, "weight: expected the shape (8,), got (7,)"),
        ({"shift": torch.zeros(2, 8)}, "shift: expected the shape (8,), got (2, 8)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: expected it on cpu as the rest, got meta"),
        ({"dtype": torch.uint8}, "dtype: expected one of torch.float8_e4m3fn, torch.int8, got torch.uint8"),
        ({"scale": torch.ones(2)}, "scale: expected one float32"),
        ({"dtype": None}, "scale: expected a dtype of codes beside it"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    given = {"x": torch.zeros(2, 8), "residual": None, "weight": torch.zeros(8), "bias": torch.zeros(8)}
    given |= {"eps": EPS, "dtype": torch.int8, "scale": torch.ones(1), **change}
    with pytest.raises((TypeError, ValueError)) as caught:
        residual_norm(**given)
    assert message in str(caught.value)
