"""Compiled resize and normalisation beside Pillow and NumPy: `python -m benchmarks.preprocessing --out FILE`.

What it should gain, written down before it was built. A picture of 1200 x 800 is 800 rows of 256 outputs with
19 taps of 3 channels, 11.7 M products, then 256 rows of 256 x 3 outputs with 13 taps, 2.6 M, and 0.2 M levels
to look up. In AVX2 a step of 4 taps x 4 rows x 3 channels, 48 products, is 28 instructions, and the end of 4
outputs some 24: 7 M and 1.2 M instructions for the rows, 1.3 M for the columns, 0.6 M for the levels. At 3.5
instructions a cycle and 3 GHz that is 0.95 ms. Memory is no bound: 2.9 MB read, 0.8 MB written, the rows
between the passes stay in the first cache; 0.4 ms at 10 GB/s. Pillow and NumPy take 8.2 ms: 8 times as long.

All forms of one picture take turns in one process and thread; times are CPU time, so that a busy machine
disturbs them little; medians, and ratios are medians of the ratios of single turns. Batches, which several
threads share, are timed by the clock. Checks first that a thousand drawn sizes give the same bits in every
form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import ResultFile, Row
from engine import _native
from engine.inputs.network_input import _bands, _levels, join_slots, make_slots, network_input
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, resize_image

SIZE = 256
PICTURES = ((1200, 800), (512, 512), (640, 480), (800, 1200), (4000, 3000))
TURNS, BATCH = 41, 32
DRAWN, SEED, LARGEST = 1000, 0, 8000
Work = Callable[[], object]


def picture(width: int, height: int) -> Image.Image:
    """Smooth shapes with noise; what is in a picture does not change the time."""
    random = np.random.default_rng(SEED)
    low = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(low.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + random.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8))


def by_pillow(rgb: Image.Image) -> np.ndarray:
    """The form without compiled code."""
    return normalize_image(resize_image(rgb, SIZE))


def by_passes(passes: str, rgb: Image.Image, out: np.ndarray) -> None:
    """The compiled form with one set of instructions."""
    levels = _levels(CLIP_MEAN, CLIP_STD, out.dtype)
    _native.resample(_bands(rgb), *rgb.size, levels, out, passes=passes)  # type: ignore[misc,call-arg]


def in_turns(
    works: dict[str, Work], turns: int = TURNS, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Milliseconds of each work by `clock`, one call of each in every turn; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            started = clock()
            work()
            if turn:
                times[name].append(1e3 * (clock() - started))
    return times


def compare(times: dict[str, list[float]], base: str) -> Row:
    """Median and least time of each, and how many times faster than `base`."""
    return {
        name: {
            "median_ms": round(statistics.median(found), 3),
            "least_ms": round(min(found), 3),
            "ratio": round(statistics.median(b / x for b, x in zip(times[base], found, strict=True)), 2),
        }
        for name, found in times.items()
    }


def one_picture(width: int, height: int) -> Row:
    """A picture from Pillow's memory to a slot, in every form."""
    rgb, out = picture(width, height), make_slots(1, SIZE)[0]
    works: dict[str, Work] = {"Pillow and NumPy": lambda: by_pillow(rgb)}
    for passes in _native.passes:
        works[passes] = lambda passes=passes: by_passes(passes, rgb, out)  # type: ignore[misc]
    turns = TURNS if width * height < 4_000_000 else TURNS // 4
    return {"width": width, "height": height, "forms": compare(in_turns(works, turns), "Pillow and NumPy")}


def one_batch(threads: int) -> Row:
    """A batch of 1200 x 800 pictures by so many threads: stacked as before, and in slots."""
    rgbs = [picture(1200, 800)] * BATCH
    with ThreadPoolExecutor(threads) as pool:

        def stacked() -> np.ndarray:
            """As it was: resized in threads, normalised and stacked where the batch is submitted."""
            return np.stack([normalize_image(x) for x in pool.map(lambda rgb: resize_image(rgb, SIZE), rgbs)])

        def slots() -> np.ndarray:
            places = make_slots(BATCH, SIZE)
            return join_slots(
                list(
                    pool.map(
                        lambda x: network_input(x[0], SIZE, CLIP_MEAN, CLIP_STD, x[1]),
                        zip(rgbs, places, strict=True),
                    )
                )
            )

        if not np.array_equal(stacked(), slots()):
            raise RuntimeError("the two batches differ")
        times = in_turns({"stacked": stacked, "slots": slots}, 15, time.perf_counter)
    return {"pictures": BATCH, "threads": threads, "forms": compare(times, "stacked")}


def sizes() -> Iterator[tuple[int, int]]:
    """The drawn sizes: one pixel, tall, wide and huge ones among them."""
    yield from ((1, 1), (1, 8000), (8000, 1), (2, 65536), (65536, 2), (3000, 2200), (256, 256), (255, 257))
    random = np.random.default_rng(SEED)
    for _ in range(DRAWN - 8):
        width, height = np.exp(random.uniform(0, np.log(LARGEST), 2)).astype(int)
        shrink = max(1.0, (width * height / 2_000_000) ** 0.5)
        yield max(1, int(width / shrink)), max(1, int(height / shrink))


def check_bits() -> Row:
    """Compare every form with Pillow's on drawn pictures of the drawn sizes."""
    random, different, pixels = np.random.default_rng(SEED), [], 0
    for width, height in sizes():
        drawn = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rgb = Image.fromarray(drawn if random.random() < 0.7 else (drawn > 127).astype(np.uint8) * 255)
        wanted, pixels = by_pillow(rgb), pixels + width * height
        for dtype in (np.float32, np.float16):
            for passes in _native.passes:
                out = np.full((3, SIZE, SIZE), np.nan, dtype)
                by_passes(passes, rgb, out)
                if not np.array_equal(out, wanted.astype(dtype)):
                    different.append([width, height, passes, np.dtype(dtype).name])
    return {"sizes": DRAWN, "pixels": pixels, "passes": list(_native.passes), "different": different}


def table(record: Row) -> str:
    """The documentation's table: milliseconds of CPU time, and how many times Pillow and NumPy take."""
    forms = list(record["pictures"][0]["forms"])
    lines = ["| picture | " + " | ".join(forms) + " |", "| " + " | ".join(["---"] * (len(forms) + 1)) + " |"]
    for row in record["pictures"]:
        base, *others = row["forms"].values()
        cells = [f"{row['width']} x {row['height']}", f"{base['median_ms']:.1f} ms"]
        cells += [f"{form['median_ms']:.1f} ms ({form['ratio']:.1f}x)" for form in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check, measure, write and print; 1 if bits differ or a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocessing", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    result = ResultFile(options.out)
    record: dict[str, Any] = {"pillow": Image.__version__, "native": _native.describe(), "predicted_ratio": 8}
    if not _native.passes:
        parser.error(f"the extension was not built: {_native.absent}")
    with result.case("bits"):
        record["bits"] = check_bits()
        if record["bits"]["different"]:
            result.fail("bits", error="forms differ")
    record["pictures"], record["batches"] = [], []
    for size in PICTURES:
        with result.case(*map(str, size)):
            record["pictures"].append(one_picture(*size))
    for threads in (1, 2):
        with result.case("batch", str(threads)):
            record["batches"].append(one_batch(threads))
    result.save(record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
