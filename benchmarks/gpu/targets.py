"""The figures asked of an H200, as data, and where a gpu.json has the measured ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.record import Measured, fastest, own, ratio
from benchmarks.kernels.attention import WITH_MAP
from benchmarks.kernels.conv_fusion import NAME as FUSION

MGCA = "attention, mgca"
OURS_16, OURS_8 = "ours-bf16", "ours-fp8"


@dataclass(frozen=True)
class Figure:
    """`asked` is a least value, or with `most` a largest one; `bound` is what the hardware allows."""

    what: str
    asked: float
    unit: str
    measured: Callable[[Measured], float | None]
    most: bool = False
    bound: float | None = None

    def met(self, measured: float | None) -> bool | None:
        """Whether it is; None where it was not measured."""
        if measured is None:
            return None
        return measured <= self.asked if self.most else measured >= self.asked


def _pairs(name: str, variant: str) -> Callable[[Measured], float | None]:
    def read(results: Measured) -> float | None:
        row = results.network(name, variant)
        return None if row is None else row["pairs_s"]

    return read


def _faster(name: str, slow: str, quick: str) -> Callable[[Measured], float | None]:
    return lambda results: ratio(results.network(name, slow), results.network(name, quick))


def _beats(bench: str, start: str) -> Callable[[Measured], float | None]:
    return lambda results: ratio(fastest(results.bench(bench), start), own(results.bench(bench)))


def _fusion_us(results: Measured) -> float | None:
    form = own(results.bench(FUSION))
    return None if form is None else 1e3 * form["p50_ms"]


def _picture_ms(results: Measured) -> float | None:
    row = results.picture("asap", 1)
    return None if row is None else row["p50_ms"]


def _worst_error(results: Measured) -> float | None:
    errors = results.errors(OURS_16, "ours-fp16")
    return max((float("inf") if e is None else e for e in errors), default=None)


FIGURES = (
    Figure("MGCA, 64 pairs: times the fastest SDPA", 1, "x", _beats(MGCA, "sdpa")),
    Figure("MGCA with map: times the published form", 4, "x", _beats(WITH_MAP, "published")),
    Figure("MGCA with map: times SDPA and a product", 1, "x", _beats(WITH_MAP, "sdpa")),
    Figure("CAFormer fusion, 64 pairs", 25, "us", _fusion_us, most=True, bound=13),
    Figure("CAFormer fusion: times the published form", 200, "x", _beats(FUSION, "published")),
    Figure("ASAP, 64 x 50, bf16", 7500, "pairs/s", _pairs("asap", OURS_16), bound=12600),
    Figure("ASAP, 64 x 50, FP8", 10500, "pairs/s", _pairs("asap", OURS_8)),
    Figure("ASAP bf16: times published eager fp32", 12, "x", _faster("asap", "published-fp32", OURS_16)),
    Figure(
        "ASAP bf16: times torch.compile of it in bf16",
        2,
        "x",
        _faster("asap", "compile-max-autotune-bf16", OURS_16),
    ),
    Figure("ASAP, one picture to logits", 1.2, "ms", _picture_ms, most=True, bound=0.11),
    Figure(
        "ASAP, one picture: times published eager fp32",
        15,
        "x",
        lambda results: ratio(results.network("asap", "published-fp32", batch=1), results.picture("asap", 1)),
    ),
    Figure("CALS, 64 x 50, bf16", 6000, "pairs/s", _pairs("cals", OURS_16)),
    Figure("fp16 and bf16: worst RMS error of an output", 0.02, "", _worst_error, most=True),
)
