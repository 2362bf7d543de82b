"""What kernels get wrong where inputs are kind: strides, offsets past 2^31, NaN, other devices, no elements.

Every launcher is run as CALLS lists it, on a GPU or in the interpreter, against torch's form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import attention, conv_fusion, gaussian_guidance, gelu, latent_pool, quantize, residual_norm
from kernels import jit as module
from kernels.jit import GRID_LIMITS, launch_kernel, triton
from kernels.rows import launch_rows, quantize_ref, row_output

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
CODES = (torch.float8_e4m3fn, torch.int8)


def normal(*shape, seed=0):
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.float().to(DEVICE)


def mask(*rows):
    return torch.tensor(rows, device=DEVICE)


@dataclass(frozen=True)
class Call:
    """Operands by name; `launch` and `reference` take them and return an output or several."""

    operands: dict[str, torch.Tensor]
    launch: Callable
    reference: Callable


def fusion_operands():
    kernel, bias = normal(8, 3, 5, 5, seed=2) / 10, normal(8, seed=3)
    places = [torch.nn.functional.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    return {
        "image": normal(2, 3, 32, 32),
        "tokens": normal(2, 5, 8, seed=1),
        "weight": torch.cat(places),
        "bias": bias.repeat(4),
    }


def norm(x, residual, weight, bias, shift):
    return residual_norm.launch(
        residual_norm._norm_kernel, x, residual, weight, bias, EPS, shift, summed=True
    )[:2]


CALLS = {
    "attention": Call(
        {
            "query": normal(2, 5, 32),
            "key": normal(2, 19, 32, seed=1),
            "value": normal(2, 19, 32, seed=2),
            "mask": mask([1] * 12 + [0] * 7, [1, 0] * 9 + [1]),
        },
        lambda query, key, value, mask: attention.launch(
            attention._attention_kernel, query, key, value, 2, mask
        )[0],
        lambda query, key, value, mask: attention.attention_ref(query, key, value, 2, mask)[0],
    ),
    "biased attention": Call(
        {
            "query": normal(2, 5, 32),
            "key": normal(2, 17, 32, seed=1),
            "value": normal(2, 17, 32, seed=2),
            "mask": (torch.arange(170, device=DEVICE).view(2, 5, 17) % 3 > 0).long(),
            "bias": normal(4, 5, 17, seed=3),
        },
        lambda query, key, value, mask, bias: attention.launch(
            attention._attention_kernel, query, key, value, 4, mask, bias=bias
        )[0],
        lambda query, key, value, mask, bias: attention.attention_ref(query, key, value, 4, mask, bias)[0],
    ),
    "guided attention": Call(
        {"query": normal(2, 5, 32), "key": normal(2, 17, 32, seed=1), "value": normal(2, 17, 32, seed=2)},
        lambda query, key, value: attention.launch(
            attention._attention_kernel, query, key, value, 2, guided=True
        ),
        lambda query, key, value: attention.attention_ref(query, key, value, 2),
    ),
    "fusion": Call(
        fusion_operands(),
        lambda image, tokens, weight, bias: conv_fusion.launch(
            conv_fusion._fusion_kernel, image, tokens, conv_fusion.pack(weight, bias, tokens.shape[-1])
        ),
        conv_fusion.conv_fusion_ref,
    ),
    "guidance": Call(
        {"box": normal(2, 4).abs() / 3, "weight": normal(5, 1, 4, 4, seed=1), "bias": normal(5, seed=2)},
        lambda box, weight, bias: gaussian_guidance.launch(
            gaussian_guidance._guidance_kernel, box, weight, bias, 6
        ),
        lambda box, weight, bias: gaussian_guidance.gaussian_guidance_ref(box, weight, bias, 6),
    ),
    "pool": Call(
        {
            "tokens": normal(2, 20, 24),
            "weight": normal(24, seed=1),
            "bias": normal(24, seed=2),
            "query": normal(3, 24, seed=3) / 5,
        },
        lambda tokens, weight, bias, query: latent_pool.launch(
            latent_pool._pool_kernel, tokens, weight, bias, query
        ),
        latent_pool.latent_pool_ref,
    ),
    "norm": Call(
        {
            "x": normal(2, 5, 48),
            "residual": normal(2, 5, 48, seed=1),
            **{name: normal(48, seed=i) for i, name in enumerate(("weight", "bias", "shift"), start=2)},
        },
        norm,
        lambda x, residual, weight, bias, shift: residual_norm.residual_norm_ref(
            x, residual, weight, bias, EPS, shift
        ),
    ),
    "gelu": Call(
        {"x": normal(2, 5, 48), "bias": normal(48, seed=1)},
        lambda x, bias: gelu.launch(gelu._gelu_kernel, x, bias).out,
        gelu.gelu_ref,
    ),
    **{
        f"codes {dtype}": Call(
            {"x": normal(2, 5, 48)},
            lambda x, dtype=dtype: quantize.launch(quantize._quantize_kernel, x, dtype),
            lambda x, dtype=dtype: quantize_ref(x, dtype),
        )
        for dtype in CODES
    },
}
OPERANDS = [(name, operand) for name, call in CALLS.items() for operand in call.operands]
STRIDES = {
    "columns": lambda x: torch.stack([x, x.flip(0)], -1).flatten(-2)[..., ::2],
    "rows": lambda x: (
        torch.stack([x, x.flip(0)], 0)[0] if x.dim() < 2 else torch.cat([x, x], 1)[:, : x.shape[1]]
    ),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
EXPANDED = {"first": lambda x: x[:1].expand(x.shape), "last": lambda x: x[..., :1].expand(x.shape)}
# Not the convolution's, which has to be the same at four places, nor a token that is constant, whose norm is
# its rounding error divided by the root of eps.
EXPANDABLE = [
    (name, operand, form)
    for name, operand in OPERANDS
    for form in EXPANDED
    if (name, operand) not in (("fusion", "weight"), ("fusion", "bias"))
    and (name, operand, form) != ("pool", "tokens", "last")
]


def outputs(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


def agree(call, operands):
    """Equal to torch's form of dense operands: as near as float32 allows, codes by their values."""
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in operands.items()}
    pairs = zip(outputs(call.launch(**operands)), outputs(call.reference(**dense)), strict=True)
    for got, want in pairs:
        if got.dtype in CODES:  # a value halfway between two codes may go to either
            assert ((got.float() - want.float()).abs() <= want.float().abs() / 8 + 1).all()
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", STRIDES)
@pytest.mark.parametrize(("name", "operand"), OPERANDS)
def test_every_stride_of_every_operand_is_read(name, operand, form):
    call = CALLS[name]
    strided = STRIDES[form](call.operands[operand])
    assert torch.equal(strided, call.operands[operand])
    agree(call, {**call.operands, operand: strided})


@pytest.mark.parametrize(("name", "operand", "form"), EXPANDABLE)
def test_every_operand_may_be_expanded(name, operand, form):
    call = CALLS[name]
    agree(call, {**call.operands, operand: EXPANDED[form](call.operands[operand])})


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["attention", "biased attention"])
def test_a_mask_of_any_integer_type_and_stride(name, kind):
    call = CALLS[name]
    wide = torch.stack([call.operands["mask"], 1 - call.operands["mask"]], -1).flatten(-2).to(kind)
    agree(call, {**call.operands, "mask": wide[..., ::2]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(("name", "operand"), [pair for pair in OPERANDS if pair[1] != "mask"])
def test_what_is_not_finite_shows_where_torch_shows_it(name, operand, value):
    """A minimum or maximum that drops NaN would make a finite output of a broken activation."""
    call = CALLS[name]
    operands = {key: x.clone() for key, x in call.operands.items()}
    operands[operand].flatten()[1 if operand != "image" else 7 * 32 + 7] = value
    if name == "fusion" and operand in ("weight", "bias"):  # at its four places
        operands |= broken_kernels(value, operand)
    got, want = (outputs(run(**operands)) for run in (call.launch, call.reference))
    for x, y in zip(got, want, strict=True):
        if x.dtype == torch.int8:
            continue  # has no NaN: its scale shows it
        finite, expected = x.float().isfinite(), y.float().isfinite()
        assert not (finite & ~expected).any(), "a finite output where torch has none"
    if value != value:
        assert any(x.float().isnan().any() for x in got)


@pytest.mark.parametrize("masked", [None, (1,), (1, 3)], ids=str)
@pytest.mark.parametrize("keys", [7, 17, 32])
def test_scores_that_are_all_minus_infinity_show(keys, masked):
    """Only a row without a valid key is zeros; torch makes NaN of one whose valid keys all score -inf."""
    query, key, value = normal(1, 3, 16), normal(1, keys, 16, seed=1).abs(), normal(1, keys, 16, seed=2)
    query[0, 1, 3] = float("-inf")
    valid = None if masked is None else torch.ones(*masked, keys, dtype=torch.int64, device=DEVICE)
    got, _ = attention.launch(attention._attention_kernel, query, key, value, 1, valid)
    want, _ = attention.attention_ref(query, key, value, 1, valid)
    assert torch.equal(got.isnan(), want.isnan())
    assert got[0].isnan().all(1).tolist() == [False, True, False]


def broken_kernels(value, operand):
    kernel, bias = normal(8, 3, 5, 5, seed=2) / 10, normal(8, seed=3)
    (kernel if operand == "weight" else bias).flatten()[1] = value
    places = [torch.nn.functional.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    return {"weight": torch.cat(places), "bias": bias.repeat(4)}


def far_rows(rows, stride):
    """`rows` [N, D] in float16, `stride` elements apart: only they are touched of 4 GB of address space."""
    whole = torch.empty((len(rows) - 1) * stride + rows.shape[1], dtype=torch.float16, device=DEVICE)
    far = whole.as_strided(rows.shape, (stride, 1))
    return far.copy_(rows)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "name", ["attention", "pool", "norm", "gelu", *(f"codes {dtype}" for dtype in CODES)]
)
def test_rows_further_apart_than_int32_counts(name, batched):
    """The third row begins at element 2^31; with a batch of one, and in 2-D where the operator takes it."""
    call, width = CALLS[name], 32
    far = far_rows(normal(3, width).half(), 2**30)
    tensors = {"far": far[None] if batched or name in ("attention", "pool") else far}
    near = {"far": tensors["far"].contiguous()}
    vector = normal(width, seed=4).half()

    def run(launch, x):
        if name == "attention":
            return launch(x, x, x, torch.ones(1, 3, dtype=torch.int64, device=DEVICE))
        if name == "pool":
            return launch(x, vector, vector, vector[None])
        if name == "norm":
            return launch(x, x, vector, vector, vector)
        return launch(x, vector) if name == "gelu" else launch(x)

    for got, want in zip(
        outputs(run(call.launch, tensors["far"])), outputs(run(call.launch, near["far"])), strict=True
    ):
        assert torch.equal(got.float(), want.float())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    """In 2-D, so that all rows are of one batch; the last rows are those of a small tensor."""
    rows, width = 2**31 // 8192 + 3, 8192
    x = torch.zeros(rows, width, dtype=torch.float16, device=DEVICE)
    tail = normal(3, width).half()
    x[-3:] = tail
    vector = normal(width, seed=1)
    assert torch.equal(gelu.launch(gelu._gelu_kernel, x).out[-3:], gelu.launch(gelu._gelu_kernel, tail).out)
    got, want = (
        residual_norm.launch(residual_norm._norm_kernel, y, None, vector, vector, EPS).out[-3:]
        for y in (x, tail)
    )
    assert torch.equal(got, want)
    got, want = (quantize.launch(quantize._quantize_kernel, y, torch.int8) for y in (x, tail))
    assert torch.equal(got.out[-3:], want.out)
    assert torch.equal(got.scale[-3:], want.scale)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_grid_beyond_the_hardware_is_refused(axis):
    grid = [1, 1, 1]
    grid[axis] = GRID_LIMITS[axis] + 1
    message = f"grid: expected at most {GRID_LIMITS[axis]} programs along {'xyz'[axis]}, got {grid[axis]}"
    with pytest.raises(ValueError, match=message):
        launch_kernel({}, tuple(grid), torch.empty(0))


def test_more_images_than_programs_along_z_are_refused():
    meta = [torch.empty(65536, n, 32, device="meta") for n in (5, 7, 7)]
    with pytest.raises(ValueError, match="at most 65535 programs along z, got 65536: split the batch"):
        attention.launch({}, *meta, 2)


def test_more_rows_than_int32_counts_are_refused():
    x = torch.empty(2**31, 1, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=re.escape("x: expected less than 2^31 rows, got 2147483648")):
        launch_rows({}, x, row_output(x, None, None), None, False)


def test_images_larger_than_int32_counts_are_refused():
    side = 16 * 1700
    tensors = {
        "image": (1, 3, side, side),
        "tokens": (1, 1 + 1700**2, 768),
        "weight": (4 * 768, 3, 6, 6),
        "bias": (4 * 768,),
    }
    meta = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
    with pytest.raises(ValueError, match=r"less than 2\^31 elements each, got images of 27200 x 27200"):
        conv_fusion.conv_fusion(**meta)


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_is_on_the_gpu_of_its_tensors(name, monkeypatch):
    """Doubles of torch.cuda.device and of a kernel: tensors of a second GPU, without data."""
    current, launched = ["cuda:0"], []

    @contextmanager
    def device(place):
        current.append(str(place))
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append(current[-1])

    kernels = {
        attention: "_attention_kernel",
        conv_fusion: "_fusion_kernel",
        gaussian_guidance: "_guidance_kernel",
        gelu: "_gelu_kernel",
        latent_pool: "_pool_kernel",
        quantize: "_quantize_kernel",
        residual_norm: "_norm_kernel",
    }
    for place, kernel in kernels.items():
        monkeypatch.setattr(place, kernel, Kernel())
    call = CALLS[name]
    packed = conv_fusion.pack(call.operands["weight"], call.operands["bias"], 8) if name == "fusion" else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(conv_fusion, "pack", lambda *_: torch.empty_like(packed, device="cuda:1"))
        operands = {
            key: torch.empty(x.shape, dtype=x.dtype, device="cuda:1") for key, x in call.operands.items()
        }
        monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(module.torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        call.launch(**operands)
    assert launched == ["cuda:1"]
    assert current == ["cuda:0"]


def test_no_keys_give_zeros_and_an_empty_map():
    query, key = normal(2, 5, 32), torch.empty(2, 0, 32, device=DEVICE)
    out, guide = attention.launch(attention._attention_kernel, query, key, key, 2, guided=True)
    assert not out.any()
    assert guide.shape == (2, 5, 0)


EMPTY = [
    (name, operand)
    for name, operand in OPERANDS
    if operand in ("query", "x", "tokens", "box") and name != "pool"
]


@pytest.mark.parametrize(("name", "operand"), EMPTY)
def test_an_empty_batch_has_an_empty_output(name, operand):
    call = CALLS[name]
    batch = len(call.operands[operand])
    operands = {key: x[:0] if len(x) == batch and x.dim() > 1 else x for key, x in call.operands.items()}
    assert all(len(x) == 0 for x in outputs(call.launch(**operands)))


def test_no_patches_pool_to_zeros():
    call = CALLS["pool"]
    for tokens in (torch.empty(0, 5, 24, device=DEVICE), torch.empty(2, 0, 24, device=DEVICE)):
        operands = {**call.operands, "tokens": tokens}
        assert torch.equal(call.launch(**operands), call.reference(**operands))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mean", [0, 5, 10])
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])], ids=str)
def test_pooling_does_not_lose_accuracy_far_from_zero(mean, shared, dtype):
    """What the norm subtracts is summed from the rounded factors: the error at means of 10 is that at 0.

    Softmax forgives an error of the scores that all tokens share; that of the weights shows with few of them.
    """
    patches = 3 if shared else 64
    means = mean * (1 if shared else normal(4, patches, 1, seed=4))
    tokens, query = normal(4, patches, 192) + means, 3 * normal(12, 192, seed=3) / 192**0.5
    vectors = [1 + normal(192, seed=i) / 10 for i in (1, 2)]
    operands = (tokens.to(dtype), *vectors, query)
    got = latent_pool.launch(latent_pool._pool_kernel, *operands)
    want = latent_pool.latent_pool_ref(*(x.double() for x in operands))
    plain = latent_pool.latent_pool_ref(*(x.to(dtype) for x in operands))
    error, torchs = ((x.double() - want).norm() / want.norm() for x in (got, plain))
    assert error <= 2 * torchs
    assert error <= 2 * torch.finfo(dtype).eps


def test_other_kernels_at_the_four_places_are_refused():
    operands = CALLS["fusion"].operands
    for name in ("weight", "bias"):
        broken = {**operands, name: operands[name].clone()}
        broken[name].flatten()[-1] += 1
        with pytest.raises(
            ValueError, match="expected the same 5x5 kernel and bias at four places, got others at 3"
        ):
            conv_fusion.pack(broken["weight"], broken["bias"], 8)
