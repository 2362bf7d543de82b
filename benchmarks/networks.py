"""Run the latency benchmark and write its table: `python -m benchmarks.networks --out FILE`.

Times are the medians over all turns of one run; ratios are published over variant, taken turn by turn,
and their median. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import describe_machine

BASELINE = "published"
_TESTS = Path(__file__).with_name("test_networks.py")

Case = tuple[str, int, int]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn pytest-benchmark's records into rows: case, variant, median in ms and ratio to the baseline."""
    times: dict[Case, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        info = run["extra_info"]
        case = (info["network"], info["batch"], info["tokens"])
        times[case][info["variant"]][info["turn"]] = run["stats"]["data"]
    return [
        _row(case, variant, turns, variants[BASELINE])
        for case, variants in times.items()
        for variant, turns in variants.items()
    ]


def _row(
    case: Case, variant: str, turns: dict[int, list[float]], baseline: dict[int, list[float]]
) -> dict[str, Any]:
    seconds = [s for turn in turns.values() for s in turn]
    ratios = [statistics.median(baseline[t]) / statistics.median(own) for t, own in turns.items()]
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
        "speedup": round(statistics.median(ratios), 2),
        "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: a line a case, a pair of columns a variant."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(r["network"], r["batch"], r["tokens"], r["variant"]): r for r in rows}
    cases = list(dict.fromkeys((r["network"], r["batch"], r["tokens"]) for r in rows))
    head = ["network", "batch", "tokens", *(f"{v} ms" for v in variants), *(f"{v} x" for v in variants[1:])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        medians = [f"{cells[*case, v]['median_ms']:.0f}" for v in variants]
        ratios = [f"{cells[*case, v]['speedup']:.2f}" for v in variants[1:]]
        lines.append("| " + " | ".join([*map(str, case), *medians, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, print the table, write the data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON with all that was measured"
    )
    parser.add_argument(
        "--select",
        metavar="EXPRESSION",
        help="as pytest -k, with the baseline: 'asap and 1-50 and (published or openvino)'",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [str(_TESTS), "--benchmark-enable", f"--benchmark-json={raw}", "--benchmark-quiet", "-q"]
        code = pytest.main(arguments + (["-k", options.select] if options.select else []))
        if code != 0:
            return int(code)
        runs = json.loads(raw.read_text())["benchmarks"]
    rows = summarise(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
