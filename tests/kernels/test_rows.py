"""How rows lie on the lanes, and the integers that make E4M3 codes, against torch's own conversion."""

from __future__ import annotations

import pytest
import torch

from kernels.jit import jit, tl, triton
from kernels.rows import CODES, MAX_WIDTH, as_rows, encode, quantize_ref, row_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 4096


@jit
def _encode_kernel(values, out, CODES: tl.constexpr, BLOCK: tl.constexpr):
    o_value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o_value, encode(tl.load(values + o_value), CODES, False))


def encoded(values, dtype):
    values = torch.nn.functional.pad(values.float(), (0, -len(values) % COUNT)).to(DEVICE)
    out = torch.empty(len(values), dtype=torch.uint8, device=DEVICE)
    _encode_kernel[(len(values) // COUNT,)](values, out, CODES=CODES[dtype], BLOCK=COUNT)
    return out.view(dtype).cpu()


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_e4m3_by_integers_is_the_conversion():
    """All codes, all ties between them, both neighbours of those, and what lies outside."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].unique()
    ties = (finite[1:] + finite[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    values = torch.cat(
        [finite, ties, ties.nextafter(infinity), ties.nextafter(-infinity), torch.randn(5000) * 40]
    )
    got = encoded(values, torch.float8_e4m3fn)[: len(values)]
    assert torch.equal(got.view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8))
    outside = torch.tensor([448.1, 464.0, 1e9, float("inf"), -1e30, -float("inf"), float("nan")])
    found = encoded(outside, torch.float8_e4m3fn)[:7].float().tolist()
    assert found[:6] == [448.0] * 4 + [-448.0] * 2
    assert found[6] != found[6]


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_int8_rounds_to_even_and_saturates():
    values = torch.tensor([0.5, 1.5, -0.5, -1.5, 126.5, 127.5, 1e9, -127.5, -128.6, -1e30, 0.49999997, 3.7])
    got = encoded(values, torch.int8)[: len(values)]
    assert got.tolist() == [0, 2, 0, -2, 126, 127, 127, -128, -128, -128, 0, 4]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 50, 128, 255, 768, 1024, 1025, 3072, 4096, MAX_WIDTH])
def test_tiles_hold_a_row(width, itemsize):
    tiles = row_tiles(width, itemsize)
    assert tiles.chunk * (tiles.chunks - 1) < width <= tiles.chunk * tiles.chunks
    assert tiles.chunk.bit_count() == tiles.rows.bit_count() == tiles.warps.bit_count() == 1
    assert tiles.rows * tiles.chunk * tiles.chunks <= tiles.warps * 32 * 32


def test_the_widths_of_the_networks_leave_no_lane_idle():
    for width, itemsize, chunks in ((768, 2, 3), (768, 4, 6), (3072, 2, 3), (128, 2, 1)):
        tiles = row_tiles(width, itemsize)
        assert (tiles.chunks, tiles.chunk * tiles.chunks) == (chunks, width)


def test_rows_are_views_where_strides_allow():
    x = torch.empty(4, 6, 5, 8)
    for view, shape in ((x, (24, 5, 8)), (x[:, :, 1:], (24, 4, 8)), (x[0, 0], (1, 5, 8)), (x[0], (6, 5, 8))):
        rows = as_rows(view)
        assert (tuple(rows.shape), rows.data_ptr()) == (shape, view.data_ptr())
    assert as_rows(x[..., ::2]).is_contiguous()


def test_codes_by_hand():
    values = torch.tensor([[1.0, -2.0, 0.4], [0.0, 0.0, 0.0]])
    codes, scale = quantize_ref(values, torch.int8)
    assert codes.tolist() == [[64, -127, 25], [0, 0, 0]]  # 63.5 goes to the even 64
    assert scale.tolist() == [pytest.approx(2 / 127), pytest.approx(2.0**-64 / 127)]
    codes, scale = quantize_ref(values, torch.float8_e4m3fn, torch.tensor([0.5]))
    assert codes.tolist() == [[2.0, -4.0, 0.8125], [0.0, 0.0, 0.0]]
    assert scale.tolist() == [0.5]
