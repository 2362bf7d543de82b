"""Every operator where the benchmarks do not look: hard inputs, any masks, a second GPU, 2^31 elements.

The operators are those of `benchmarks.kernels`, at their own shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import OPERATORS, benches
from benchmarks.kernels import resize
from benchmarks.kernels.bench import OURS, Bench, Form, error, tensors_of
from kernels.attention import attention, attention_ref

Row = dict[str, Any]

LIBRARY_OPERATORS = ("linear",)  # torch's own product, beside which no kernel of ours stands
OWN = tuple(name for name in OPERATORS if name not in LIBRARY_OPERATORS)
TORCH = ("composed", "published", "sdpa math")  # the same operator as torch computes it in the same type
MEAN = 10.0  # of the tokens: ten times their spread, as some layers of a trained transformer have them
ROUNDING = 4e-3  # of bfloat16, which torch's form in float32 does not have
INT32_ELEMENTS = 1 << 31


def hard(device: str = "cuda", batch: int = 8, small: bool = False) -> Iterator[Row]:
    """Tokens of mean 10, by twice torch's error; a NaN inside, which no operator may turn into a number.

    Raises RuntimeError at the end if one is wrong.
    """
    wrong = []
    for operator in OWN:
        for bench in benches(operator, device=device, batch=batch, small=small):
            row: Row = {"name": bench.name, **_shifted(bench), **_with_nan(bench)}
            yield row
            wrong += [str(row)] if not row["right"] or row["lost_nan"] else []
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _shifted(bench: Bench) -> Row:
    """Errors of ours and of torch's form with the mean of all tokens [B, N, D] moved by `MEAN`."""
    inputs = tuple(x + MEAN if x.dim() == 3 and x.is_floating_point() else x for x in bench.inputs)
    moved = replace(bench, inputs=inputs)
    ours = error(moved, bench.forms[OURS])
    name = next((name for name in TORCH if name in bench.forms), None)
    torchs = error(moved, bench.forms[name]) if name else bench.right / 2
    return {"error": ours, "torch": torchs, "right": ours <= max(2 * torchs, ROUNDING)}


def _with_nan(bench: Bench) -> Row:
    """How many values the float64 reference makes NaN of one NaN, and how many of those ours does not."""
    first, *rest = bench.inputs
    if not first.is_floating_point():
        return {"nan": 0, "lost_nan": 0}
    poisoned = first.clone()
    # An image's in the middle of its first patch: the fusion reads nothing of the patch's edge.
    poisoned[(-1, -1, 8, 8) if first.dim() == 4 else (-1,) * first.dim()] = float("nan")
    inputs = (poisoned, *rest)
    exact = tensors_of(bench.reference(*(x.double() if x.is_floating_point() else x for x in inputs)))
    ours = tensors_of(bench.values(bench.forms[OURS](*inputs)))
    pairs = [(want.isnan(), got.isnan()) for want, got in zip(exact, ours, strict=True)]
    return {
        "nan": sum(int(want.sum()) for want, _ in pairs),
        "lost_nan": sum(int((want & ~got).sum()) for want, got in pairs),
    }


def masks(device: str = "cuda", batch: int = 8, queries: int = 257, keys: int = 50) -> Iterator[Row]:
    """Attention with one mask [B, M] in every layout that torch can give it; the answers must be equal.

    Raises RuntimeError at the end if one is not.
    """
    width, heads = 128, 2
    query, key, value = (
        torch.randn(batch, n, width, device=device, dtype=torch.float16) for n in (queries, keys, keys)
    )
    lengths = torch.arange(batch, device=device)[:, None] % keys + 1
    mask = (torch.arange(keys, device=device)[None] < lengths).long()
    whole = torch.ones(batch, 1, dtype=torch.int64, device=device)
    layouts = {
        "contiguous": mask,
        "every second column": torch.stack((mask, 1 - mask), 2).flatten(1)[:, ::2],
        "columns first": mask.t().contiguous().t(),
        "rows apart": torch.cat((mask, 1 - mask), 1)[:, :keys],
        "one column expanded": whole.expand(batch, keys),
        "one row expanded": mask[-1:].expand(batch, keys),
    }
    wrong = []
    for name, layout in layouts.items():
        out = attention(query, key, value, heads, layout)
        expected = attention(query, key, value, heads, layout.contiguous())
        exact = attention_ref(query.double(), key.double(), value.double(), heads, layout)[0]
        distance = float((out.double() - exact).norm() / exact.norm())
        right = torch.equal(out, expected) and distance <= 5e-3
        yield {"mask": name, "strides": layout.stride(), "error": distance, "right": right}
        wrong += [] if right else [f"{name}: error {distance:.2g}"]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def second_device(device: str = "cuda:1", small: bool = False) -> Iterator[Row]:
    """Every operator on a device that is not the current one; raises RuntimeError if one is wrong."""
    if device.startswith("cuda") and torch.cuda.device_count() < 2:
        yield {"missing": "a second GPU"}
        return
    for operator in OWN:
        for bench in benches(operator, device=device, batch=2, small=small):
            distance = error(bench, bench.forms[OURS])
            yield {"name": bench.name, "error": distance}
            if not distance <= bench.right:
                raise RuntimeError(f"{bench.name} on {device}: error {distance:.2g}")


def large(
    operator: str, device: str = "cuda", elements: int = INT32_ELEMENTS, batch: int = 40, small: bool = False
) -> Iterator[Row]:
    """A batch repeated until a tensor has more than `elements`: every repetition must have equal answers.

    Operators on rows also take them as one matrix [B N, D]. The batch itself is checked against float64;
    `batch` must not be the first dimension of a weight, by which batched tensors are told apart.
    Raises RuntimeError at the end if one is wrong.
    """
    wrong = []
    for bench in (
        one for found in benches(operator, device=device, batch=batch, small=small) for one in _flat(found)
    ):
        form = bench.forms[OURS]
        distance = error(bench, form)
        answers = tensors_of(form(*bench.inputs))
        rows = len(answers[0])
        batched = [x.numel() for x in (*bench.inputs, *answers) if len(x) == rows]
        times = elements // max(batched) + 1
        many = tensors_of(
            _repeated(bench, rows, times, device)(*(_tiled(x, rows, times) for x in bench.inputs))
        )
        different = sum(_differences(x, y, times) for x, y in zip(many, answers, strict=True))
        row = {"name": bench.name, "rows": rows * times, "elements": max(batched) * times}
        yield {**row, "error": distance, "different": different}
        if different or not distance <= bench.right:
            wrong.append(f"{bench.name}: error {distance:.2g}, {different} of {times} repetitions differ")
        del many
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _flat(bench: Bench) -> Iterator[Bench]:
    """A bench, and if all that is batched is rows [B, N, D], the same rows as one matrix."""
    yield bench
    if bench.name.startswith(("residual norm", "bias and gelu", "rows to")):
        inputs = tuple(x.flatten(0, 1) if x.dim() == 3 else x for x in bench.inputs)
        yield replace(bench, name=f"{bench.name}, a matrix", inputs=inputs)


def _tiled(x: Tensor, rows: int, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.dim() - 1)) if len(x) == rows else x


def _repeated(bench: Bench, rows: int, times: int, device: str) -> Form:
    """Our form for so many repetitions; what it holds a batch of, a mask or sizes, is repeated with it."""
    form: Callable[..., Any] = bench.forms[OURS]
    if bench.name == "resize":
        shape = bench.shape
        side = (shape["height"], shape["width"], shape["size"])
        return resize.prepared(rows * times, *side, torch.bfloat16, device)
    if isinstance(form, partial):
        keywords = {
            k: _tiled(v, rows, times) if isinstance(v, Tensor) else v for k, v in form.keywords.items()
        }
        return partial(form.func, *form.args, **keywords)
    return form


def _differences(many: Tensor, one: Tensor, times: int) -> int:
    """How many of the repetitions in `many` are not `one`, bit for bit."""
    if many.element_size() == 1:  # for which torch has no comparison on some devices
        many, one = many.view(torch.uint8), one.view(torch.uint8)
    return sum(not torch.equal(part, one) for part in many.tensor_split(times))
