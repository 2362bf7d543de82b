"""The row kernels' eight-bit codes, strides and types against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels import gelu, quantize, residual_norm
from kernels.jit import triton
from kernels.rows import TOPS

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODES = [torch.float8_e4m3fn, torch.int8]
SHAPES = [(2, 7, 768), (3, 5, 50), (1, 2, 3, 577), (2, 4096)]
EPS = 1e-5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x, dtype, scale):
    """The kernel's codes and scale, and the float64 answer; float32 parameters beside x of any type."""
    residual = normal(*x.shape, seed=5).to(x)
    vectors = [normal(x.shape[-1], seed=i).float().to(DEVICE) for i in range(3)]
    kernel = residual_norm._norm_kernel
    found = residual_norm.launch(kernel, x, residual, *vectors[:2], EPS, vectors[2], dtype, scale)
    exact = [y.double() for y in (x, residual, *vectors)]
    return found.out, found.scale, residual_norm.residual_norm_ref(*exact[:4], EPS, exact[4])[0]


def activate(x, dtype, scale, biased=True):
    bias = normal(x.shape[-1], seed=1).float().to(DEVICE) * biased
    out, found = gelu.launch(gelu._gelu_kernel, x, bias, dtype, scale)
    return out, found, gelu.gelu_ref(x.double(), bias.double())


def plain(x, dtype, scale):
    out, found = quantize.launch(quantize._quantize_kernel, x, dtype, scale)
    return out, found, x.double()


def half_steps(scaled, dtype):
    """Half the distance of the codes around values."""
    if dtype == torch.int8:
        return torch.full_like(scaled, 0.5)
    binade = scaled.abs().clamp(min=2.0**-6).log2().floor()  # a code has 3 bits of fraction
    return 2.0 ** (binade - 4)


def nearest(codes, scale, want, dtype):
    """Whether every code is the nearest to its value, saturated."""
    scaled = want / (scale.double()[..., None] if scale.dim() > 0 and scale.numel() > 1 else scale.double())
    low = -128 if dtype == torch.int8 else -TOPS[dtype]
    scaled = scaled.clamp(low, TOPS[dtype])
    return ((codes.double() - scaled).abs() <= half_steps(scaled, dtype) + 1e-4 * scaled.abs() + 5e-5).all()


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", [norm, activate, plain])
def test_codes_are_the_nearest(run, shape, kind, dtype, given, fenced):
    x = (2 * normal(*shape)).to(DEVICE, kind)
    copy = x.clone()
    # The given scale is a third of what the largest value needs, so both ends saturate.
    scale = torch.full((1,), 1.5 / TOPS[dtype], device=DEVICE) if given else None
    codes, found, want = run(x, dtype, scale)
    fenced()
    assert torch.equal(x, copy)
    assert (codes.shape, codes.dtype) == (want.shape, dtype)
    if given:
        assert found is scale
        assert codes.double().max() == TOPS[dtype]
    else:
        assert found.shape == shape[:-1]
        assert torch.allclose(found.double(), want.abs().amax(-1) / TOPS[dtype], rtol=1e-4, atol=0)
        assert (codes.double().abs().amax(-1) == TOPS[dtype]).all()
    assert nearest(codes, found, want, dtype)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_three_runs_are_bit_equal(dtype):
    x = normal(3, 5, 197).to(DEVICE, torch.float16)
    runs = [run(x, dtype, None)[:2] for run in (norm, activate, plain) for _ in range(3)]
    for first, *others in (runs[:3], runs[3:6], runs[6:]):
        for other in others:
            assert torch.equal(first[0].view(torch.uint8), other[0].view(torch.uint8))
            assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("run", [norm, activate, plain])
def test_a_nan_stays_in_its_row_and_shows(run, dtype):
    x = normal(4, 50).float().to(DEVICE)
    x[2, 7] = float("nan")
    codes, scale, _ = run(x, dtype, None)
    assert scale.isnan().tolist() == [False, False, True, False]
    if dtype == torch.float8_e4m3fn:
        assert codes.float().isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_row_of_zeros_has_a_finite_scale(dtype):
    x = torch.zeros(2, 50, device=DEVICE)
    for codes, scale, _ in (plain(x, dtype, None), activate(x, dtype, None, biased=False)):
        assert not codes.float().any()
        assert (scale == 2.0**-64 / TOPS[dtype]).all()


FORMS = {
    "rows": lambda x: x[:, 1:],
    "batch": lambda x: x[::2],
    "columns": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "grid": lambda x: x.unflatten(1, (3, 5))[:, :, 1:],
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_read_by_strides(form):
    x, residual = (FORMS[form](normal(4, 15, 96, seed=i).float().to(DEVICE)) for i in range(2))
    weight, bias = (normal(x.shape[-1], seed=i).float().to(DEVICE) for i in (2, 3))
    exact = [y.double() for y in (x, residual, weight, bias)]
    want = residual_norm.residual_norm_ref(*exact, EPS)
    for other in (residual, residual.contiguous()):
        found = residual_norm.launch(residual_norm._norm_kernel, x, other, weight, bias, EPS, summed=True)
        assert (found.out - want[0]).abs().max() <= 1e-5
        assert (found.total - want[1]).abs().max() <= 1e-6
    codes, scale, exact = plain(x, torch.int8, None)
    assert nearest(codes, scale, exact, torch.int8)
    out, _ = gelu.launch(gelu._gelu_kernel, x, weight)
    assert (out - gelu.gelu_ref(*(y.double() for y in (x, weight)))).abs().max() <= 1e-6


def test_norm_without_a_residual():
    x = normal(7, 70).float().to(DEVICE)
    weight, bias = (normal(70, seed=i).float().to(DEVICE) for i in (1, 2))
    found = residual_norm.launch(residual_norm._norm_kernel, x, None, weight, bias, EPS)
    want, _ = residual_norm.residual_norm_ref(x.double(), None, weight.double(), bias.double(), EPS)
    assert (found.out - want).abs().max() <= 1e-5
    assert (found.total, found.scale) == (None, None)


def test_an_empty_batch():
    x, vector = torch.empty(0, 5, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    found = residual_norm.launch(
        residual_norm._norm_kernel, x, x, vector, vector, EPS, dtype=torch.int8, summed=True
    )
    assert [y.shape for y in found] == [(0, 5, 32), (0, 5, 32), (0, 5)]
    assert gelu.launch(gelu._gelu_kernel, x).out.shape == (0, 5, 32)
    assert [y.shape for y in plain(x, torch.int8, None)[:2]] == [(0, 5, 32), (0, 5)]


def test_every_float16_through_gelu():
    """Half precision takes a fitted tail: nearest to the exact answer, or its neighbour."""
    x = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(torch.float16).view(-1, 4096)
    got = gelu.launch(gelu._gelu_kernel, x).out
    exact = x.double() * torch.special.ndtr(x.double())
    finite = x.isfinite()
    want = exact[finite]
    step = 2.0 ** (want.abs().clamp(min=2.0**-14).log2().floor() - 10)
    assert ((got[finite].double() - want).abs() <= 0.6 * step).all()
    assert torch.equal(got[x.isnan()].isnan(), torch.ones_like(got[x.isnan()], dtype=torch.bool))
    assert got[x.isposinf()].tolist() == [float("inf")]
    assert got[x.isneginf()].tolist() == [0.0]
