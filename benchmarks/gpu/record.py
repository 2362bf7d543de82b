"""Looking things up in a gpu.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.kernels.bench import OURS
from engine.registry import NETWORKS

Row = dict[str, Any]

_JUMPY = {name for name, network in NETWORKS.items() if any(output.jumps for output in network.outputs)}


class Measured:
    """What a gpu.json holds, by names; whatever is missing is None."""

    def __init__(self, stored: Row) -> None:
        self.parts: dict[str, Row] = stored["parts"]
        self.calls: list[Row] = stored["calls"]

    @classmethod
    def load(cls, path: Path) -> Measured:
        """From a file; raises ValueError for one that is no record of `benchmarks.gpu`."""
        try:
            return cls(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise ValueError(
                f"{path}: no record of benchmarks.gpu ({type(error).__name__}: {error})"
            ) from error

    def rows(self, prefix: str) -> Iterator[Row]:
        """Rows of all parts whose name starts so, failed ones too."""
        for name, part in self.parts.items():
            if name.startswith(prefix):
                yield from part["rows"]

    def rate(self, name: str) -> float | None:
        """A measured rate: "copy_tb_s", "bf16_tflop_s", "fp8_tflop_s"."""
        return next((row["value"] for row in self.rows("machine") if row.get("rate") == name), None)

    def networks(self, **wanted: Any) -> list[Row]:
        """Timed rows of whole networks with these fields."""
        rows = (row for row in self.rows("network-") if "p50_ms" in row)
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    def network(self, name: str, variant: str, batch: int = 64, tokens: int = 50) -> Row | None:
        """One of them."""
        rows = self.networks(network=name, variant=variant, batch=batch, tokens=tokens)
        return rows[0] if rows else None

    def picture(self, name: str, batch: int) -> Row | None:
        """The fastest way of ours from the bytes of photographs on the device to logits."""
        rows = [row for row in self.rows(f"pictures-{name}") if row["batch"] == batch and "p50_ms" in row]
        return min((row for row in rows if row["from"] == "device"), key=_p50, default=None)

    def errors(self, *variants: str) -> list[float | None]:
        """Distances from float32 of all outputs of all networks; None for one that was not finite.

        Networks whose answers jump with a choice that rounding may decide are left out.
        """
        rows = (row for row in self.rows("network-") if "error" in row and row["variant"] in variants)
        return [error for row in rows if row["network"] not in _JUMPY for error in row["error"].values()]

    def bench(self, name: str) -> Row | None:
        """A kernel's row."""
        return next((row for row in self.rows("kernel-") if row["name"] == name), None)

    def floor_ms(self, bench: Row) -> float | None:
        """The least time by the measured rates."""
        copy, product = self.rate("copy_tb_s"), self.rate(f"{bench['unit']}_tflop_s")
        if copy is None or product is None:
            return None
        return max(bench["bytes"] / copy, bench["flops"] / product) / 1e9


def _p50(row: Row) -> float:
    return row["p50_ms"]


def fastest(bench: Row | None, start: str = "") -> Row | None:
    """The fastest form but ours, of those whose name starts so."""
    if bench is None:
        return None
    forms = (f for f in bench["forms"] if not f["form"].startswith(OURS) and f["form"].startswith(start))
    return min((form for form in forms if "p50_ms" in form), key=_p50, default=None)


def own(bench: Row | None) -> Row | None:
    """Our form, where it was timed."""
    timed = (f for f in bench["forms"] if f["form"] == OURS and "p50_ms" in f) if bench else iter(())
    return next(timed, None)


def ratio(slow: Row | None, quick: Row | None) -> float | None:
    """How many times faster."""
    return None if slow is None or quick is None else slow["p50_ms"] / quick["p50_ms"]
