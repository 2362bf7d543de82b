"""What a plugin launches is what torch's launcher launches, at every batch and caption."""

from __future__ import annotations

import pytest
import torch

from kernels import attention, conv_fusion
from kernels.jit import DTYPES, Tiles, triton

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")
if triton is not None:
    from export.trt.plugins.programs import OUTPUTS, attend, fuse
    from kernels.tools.aot import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, SINGLE = torch.float16, torch.float32
SMALL = Tiles(block_m=16, block_n=16, warps=4, stages=1)
RATIO = {SINGLE: 1e-5, HALF: 5e-3}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def meta(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def agree(program, launch):
    """Grid, scalars and everything that is compiled in."""
    assert program.grid == launch.grid
    for name, value in program.launch.arguments.items():
        if not isinstance(value, torch.Tensor):
            assert program.scalars.get(name, value) == launch.arguments[name], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("keys", "columns", "heads"), [(257, 768, 12), (257, 128, 2), (256, 768, 8), (50, 96, 1)]
)
def test_attention_is_the_launchers(dtype, keys, columns, heads):
    for tiles in attention.schedules(50, keys, columns // heads, dtype):
        for batch in (1, 2, 7, 64, 256):
            for queries in (1, 2, 16, 49, 50, 63, 64, 65, 128):
                query, key = (
                    meta(batch, queries, columns, dtype=dtype),
                    meta(batch, keys, columns, dtype=dtype),
                )
                options = {"guided": True, "schedule": tiles}
                kernel = attention._attention_kernel
                launch = record(attention.launch, kernel, query, key, key, heads, **options)
                agree(attend(batch, queries, keys, columns, heads, dtype, tiles), launch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "width", "branches"), [(16, 768, 1), (16, 128, 2), (3, 50, 1)])
def test_fusion_is_the_launchers(dtype, grid, width, branches):
    for tiles in conv_fusion.schedules(width, dtype):
        for batch in (1, 2, 7, 64):
            image = meta(batch, 3, 16 * grid, 16 * grid, dtype=SINGLE)
            tokens, packed = meta(batch, 1 + grid**2, width), meta(branches, width, 5, 16, dtype=dtype)
            kernel = conv_fusion._fusion_kernel
            launch = record(conv_fusion.launch, kernel, image, tokens, packed, tiles)
            agree(fuse(batch, grid**2, width, branches, SINGLE, dtype, tiles), launch)


def test_arguments_are_inputs_scalars_and_outputs():
    """The rule of TensorRT's plugins, in the kernels' own order."""
    program = attend(1, 2, 17, 32, 2, HALF, SMALL)
    assert program.arguments == ("query", "key", "value", "n_queries", "query_batch", "out", "guide")
    assert (program.inputs, program.outputs) == (("query", "key", "value"), OUTPUTS)
    program = fuse(1, 4, 24, 1, SINGLE, HALF, SMALL)
    assert program.arguments == ("image", "tokens", "packed", "out")
    assert (program.inputs, program.outputs) == (("image", "tokens", "packed"), ("out",))


def run(program, tensors):
    """Launch the kernel as the program says, compiled constants and all; outputs start as NaN."""
    options = {k: v for k, v in program.launch.arguments.items() if not isinstance(v, torch.Tensor)}
    program.launch.kernel[program.grid](**options | program.scalars | tensors)


def apart(got, want):
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 7), (1, 33)])
def test_attention_is_right_where_the_extents_are_others(dtype, batch, queries):
    query = normal(batch, queries, 32).to(DEVICE, dtype)
    key, value = (normal(batch, 33, 32, seed=seed).to(DEVICE, dtype) for seed in (1, 2))
    out, guide = (
        torch.full_like(query, float("nan")),
        query.new_full((batch, queries, 33), float("nan"), dtype=SINGLE),
    )
    program = attend(batch, queries, 33, 32, 2, dtype, SMALL)
    run(program, {"query": query, "key": key, "value": value, "out": out, "guide": guide})
    want, wanted_map = attention.attention_ref(query.double(), key.double(), value.double(), 2)
    assert apart(out, want) <= RATIO[dtype]
    assert apart(guide, wanted_map) <= RATIO[dtype]


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_fusion_is_right_where_the_batch_is_another(dtype, batch):
    image, tokens = normal(batch, 3, 32, 32).to(DEVICE), normal(batch, 5, 24, seed=1).to(DEVICE, dtype)
    packed = (normal(1, 24, 5, 16, seed=2) / 10).to(DEVICE, dtype)
    packed[:, :, 1:, 15] = 0  # the bias stands in the first row
    out = torch.full_like(tokens, float("nan"))
    image = image.to(dtype)
    run(
        fuse(batch, 4, 24, 1, dtype, dtype, SMALL),
        {"image": image, "tokens": tokens, "packed": packed, "out": out},
    )
    weight, bias = unpacked(packed.double())
    want = conv_fusion.conv_fusion_ref(image.double(), tokens.double(), weight, bias)
    assert apart(out, want) <= RATIO[dtype]


def unpacked(packed):
    """The four 6x6 kernels of every channel and their bias, of one branch."""
    kernel = packed[0, :, :, :15].unflatten(2, (3, 5)).transpose(1, 2)
    pads = ((x, 1 - x, y, 1 - y) for y in (0, 1) for x in (0, 1))
    weight = torch.cat([torch.nn.functional.pad(kernel, pad) for pad in pads])
    return weight, packed[0, :, 0, 15].repeat(4)
