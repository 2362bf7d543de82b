"""From one machine to many pairs a day: `python -m benchmarks.projection`.

Nothing is measured here. The table follows from the results of `benchmarks.networks` and `benchmarks.scoring`
and from the assumptions below, each of which the table's page states.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).resolve().parent / "results"

PAIRS_A_DAY = 100_000_000
SECONDS_A_DAY = 86_400
BUSY = 0.8  # share of the time that a core or a GPU works, over a day
PICTURE_BYTES = 150_000  # of a picture in the news, 1200 x 800 as JPEG
NETWORK = "asap"
# Dense bfloat16 products in 10^12 a second, as the vendor states them, and the share of it that is assumed.
CARDS = {"L4": 121, "L40S": 362, "H100": 989}
SHARE = 0.3


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    data: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def core_ms(variant: str) -> float:
    """Milliseconds of one core that a pair costs the network, measured on all cores of a machine."""
    result = read("networks-cpu")
    row = next(r for r in result["rows"] if (r["network"], r["variant"]) == (NETWORK, variant))
    return float(row["median_ms"]) * float(result["machine"]["cores"])


def project() -> list[tuple[str, str, str]]:
    """Rows of what, how much, and the arithmetic."""
    measured = read("scoring-cpu")
    costs, rate = measured["costs"], PAIRS_A_DAY / SECONDS_A_DAY
    beside = costs["prepare_ms"] + costs["line_ms"] + costs["listing_ms"]
    rows = [("pairs a second", f"{rate:,.0f}", f"{PAIRS_A_DAY:,} / {SECONDS_A_DAY:,}")]
    for name, variant in (("int8", "ort-int8"), ("float32", "ort-fp32")):
        cores, network = rate * (core_ms(variant) + beside) / 1000 / BUSY, core_ms(variant)
        sum_ = f"{rate:,.0f} x ({network:.0f} + {beside:.1f}) ms / {BUSY:g}"
        rows.append((f"CPU cores, {name}", f"{cores:,.0f}", sum_))
    for card, peak in CARDS.items():
        seconds = measured["gflop"][NETWORK] / (1000 * SHARE * peak)
        sum_ = (
            f"{rate:,.0f} x {measured['gflop'][NETWORK]:.0f} GFLOP / ({SHARE:g} x {peak} TFLOP/s) / {BUSY:g}"
        )
        rows.append((f"GPUs, {card} (an estimate)", f"{rate * seconds / BUSY:.1f}", sum_))
    rows += [
        (
            "CPU cores beside GPUs",
            f"{rate * beside / 1000 / BUSY:,.0f}",
            f"{rate:,.0f} x {beside:.1f} ms / {BUSY:g}",
        ),
        (
            "network, pictures",
            f"{8 * rate * PICTURE_BYTES / 1e9:.1f} Gbit/s",
            f"{rate:,.0f} x {PICTURE_BYTES / 1000:.0f} kB x 8",
        ),
        (
            "pictures a day",
            f"{PAIRS_A_DAY * PICTURE_BYTES / 1e12:.0f} TB",
            f"{PAIRS_A_DAY:,} x {PICTURE_BYTES / 1000:.0f} kB",
        ),
    ]
    for name, key in (
        ("the list", "list"),
        ("answers, JSON lines", "jsonl"),
        ("answers, Parquet", "parquet"),
    ):
        size = costs[f"{key}_bytes"]
        rows.append((name, f"{PAIRS_A_DAY * size / 1e9:,.0f} GB", f"{PAIRS_A_DAY:,} x {size:,} bytes"))
    return rows


def table() -> str:
    """The rows as Markdown."""
    return "\n".join(f"| {what} | {amount} | {how} |" for what, amount, how in project()) + "\n"


def overhead() -> str:
    """The measured variants of a job on one machine as Markdown."""
    lines = []
    for row in read("scoring-cpu")["rows"]["variants"]:
        low, high = row["ratio_range"]
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['variant']} | {row['pairs_per_s']:.1f} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print both tables."""
    argparse.ArgumentParser(prog="python -m benchmarks.projection", description=__doc__).parse_args()
    sys.stdout.write(f"{overhead()}\n{table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
