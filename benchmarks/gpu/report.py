"""Tables of a gpu.json in Markdown: `python -m benchmarks.gpu.report FILE [--full]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import table
from benchmarks.gpu.record import Measured, fastest, own, ratio
from benchmarks.gpu.runner import DONE
from benchmarks.gpu.targets import FIGURES

COLUMNS = (
    "published-fp32",
    "published-bf16",
    "compile-max-autotune-bf16",
    "ours-fp16",
    "ours-bf16",
    "ours-fp8",
)
VERDICTS = {True: "yes", False: "no", None: "not measured"}


def number(value: float | None, unit: str = "") -> str:
    """Three digits, no exponent; a dash for what is missing."""
    if value is None:
        return "-"
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".rstrip()


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def asked(results: Measured) -> str:
    """The figures asked beside those measured."""
    rows = []
    for figure in FIGURES:
        value = figure.measured(results)
        bound = number(figure.asked, figure.unit)
        want = f"{'at most' if figure.most else 'at least'} {bound}"
        rows.append(
            (figure.what, want, number(value, figure.unit), number(figure.bound), VERDICTS[figure.met(value)])
        )
    return markdown(("figure", "asked", "measured", "bound", "met"), rows)


def kernels(results: Measured) -> str:
    """Every kernel: ours in microseconds, its floor by the measured rates, and torch's ways."""
    rows = []
    for bench in results.rows("kernel-"):
        mine, floor, rival = own(bench), results.floor_ms(bench), fastest(bench)
        share = None if mine is None or floor is None else 100 * floor / mine["p50_ms"]
        rows.append(
            (
                bench["name"],
                number(floor and 1e3 * floor),
                number(1e3 * mine["p50_ms"] if mine else None),
                number(share, "%"),
                f"{number(ratio(rival, mine))} ({rival['form']})" if rival else "-",
                number(ratio(fastest(bench, "published"), mine)),
            )
        )
    return markdown(
        ("kernel", "floor us", "ours us", "of floor", "times torch's best", "times published"), rows
    )


def networks(results: Measured) -> str:
    """Pairs a second by variant, and what ours in bf16 is of the measured matrix rate."""
    rate = results.rate("bf16_tflop_s")
    cases = dict.fromkeys((r["network"], r["batch"], r["tokens"]) for r in results.networks())
    rows = []
    for case in sorted(cases):
        cells = [results.network(case[0], variant, *case[1:]) for variant in COLUMNS]
        share = None if cells[4] is None or rate is None else 100 * cells[4]["tflop_s"] / rate
        rows.append(
            (*map(str, case), *(number(c["pairs_s"] if c else None) for c in cells), number(share, "%"))
        )
    return markdown(("network", "batch", "tokens", *COLUMNS, "share of the rate"), rows)


def engines(results: Measured) -> str:
    """TensorRT's engines: cost of the build, and milliseconds a call with our kernels and with its own."""
    rows = [row for row in results.rows("engine-") if "missing" not in row]
    return table(rows)


def details(results: Measured) -> str:
    """Every timed row of a network."""
    rates = {unit: results.rate(f"{unit}_tflop_s") for unit in ("bf16", "fp8")}
    rows = []
    for row in sorted(results.networks(), key=lambda r: (r["network"], r["batch"], r["tokens"], r["p50_ms"])):
        rate = rates["fp8" if row["variant"].endswith("fp8") else "bf16"]
        times = (row["p50_ms"], row["p95_ms"], row["pairs_s"], row["peak_gb"], row["tflop_s"])
        share = number(rate and 100 * row["tflop_s"] / rate, "%")
        case = (row["network"], str(row["batch"]), str(row["tokens"]), row["variant"])
        rows.append((*case, *map(number, times), share))
    head = ("network", "batch", "tokens", "variant", "p50 ms", "p95 ms", "pairs/s", "GB", "TFLOP/s", "share")
    return markdown(head, rows)


def hotspots(results: Measured) -> str:
    """The kernels that take most of the profiled networks' time."""
    rows = []
    for name, part in results.parts.items():
        if name.startswith("profile-"):
            spots: list[dict[str, Any]] = [row for row in part["rows"] if "kernel" in row]
            rows += [(name, s["kernel"], number(s["us"]), number(100 * s["share"], "%")) for s in spots]
    return markdown(("part", "kernel", "us", "share"), rows)


def tests(results: Measured) -> str:
    """What the tests on the GPU found."""
    rows = []
    for name, part in results.parts.items():
        for row in part["rows"]:
            if "counts" in row:
                counts = ", ".join(f"{count} {word}" for word, count in row["counts"].items())
                rows.append((name, " ".join(row["arguments"]), counts, "; ".join(row["failed"][:5])))
    return markdown(("part", "tests", "found", "failed"), rows)


def source(results: Measured) -> str:
    """Where it was measured, and which parts are missing."""
    gpus = {call["gpu"].get("name", "unknown") for call in results.calls}
    commits = {call["commit"] for call in results.calls}
    bad = [f"{name} ({part['state']})" for name, part in results.parts.items() if part["state"] != DONE]
    line = f"{', '.join(sorted(gpus))}; commit {', '.join(sorted(commits))}."
    return line + (f" Not done: {', '.join(bad)}." if bad else "") + "\n"


def report(results: Measured, full: bool = False) -> str:
    """All tables."""
    tables: list[Any] = [source, asked, kernels, networks, engines]
    tables += [details, hotspots, tests] if full else []
    return "\n".join(table(results) for table in tables)


def main() -> int:
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a gpu.json")
    parser.add_argument("--full", action="store_true", help="every shape, the hot kernels and the tests too")
    options = parser.parse_args()
    try:
        measured = Measured.load(options.file)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(report(measured, options.full))
    return 0


if __name__ == "__main__":
    sys.exit(main())
