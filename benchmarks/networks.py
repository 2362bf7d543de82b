"""Run the latency benchmark and write its table: `python -m benchmarks.networks --out FILE`.

Times are the medians over all turns of one run; ratios are published over variant, taken turn by turn,
and their median. Nothing else should run on the machine meanwhile. A variant that fails is named in FILE
beside the times of the others, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import ResultFile
from dgm4.config import SIZES

BASELINE = "published"
_TESTS = Path(__file__).with_name("test_networks.py")

Case = tuple[str, int, int]
Turns = dict[int, list[float]]  # seconds of each call, by turn


class Failures:
    """Plugin of pytest: the network's size for the tests, and why which of them failed."""

    def __init__(self, size: str) -> None:
        self.size = size
        self.errors: dict[tuple[str, ...], str] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        """Tell the tests the size."""
        config.option.network_size = self.size

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Keep the first error of every variant at every shape."""
        report = yield
        if call.excinfo is not None:
            given = item.callspec.params  # type: ignore[attr-defined]
            case = (given["network"], given["variant"], f"{given['batch']}x{given['tokens']}")
            self.errors.setdefault(case, f"{call.excinfo.typename}: {call.excinfo.value}")
        return report


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn pytest-benchmark's records into rows: case, variant, median in ms and ratio to the baseline.

    The ratio is None where the baseline was not measured.
    """
    times: dict[Case, dict[str, Turns]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        info = run["extra_info"]
        case = (info["network"], info["batch"], info["tokens"])
        times[case][info["variant"]][info["turn"]] = run["stats"]["data"]
    return [
        _row(case, variant, turns, variants.get(BASELINE, {}))
        for case, variants in times.items()
        for variant, turns in variants.items()
    ]


def _row(case: Case, variant: str, turns: Turns, baseline: Turns) -> dict[str, Any]:
    seconds = [s for turn in turns.values() for s in turn]
    ratios = [
        statistics.median(baseline[t]) / statistics.median(x) for t, x in turns.items() if t in baseline
    ]
    name, batch, tokens = case
    return {
        "network": name,
        "batch": batch,
        "tokens": tokens,
        "variant": variant,
        "median_ms": round(1e3 * statistics.median(seconds), 1),
        "min_ms": round(1e3 * min(seconds), 1),
        "max_ms": round(1e3 * max(seconds), 1),
        "calls": len(seconds),
        "speedup": round(statistics.median(ratios), 2) if ratios else None,
        "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)] if ratios else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: a line a case, a pair of columns a variant, dashes for what was not measured."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(r["network"], r["batch"], r["tokens"], r["variant"]): r for r in rows}
    cases = list(dict.fromkeys((r["network"], r["batch"], r["tokens"]) for r in rows))
    head = ["network", "batch", "tokens", *(f"{v} ms" for v in variants), *(f"{v} x" for v in variants[1:])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        rows = [cells.get((*case, v), {}) for v in variants]
        medians = [_number(row.get("median_ms"), 0) for row in rows]
        ratios = [_number(row.get("speedup"), 2) for row in rows[1:]]
        lines.append("| " + " | ".join([*map(str, case), *medians, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> int:
    """Run, print the table, write the data; 1 if a variant failed, pytest's code if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON with all that was measured"
    )
    parser.add_argument(
        "--select",
        metavar="EXPRESSION",
        help="as pytest -k, with the baseline: 'asap and 1-50 and (published or openvino)'",
    )
    parser.add_argument("--size", default="base", choices=SIZES, help="%(default)s")
    options = parser.parse_args()
    failures, result = Failures(options.size), ResultFile(options.out)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [str(_TESTS), "--benchmark-enable", f"--benchmark-json={raw}", "--benchmark-quiet", "-q"]
        code = pytest.main(arguments + (["-k", options.select] if options.select else []), [failures])
        runs = json.loads(raw.read_text())["benchmarks"] if raw.exists() and raw.stat().st_size else []
    for case, error in failures.errors.items():
        result.fail(*case, error=error)
    if not runs and not result.failures:
        return int(code)  # a wrong expression, which must not empty the file
    rows = summarise(runs)
    result.save({"rows": rows})
    sys.stdout.write(table(rows))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
