"""Attention against the formula with explicit loops over heads; the ONNX bodies against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto

from kernels.attention import attention, attention_ref, guided_attention
from kernels.onnx.attention import GUIDED, MASKED, NODES, Operands

EXACT = 1e-10
SHAPES = [
    pytest.param(*shape, id="B{}-H{}-N{}-M{}-d{}".format(*shape))
    for shape in [
        (1, 1, 1, 1, 1),
        (2, 2, 7, 50, 24),
        (7, 12, 1, 63, 5),
        (2, 3, 50, 257, 64),
        (1, 8, 197, 2, 96),
        (2, 4, 19, 33, 192),
    ]
]
FORMS = [
    pytest.param(form, id=name) for name, form in NODES.items() if not form.guided
]  # of `attention`, whose operands are those of a node


def formula(q, k, v, heads, mask=None, bias=None):
    """NumPy float64, a query of a head at a time; the keys that are ignored are taken out."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    width = q.shape[-1] // heads
    out, guide = np.zeros_like(q), np.zeros((*q.shape[:2], k.shape[1]))
    for b in range(len(q)):
        keep = np.ones(k.shape[1], bool) if mask is None else np.asarray(mask[b]) != 0
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[b, :, part] @ k[b, :, part].T / np.sqrt(width)
            guide[b] += scores / heads
            if bias is not None:
                scores = scores + np.asarray(bias[h], np.float64)
            for row, valid in enumerate(np.broadcast_to(keep, scores.shape)):
                if valid.any():
                    weights = np.exp(scores[row, valid] - scores[row, valid].max())
                    out[b, row, part] = weights / weights.sum() @ v[b, valid, part]
    return out, guide


def lengths_mask(batch, keys):
    lengths = [max(keys - 3 * i, 1) for i in range(batch)]
    return (torch.arange(keys)[None] < torch.tensor(lengths)[:, None]).to(torch.int32)


def pairs_mask(batch, queries, keys):
    """A third of the pairs, and none for the first query."""
    mask = torch.arange(batch * queries * keys).view(batch, queries, keys) % 3 == 0
    mask[:, 0] = False
    return mask.to(torch.int32)


def apart(got, want):
    return np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()


@pytest.fixture
def drawn(normal):
    def make(batch, heads, queries, keys, width, dtype=torch.float64):
        shapes = ((batch, queries), (batch, keys), (batch, keys))
        return [normal(*shape, heads * width, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    return make


@pytest.fixture
def beside(normal):
    """The mask and the bias of a form, by name; empty for plain attention."""

    def make(form, batch, heads, queries, keys, dtype=torch.float64):
        masks = {2: lambda: lengths_mask(batch, keys), 3: lambda: pairs_mask(batch, queries, keys)}
        mask = {"mask": masks[form.mask]()} if form.mask else {}
        bias = {"bias": 2 * normal(heads, queries, keys, seed=7, dtype=dtype)} if form.bias else {}
        return mask | bias

    return make


@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "width"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_reference_and_torch_form_are_the_formula(drawn, beside, batch, heads, queries, keys, width, form):
    tensors = drawn(batch, heads, queries, keys, width)
    more = beside(form, batch, heads, queries, keys)
    copies = [x.clone() for x in (*tensors, *more.values())]
    out, guide = formula(*tensors, heads, **more)
    got, got_guide = attention_ref(*tensors, heads, **more)
    assert apart(got, out) <= EXACT
    assert apart(got_guide, guide) <= EXACT
    assert apart(attention(*tensors, heads, **more), out) <= EXACT
    assert all(torch.equal(x, y) for x, y in zip((*tensors, *more.values()), copies, strict=True))


def test_guided_form_is_the_formula(drawn):
    tensors = drawn(2, 3, 7, 50, 16)
    out, guide = formula(*tensors, 3)
    got, got_guide = guided_attention(*tensors, 3)
    assert apart(got, out) <= EXACT
    assert apart(got_guide, guide) <= EXACT
    assert guided_attention(*(x.half() for x in tensors), 3)[1].dtype == torch.float32


def test_strided_inputs(normal):
    """Chunks of one packed product, an expanded query, a reversed batch, a mask with a stride."""
    packed = normal(3, 9, 3 * 24)
    parts = packed.chunk(3, dim=-1)
    assert not parts[0].is_contiguous()
    mask = torch.tensor([[1, 0] * 9, [1, 1] * 9, [0, 1] * 9], dtype=torch.int32)[:, ::2]
    for tensors in (parts, (parts[0][:1].expand(3, -1, -1), *parts[1:]), tuple(x.flip(0) for x in parts)):
        out, _ = formula(*tensors, 4, mask)
        assert apart(attention_ref(*tensors, 4, mask)[0], out) <= EXACT
        assert apart(attention(*tensors, 4, mask), out) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_fully_masked_row_yields_zeros(drawn, dtype):
    tensors = drawn(3, 2, 5, 7, 8, dtype)
    mask = torch.ones(3, 7, dtype=torch.int32)
    mask[1] = 0
    for out in (attention_ref(*tensors, 2, mask)[0], attention(*tensors, 2, mask)):
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert out.isfinite().all()
        assert out[0].any()


def test_a_fully_masked_row_alone_yields_zeros(drawn):
    tensors = drawn(1, 2, 5, 7, 8)
    mask = torch.zeros(1, 7, dtype=torch.int32)
    assert not attention(*tensors, 2, mask).any()
    assert not attention_ref(*tensors, 2, mask)[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_query_without_a_valid_key_yields_zeros(drawn, beside, bias, dtype):
    tensors, form = drawn(3, 2, 5, 7, 8, dtype), Operands(mask=3, bias=bias)
    more = beside(form, 3, 2, 5, 7, dtype)
    for out in (attention_ref(*tensors, 2, **more)[0], attention(*tensors, 2, **more)):
        assert not out[:, 0].any()
        assert out.isfinite().all()
        assert out[:, 1:].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [Operands(mask=2), Operands(mask=3, bias=True)], ids=str)
def test_lower_precisions_stay_near(drawn, beside, no_worse, form, dtype):
    tensors, more = drawn(2, 12, 50, 257, 64, dtype), beside(form, 2, 12, 50, 257, dtype)
    exact = {name: x.double() if name == "bias" else x for name, x in more.items()}
    out, _ = attention_ref(*(x.double() for x in tensors), 12, **exact)
    no_worse(attention(*tensors, 12, **more), attention_ref(*tensors, 12, **more)[0], out, dtype)


def test_runs_are_bit_equal(drawn):
    tensors = drawn(2, 2, 50, 63, 16, torch.float32)
    runs = [attention(*tensors, 2, lengths_mask(2, 63)) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def arrays(tensors, **more):
    return {name: x.numpy() for name, x in zip(("query", "key", "value"), tensors, strict=True)} | {
        name: x.numpy() for name, x in more.items()
    }


@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "width"), SHAPES)
@pytest.mark.parametrize("op", NODES)
def test_onnx_body_is_the_reference(drawn, beside, onnx_body, op, batch, heads, queries, keys, width):
    tensors = drawn(batch, heads, queries, keys, width, torch.float32)
    more = beside(NODES[op], batch, heads, queries, keys, torch.float32)
    names = ("out", "guide") if op == GUIDED else ("out",)
    outputs = dict.fromkeys(names, TensorProto.FLOAT)
    got = onnx_body(op, arrays(tensors, **more), outputs, heads=[heads], scale=width**-0.5)
    want = attention_ref(*(x.double() for x in tensors), heads, **more)
    for x, y in zip(got, want, strict=False):
        assert x.shape == tuple(y.shape)
        assert apart(x, y) <= 1e-5


@pytest.mark.parametrize("op", NODES)
def test_onnx_body_in_half_precision(drawn, beside, onnx_body, no_worse, op):
    tensors = drawn(2, 3, 7, 50, 16, torch.float16)
    more = beside(NODES[op], 2, 3, 7, 50, torch.float16)
    outputs = {"out": TensorProto.FLOAT16} | ({"guide": TensorProto.FLOAT} if op == GUIDED else {})
    got = onnx_body(op, arrays(tensors, **more), outputs, heads=[3], scale=0.25)
    want = attention_ref(*(x.double() for x in tensors), 3, **more)
    assert [x.dtype for x in got] == [np.float16, np.float32][: len(got)]
    plain = attention_ref(*tensors, 3, **more)
    for x, y, exact in zip(got, plain, want, strict=False):
        no_worse(x, y, exact, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_body_of_a_fully_masked_row_yields_zeros(drawn, onnx_body, dtype):
    tensors = drawn(3, 2, 5, 7, 8, dtype)
    mask = torch.ones(3, 7, dtype=torch.int32)
    mask[1] = 0
    kind = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}[dtype]
    (out,) = onnx_body(MASKED, arrays(tensors, mask=mask), {"out": kind}, heads=[2], scale=8**-0.5)
    assert np.array_equal(out[1], np.zeros_like(out[1]))
    assert np.isfinite(out).all()
    assert out[0].any()


def test_large_scores_do_not_reach_ignored_keys(drawn, onnx_body):
    """Scores of some hundreds, as a trained network may give them, stay far from the value of the mask."""
    tensors = drawn(1, 2, 5, 7, 8, torch.float32)
    tensors[0] = tensors[0] * 300
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]], dtype=torch.int32)
    (out,) = onnx_body(
        MASKED, arrays(tensors, mask=mask), {"out": TensorProto.FLOAT}, heads=[2], scale=8**-0.5
    )
    assert apart(out, formula(*tensors, 2, mask)[0]) <= 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 5}, r"query: expected \[B, N, heads \* d\] with 5 heads, got \(2, 3, 8\)"),
        ({"heads": 0}, "query: expected .* with 0 heads"),
        ({"query": torch.zeros(3, 8)}, r"query: expected \[B, N, heads \* d\], got the shape \(3, 8\)"),
        ({"key": torch.zeros(2, 4, 9)}, r"key: expected the shape \(2, 4, 8\), got \(2, 4, 9\)"),
        ({"value": torch.zeros(2, 5, 8)}, r"value: expected the shape \(2, 4, 8\), got \(2, 5, 8\)"),
        (
            {"value": torch.zeros(2, 4, 8).half()},
            "value: expected torch.float32 as the rest, got torch.float16",
        ),
        ({"key": torch.zeros(2, 4, 8, device="meta")}, "key: expected it on cpu as the rest, got meta"),
        (
            {"mask": torch.ones(2, 3).long()},
            r"mask: expected \[B, M\] or \[B, N, M\], \(2, 4\) or \(2, 3, 4\), got the shape \(2, 3\)",
        ),
        (
            {"mask": torch.ones(2, 4, 3).long()},
            r"mask: expected .* or \(2, 3, 4\), got the shape \(2, 4, 3\)",
        ),
        ({"mask": torch.ones(2, 4)}, "mask: expected integers, 1 valid and 0 ignored, got torch.float32"),
        ({"mask": torch.ones(2, 4, device="meta").long()}, "mask: expected it on cpu as the rest, got meta"),
        ({"bias": torch.zeros(2, 4, 3)}, r"bias: expected the shape \(2, 3, 4\), got \(2, 4, 3\)"),
        ({"bias": torch.zeros(1, 2, 3, 4)}, r"bias: expected the shape \(2, 3, 4\), got \(1, 2, 3, 4\)"),
        (
            {"bias": torch.zeros(2, 3, 4).half()},
            "bias: expected torch.float32 as the rest, got torch.float16",
        ),
    ],
)
def test_bad_inputs_are_named(changed, message):
    good = {
        "query": torch.zeros(2, 3, 8),
        "key": torch.zeros(2, 4, 8),
        "value": torch.zeros(2, 4, 8),
        "heads": 2,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        attention(**{**good, **changed})
