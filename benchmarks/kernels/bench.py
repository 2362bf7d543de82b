"""One operator at one shape, and the gate before its clock: a contender is timed when its answer is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import sets_for, time_rotating
from kernels.jit import Tiles

RIGHT = 2e-2  # RMS of the error over RMS of the answer, in half precision
RIGHT_E4M3 = 5e-2  # with one operand or the answer in E4M3, whose steps are 1/16 to 1/8 of a value
PATCHES, TEXT, WIDTH, HEADS = 257, 50, 768, 12
OURS = "ours"

Form = Callable[..., Any]
Row = dict[str, Any]


def _unscheduled(*inputs: Tensor) -> None:
    raise NotImplementedError("this operator has no tiles to choose")


@dataclass(frozen=True)
class Bench:
    """One operator at one shape: `forms` by name, ours first; `bytes` and `flops` are the fewest possible.

    `reference` takes the inputs in float64; `values` makes of an answer what is compared with it.
    `unit` names the rate that bounds the products. Forms in `eager` wait for the host, so that no graph
    takes them. `schedule` runs the operator with given tiles, for `candidates`.
    """

    name: str
    inputs: tuple[Tensor, ...]
    reference: Form
    forms: dict[str, Form]
    bytes: int
    flops: int
    shape: dict[str, int] = field(default_factory=dict)
    right: float = RIGHT
    values: Callable[[Any], Any] = lambda answer: answer
    unit: str = "bf16"
    eager: tuple[str, ...] = ()
    schedule: Callable[[Any], Form] = lambda tiles: _unscheduled
    candidates: Sequence[Any] = ()


def draw(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values times `scale`."""
    return (scale * torch.randn(shape, device=device)).to(dtype)


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def compiled(form: Form) -> Form:
    """`form` through torch.compile, whole and for these shapes alone."""
    return torch.compile(form, dynamic=False, fullgraph=True)


def decoded(answer: Sequence[Any]) -> Tensor:
    """The values [..., D] of codes and their scale, one a row [...] or one for all [1]."""
    codes, scale = answer
    return codes.double() * (scale[..., None] if scale.numel() > 1 else scale).double()


def candidates(schedules: Iterable[Tiles], more: Iterable[Tiles]) -> list[Tiles]:
    """The schedules that a kernel offers for a shape, then `more`, each once."""
    return list(dict.fromkeys([*schedules, *more]))


def grid(
    rows: Iterable[int], columns: Iterable[int], warps: Iterable[int] = (4, 8), stages: Iterable[int] = (2, 3)
) -> list[Tiles]:
    """All combinations."""
    return [Tiles(m, n, w, s) for m in rows for n in columns for w in warps for s in stages]


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors that an operator returns, one or several."""
    return tuple(output) if isinstance(output, tuple) else (output,)


def error(bench: Bench, form: Form) -> float:
    """The largest of RMS error over RMS, of all answers; NaN where one is not finite."""
    wide = (x.double() if x.is_floating_point() else x for x in bench.inputs)
    exact, outputs = tensors_of(bench.reference(*wide)), tensors_of(bench.values(form(*bench.inputs)))
    pairs = list(zip(outputs, exact, strict=True))
    errors = [float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs]
    return max(errors, key=lambda e: e if e == e else float("inf"))


def judge(bench: Bench, form: Form, budget_s: float = 0.3, graphed: bool = True) -> Row:
    """Error and, where that is small enough, times of one form; or why it failed."""
    row: Row = {}
    try:
        row["error"] = error(bench, form)
        if row["error"] <= bench.right:
            row |= time_rotating(form, sets_for(bench.inputs, bench.bytes), budget_s, graphed)
    except Exception as failure:  # torch's backends and Triton's compiler raise many kinds
        row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a fault leaves the process useless: better to end here
        torch.cuda.empty_cache()
    return row


def right(row: Row) -> bool:
    """Whether a form's row has times."""
    return "p50_ms" in row


def measure(benches: Iterable[Bench]) -> Iterator[Row]:
    """A row a bench with all its forms; raises RuntimeError at the end where one of ours was not timed."""
    wrong = []
    for bench in benches:
        forms = [
            {"form": name, **judge(bench, form, graphed=name not in bench.eager)}
            for name, form in bench.forms.items()
        ]
        yield {"name": bench.name, **_facts(bench), "forms": forms}
        wrong += [f"{bench.name}: {forms[0]}"] if not right(forms[0]) else []
    if wrong:
        raise RuntimeError("; ".join(wrong))


def sweep(benches: Iterable[Bench]) -> Iterator[Row]:
    """A row a bench with candidates: times of each, none where it does not compile or is wrong."""
    for bench in benches:
        for tiles in bench.candidates:
            times = judge(bench, partial(_late, bench, tiles), budget_s=0.05)
            fields = tiles._asdict() if hasattr(tiles, "_asdict") else {"tiles": str(tiles)}
            yield {"name": bench.name, **_facts(bench), "tiles": fields, **times}


def _late(bench: Bench, tiles: Any, *inputs: Tensor) -> Any:
    """The answer with the given tiles, which only the call may refuse."""
    return bench.schedule(tiles)(*inputs)


def _facts(bench: Bench) -> Row:
    return {"shape": bench.shape, "bytes": bench.bytes, "flops": bench.flops, "unit": bench.unit}
