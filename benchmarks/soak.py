"""Whether memory levels off: `python -m benchmarks.soak --calls 100000 --out FILE`.

One Predictor answers pair after pair: pictures of all formats, a tenth of them damaged, captions of all
lengths. By default on a network that costs nothing (`benchmarks.hollow`): what may grow is around it. The
slope is fitted to the second half of the run.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.hollow import hollow_bundle
from benchmarks.results import ResultFile
from engine import InputError, Predictor

STEPS = 50  # of the run, after each of which memory is read
_TEXT = "a man president smiles with the new house in front of senate while reporters wait"
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def resident() -> float:
    """Resident memory of this process in megabytes (2**20 bytes); Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_pictures(count: int, seed: int) -> list[bytes]:
    """Encoded pictures of 60 to 400 pixels a side; every tenth is cut short."""
    random, pictures = np.random.default_rng(seed), []
    for number in range(count):
        width, height = (int(side) for side in random.integers(60, 400, 2))
        blocks = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        blocks.resize((width, height), Image.Resampling.BICUBIC).save(file, _FORMATS[number % len(_FORMATS)])
        data = file.getvalue()
        pictures.append(data[: len(data) // 2] if number % 10 == 9 else data)
    return pictures


def soak(predictor: Predictor, calls: int, seed: int = 0) -> list[dict[str, float]]:
    """Answer `calls` pairs; rows of what the process holds after each of `STEPS` equal steps."""
    random, words = np.random.default_rng(seed), _TEXT.split()
    pictures, rows, begun, refused = make_pictures(50, seed), [], time.perf_counter(), 0
    for number in range(1, calls + 1):
        caption = " ".join(random.choice(words, int(random.integers(0, 60))))
        try:
            predictor.predict(pictures[number % len(pictures)], caption)
        except InputError:
            refused += 1
        if number % max(1, calls // STEPS) == 0:
            gc.collect()
            held = {"memory_mb": round(resident(), 2), "objects": len(gc.get_objects())}
            open_now = {
                "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                "threads": threading.active_count(),
            }
            took = {"refused": refused, "seconds": round(time.perf_counter() - begun, 1)}
            rows.append({"calls": number, **held, **open_now, **took})
    return rows


def slope(rows: list[dict[str, float]]) -> float:
    """Megabytes per 10,000 calls, by least squares over the second half of the rows."""
    half = rows[len(rows) // 2 :]
    calls = [row["calls"] for row in half]
    return float(np.polyfit(calls, [row["memory_mb"] for row in half], 1)[0] * 10_000)


def main() -> int:
    """Run and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--bundle", help="one with a real network, such as demo:asap")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = ResultFile(options.out)
    with tempfile.TemporaryDirectory() as folder, result.case("soak"):
        bundle = options.bundle or hollow_bundle(Path(folder) / "hollow")
        with Predictor(bundle, threads=1) as predictor:
            rows = soak(predictor, options.calls)
        record: dict[str, Any] = {"bundle": options.bundle or "hollow", "calls": options.calls}
        result.save({**record, "mb_per_10k_calls": round(slope(rows), 3), "rows": rows})
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
