"""The Triton kernels against float64: compiled where there is a GPU, in Triton's interpreter elsewhere.

A kernel may err twice as much as torch in the same type, at most and in RMS. Outputs start as NaN between
sentinel values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from kernels import attention, conv_fusion, gaussian_guidance, gelu, latent_pool, residual_norm
from kernels.jit import Tiles, triton

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # which the interpreter multiplies wrongly (Triton 3.9)


@dataclass(frozen=True)
class Case:
    """Float64 inputs; `launch` runs the kernel, `reference` is torch's form in the type of its inputs."""

    inputs: tuple[torch.Tensor, ...]
    launch: Callable
    reference: Callable


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths(batch, keys, *valid):
    return (torch.arange(keys)[None] < torch.tensor(valid)[:, None]).to(torch.int64).expand(batch, keys)


def neighbours(batch, queries, keys):
    """Every fifth pair, and none for the first query."""
    mask = torch.arange(batch * queries * keys).view(batch, queries, keys) % 5 == 0
    return mask & (torch.arange(queries) > 0)[:, None]


def attend(batch, heads, queries, keys, width, mask=None, guided=False, schedule=None, biased=False):
    kernel = attention._attention_kernel
    mask = None if mask is None else mask.to(DEVICE)

    def launch(query, key, value, bias=None):
        found = attention.launch(kernel, query, key, value, heads, mask, guided, schedule, bias)
        return found if guided else found[:1]

    def reference(query, key, value, bias=None):
        return attention.attention_ref(query, key, value, heads, mask, bias)[: 2 if guided else 1]

    shapes = [(batch, n, heads * width) for n in (queries, keys, keys)] + [(heads, queries, keys)] * biased
    return Case(tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes)), launch, reference)


def fuse(batch, grid, width, branches=1, schedule=None):
    """Each branch one 5x5 kernel and one bias at the four places."""
    image, tokens = normal(batch, 3, 16 * grid, 16 * grid), normal(batch, 1 + grid**2, width, seed=1)
    kernels, bias = normal(branches, width, 3, 5, 5, seed=2) / 10, normal(branches, 1, width, seed=3)
    placed = [F.pad(kernels, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    weight, bias = torch.stack(placed, 1).flatten(0, 2), bias.expand(-1, 4, -1).flatten()
    return Case(
        (image, tokens, weight, bias),
        lambda image, tokens, *kernels: (
            conv_fusion.launch(
                conv_fusion._fusion_kernel,
                image,
                tokens,
                conv_fusion.pack(*kernels, tokens.shape[-1]),
                schedule,
            ),
        ),
        lambda *tensors: (conv_fusion.conv_fusion_ref(*tensors),),
    )


def guide(boxes, channels, size):
    weight, bias = normal(channels, 1, 4, 4), normal(channels, seed=1)
    kernel = gaussian_guidance._guidance_kernel
    return Case(
        (torch.tensor(boxes, dtype=torch.float64), weight, bias),
        lambda *tensors: (gaussian_guidance.launch(kernel, *tensors, size),),
        lambda *tensors: (gaussian_guidance.gaussian_guidance_ref(*tensors, size),),
    )


def pool(batch, tokens, heads, width, mask=None):
    query = normal(heads, width, seed=3) / width**0.5
    mask = None if mask is None else mask.to(DEVICE)
    return Case(
        (normal(batch, tokens, width) + 0.5, normal(width, seed=1), normal(width, seed=2), query),
        lambda *tensors: (latent_pool.launch(latent_pool._pool_kernel, *tensors, mask),),
        lambda *tensors: (latent_pool.latent_pool_ref(*tensors, mask),),
    )


def norm(*shape, shifted=True, summed=True, eps=1e-6):
    """Rows far from zero, so that a one-pass variance would show."""
    vectors = [normal(shape[-1], seed=i) for i in range(3)]
    inputs = (normal(*shape) + 3, normal(*shape, seed=7), *vectors[: 3 if shifted else 2])

    def launch(x, residual, weight, bias, *shift):
        kernel = residual_norm._norm_kernel
        found = residual_norm.launch(kernel, x, residual, weight, bias, eps, *shift, summed=summed)
        return found[: 2 if summed else 1]

    def reference(x, residual, weight, bias, *shift):
        return residual_norm.residual_norm_ref(x, residual, weight, bias, eps, *shift)[: 2 if summed else 1]

    return Case(inputs, launch, reference)


def activate(*shape, biased=True, quick=False):
    inputs = (3 * normal(*shape), normal(shape[-1], seed=1))[: 2 if biased else 1]
    return Case(
        inputs,
        lambda *tensors: gelu.launch(gelu._gelu_kernel, *tensors, quick=quick)[:1],
        lambda *tensors: (gelu.gelu_ref(*tensors, quick=quick),),
    )


BOXES = [[0.5, 0.4, 0.3, 0.2], [0.1, 0.9, 0.05, 0.5], [0.0, 0.0, 0.0, 0.0]]
CASES = {
    "attention-one-of-all": attend(1, 1, 1, 1, 1),
    "attention-odd-head": attend(2, 3, 7, 50, 24),
    "attention-text-over-picture": attend(2, 2, 50, 257, 64),
    "attention-picture-over-text": attend(3, 2, 63, 50, 16, lengths(3, 50, 50, 17, 0)),
    "attention-whole-blocks": attend(1, 2, 17, 64, 16),
    "attention-three-parts": attend(1, 2, 33, 70, 96, lengths(1, 70, 69)),
    "attention-holes": attend(2, 1, 5, 40, 16, (torch.arange(80).view(2, 40) % 3 == 0).int()),
    "attention-bias": attend(2, 3, 20, 65, 16, biased=True),
    "attention-bias-whole-blocks": attend(2, 1, 17, 64, 16, biased=True),
    "attention-bias-and-mask": attend(3, 2, 5, 50, 16, lengths(3, 50, 50, 17, 0), biased=True),
    "attention-pairs": attend(2, 2, 33, 70, 16, neighbours(2, 33, 70)),
    "attention-pairs-of-one-row": attend(2, 2, 5, 40, 16, neighbours(2, 2, 40)[:, 1:].expand(2, 5, 40)),
    "attention-pairs-three-wide-parts": attend(1, 2, 17, 33, 192, neighbours(1, 17, 33), biased=True),
    "attention-map": attend(2, 3, 20, 65, 16, guided=True),
    "attention-map-three-parts": attend(1, 2, 17, 33, 96, guided=True),
    "attention-large-tiles": attend(1, 1, 70, 129, 32, schedule=Tiles(64, 128, 8, 3)),
    "fusion": fuse(2, 2, 24),
    "fusion-odd-grid": fuse(1, 3, 7),
    "fusion-many-tiles": fuse(1, 10, 70),
    "fusion-two-branches": fuse(1, 2, 16, branches=2),
    "guidance": guide(BOXES, 5, 16),
    "guidance-odd-side": guide(BOXES[:1], 70, 10),
    "pool": pool(2, 37, 3, 24),
    "pool-three-parts": pool(1, 20, 2, 96),
    "pool-one": pool(1, 1, 1, 16),
    "pool-tiny": pool(2, 64, 2, 128),
    "pool-masked": pool(3, 37, 3, 24, lengths(3, 37, 37, 18, 1)),
    "pool-holes": pool(2, 40, 2, 24, (torch.arange(80).view(2, 40) % 20 == 19).int()),
    "norm": norm(2, 7, 768),
    "norm-tiny": norm(2, 50, 128, eps=1e-12),
    "norm-post": norm(3, 5, 96, shifted=False, summed=False),
    "norm-one-column": norm(3, 1),
    "norm-odd": norm(2, 3, 577),
    "norm-wide": norm(1, 3, 4096, shifted=False),
    "norm-widest": norm(1, 2, 8191),
    "gelu": activate(2, 7, 3072),
    "gelu-plain": activate(3, 50, biased=False),
    "gelu-odd": activate(1, 2, 3, 197),
    "gelu-widest": activate(3, 8192),
    "gelu-quick": activate(2, 7, 3072, quick=True),
    "gelu-quick-plain": activate(3, 50, biased=False, quick=True),
}
if DEVICE == "cuda":
    CASES |= {
        "attention-base-map": attend(64, 12, 50, 257, 64, guided=True),
        "attention-base": attend(64, 12, 257, 257, 64),
        "attention-base-d96": attend(16, 8, 257, 257, 96),
        "attention-base-bias": attend(64, 12, 257, 257, 64, biased=True),
        "attention-base-pairs": attend(64, 4, 256, 256, 192, neighbours(64, 256, 256)),
        "attention-long": attend(2, 16, 577, 577, 64),
        "attention-base-text": attend(64, 12, 257, 50, 64, lengths(64, 50, *range(64)).clamp(max=1)),
        "fusion-base": fuse(64, 16, 768),
        "guidance-base": guide(BOXES * 20, 64, 256),
        "pool-base": pool(64, 256, 12, 768),
        "norm-base": norm(64, 257, 768),
        "gelu-base": activate(64, 257, 3072),
    }


for i, schedule in enumerate(attention.schedules(20, 65, 16, torch.float16)):
    CASES[f"attention-candidate-{i}"] = attend(1, 2, 20, 65, 16, guided=True, schedule=schedule)
for i, schedule in enumerate(conv_fusion.schedules(24, torch.float16)):
    CASES[f"fusion-candidate-{i}"] = fuse(1, 3, 24, schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_close_to_float64(name, dtype, fenced, no_worse):
    case = CASES[name]
    tensors = [x.to(DEVICE, dtype) for x in case.inputs]
    copies = [x.clone() for x in tensors]
    found = case.launch(*tensors)
    fenced()
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True)), "an input was changed"
    exact = case.reference(*(x.double() for x in tensors))
    plain = case.reference(*tensors)
    for got, torchs, want in zip(found, plain, exact, strict=True):
        no_worse(got, torchs, want, dtype)


@pytest.mark.parametrize(
    "name",
    ["attention-map", "attention-picture-over-text", "attention-pairs", "fusion", "pool", "norm", "gelu"],
)
def test_three_runs_are_bit_equal(name):
    tensors = [x.to(DEVICE, torch.float16) for x in CASES[name].inputs]
    runs = [CASES[name].launch(*tensors) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def test_a_row_without_a_valid_key_is_zero():
    case = CASES["attention-picture-over-text"]
    (out,) = case.launch(*(x.to(DEVICE, torch.float32) for x in case.inputs))
    assert not out[2].any()
    assert out[:2].all()


def test_a_pool_without_a_valid_token_is_zero():
    case = pool(2, 20, 2, 24, lengths(2, 20, 20, 0))
    (out,) = case.launch(*(x.to(DEVICE, torch.float32) for x in case.inputs))
    assert not out[1].any()
    assert out[0].all()


def test_a_query_without_a_valid_key_is_zero():
    case = CASES["attention-pairs"]
    (out,) = case.launch(*(x.to(DEVICE, torch.float32) for x in case.inputs))
    assert not out[:, 0].any()
    assert out[:, 1:].all()


@pytest.mark.parametrize("form", ["packed", "expanded", "strided", "reversed"])
def test_attention_reads_by_strides(form):
    """Columns of one product, one query for all, every other row, and a last axis that is not dense."""
    packed = normal(3, 18, 3 * 32).float().to(DEVICE)
    parts = packed.chunk(3, dim=-1)
    if form == "expanded":
        parts = (parts[0][:1].expand(3, -1, -1), *parts[1:])
    if form == "strided":
        parts = tuple(x[:, ::2] for x in parts)
    if form == "reversed":
        parts = tuple(x.flip(-1).transpose(0, 1).contiguous().transpose(0, 1) for x in parts)
    got, _ = attention.launch(attention._attention_kernel, *parts, 2)
    want, _ = attention.attention_ref(*(x.double() for x in parts), 2)
    assert (got - want).abs().max() <= 1e-6


@pytest.mark.parametrize("form", ["rows", "batch", "columns"])
def test_pooling_reads_by_strides(form):
    tokens = normal(4, 38, 48).float().to(DEVICE)
    tokens = {"rows": tokens[:, 1:], "batch": tokens[::2], "columns": tokens[..., ::2]}[form]
    rest = [normal(*shape, seed=i).float().to(DEVICE) for i, shape in enumerate([(tokens.shape[-1],)] * 2)]
    query = normal(3, tokens.shape[-1], seed=5).float().to(DEVICE) / 5
    got = latent_pool.launch(latent_pool._pool_kernel, tokens, *rest, query)
    want = latent_pool.latent_pool_ref(*(x.double() for x in (tokens, *rest, query)))
    assert (got - want).abs().max() <= 1e-5


def test_an_empty_batch():
    empty = torch.empty(0, 5, 32, device=DEVICE)
    out, guide = attention.launch(attention._attention_kernel, empty, empty, empty, 2, guided=True)
    assert (out.shape, guide.shape) == ((0, 5, 32), (0, 5, 5))
