"""Decoders beside Pillow, and the price of decode="fast": `python -m benchmarks.decoding --out FILE`.

Times Pillow, Pillow's scaled decoding and every other decoder that is installed (`pip install simplejpeg
PyTurboJPEG opencv-python-headless imagecodecs pyspng`; LIBTURBOJPEG names PyTurboJPEG's library where it is
not found), in turns in one process and thread, from bytes to RGB, and says whether the pixels are Pillow's.
Times are CPU time, medians; ratios are medians of the ratios of turns.

With --data, a sample set (`dgm4 data make --out DIR`), the demo's three networks in float32 answer its test
pairs with both ways of decoding. The set's images are small, so they are enlarged 3 and 4 times, given the
noise of a camera, and saved as JPEG: then "fast" reads them at 1/2 and 1/4. Differences of metrics come with
paired bootstrap intervals. As `dgm4 evaluate --decode fast` beside `--decode exact`, a user can see the price
on other pictures and networks.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.preprocessing import compare, in_turns, picture
from benchmarks.results import ResultFile, Row
from dgm4.config import MODEL_NAMES
from dgm4.data.annotations import split_file
from dgm4.metrics import LabelledOutputs, bootstrap_difference, summarise
from dgm4.shipped import demo_checkpoint
from engine import ImageOptions
from engine.bundle import Bundle
from engine.inputs.preprocess import decode_image
from export.evaluation.gate import GATED
from export.evaluation.running import BUNDLE, RunOptions, run_bundle
from export.options import ExportOptions
from export.pipeline import export_bundle

SIDE, TURNS = 256, 21
FACTORS, NOISE, QUALITY = (3, 4), 4.0, 90
FILES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "JPEG 1200 x 800, 4:2:0": ("JPEG", (1200, 800), {"quality": 90}),
    "JPEG 1200 x 800, 4:4:4": ("JPEG", (1200, 800), {"quality": 95, "subsampling": 0}),
    "JPEG 1200 x 800, progressive": ("JPEG", (1200, 800), {"quality": 90, "progressive": True}),
    "JPEG 4000 x 3000, 4:2:0": ("JPEG", (4000, 3000), {"quality": 90}),
    "PNG 512 x 512": ("PNG", (512, 512), {}),
    "WebP 1200 x 800": ("WEBP", (1200, 800), {"quality": 85}),
    "WebP 512 x 512, lossless": ("WEBP", (512, 512), {"lossless": True}),
}
Decoder = Callable[[bytes], Any]


def encode(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoders(format: str) -> dict[str, Decoder]:
    """The engine's two ways, and the other decoders of a format that are installed."""
    fast = ImageOptions(decode="fast")
    found: dict[str, Decoder] = {
        "Pillow": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "decode_image, exact": lambda data: decode_image(data, side=SIDE).rgb,
        "decode_image, fast": lambda data: decode_image(data, options=fast, side=SIDE).rgb,
    }
    if installed("simplejpeg") and format == "JPEG":
        import simplejpeg

        found["simplejpeg"] = simplejpeg.decode_jpeg
        found["simplejpeg, scaled"] = partial(simplejpeg.decode_jpeg, min_height=SIDE, min_width=SIDE)
    if installed("turbojpeg") and format == "JPEG":
        import turbojpeg

        library = functools.cache(lambda: turbojpeg.TurboJPEG(os.environ.get("LIBTURBOJPEG")))
        found["PyTurboJPEG"] = lambda data: library().decode(data, pixel_format=turbojpeg.TJPF_RGB)
    if installed("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if installed("imagecodecs"):
        import imagecodecs

        names = {"JPEG": ("jpeg8",), "PNG": ("png", "spng"), "WEBP": ("webp",)}[format]
        found |= {f"imagecodecs.{name}": getattr(imagecodecs, f"{name}_decode") for name in names}
    if installed("pyspng") and format == "PNG":
        import pyspng

        found["pyspng"] = pyspng.load
    return found


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def one_file(name: str) -> Row:
    """Times of all decoders of one file, and whether their pixels are Pillow's."""
    format, size, options = FILES[name]
    data = encode(picture(*size), format, options)
    works, failed = dict[str, Decoder](), dict[str, str]()
    wanted, equal, shapes = np.asarray(decode_image(data).rgb), {}, {}
    for decoder, decode in decoders(format).items():
        try:
            pixels = np.asarray(decode(data))
        except Exception as error:  # of any library; the others are measured
            failed[decoder] = f"{type(error).__name__}: {error}"
            continue
        works[decoder], shapes[decoder] = decode, pixels.shape[:2]
        equal[decoder] = bool(np.array_equal(pixels, wanted))
    turns = TURNS if size[0] < 2000 else TURNS // 3
    times = in_turns({decoder: partial(work, data) for decoder, work in works.items()}, turns)
    rows = compare(times, "Pillow")
    for decoder, row in rows.items():
        row |= {"equal": equal[decoder], "height_width": list(shapes[decoder])}
    return {"file": name, "bytes": len(data), "decoders": rows, "failed": failed}


def enlarge(data: Path, out: Path, factor: int, pairs: int) -> None:
    """The first `pairs` of the test split of `data`, images `factor` times as large, with noise, as JPEG."""
    records, random = (
        json.loads(split_file(data, "test").read_text(encoding="utf-8")),
        np.random.default_rng(0),
    )
    for record in (records := records[:pairs]):
        path = record["image"].partition("/")[2]
        with Image.open(data / path) as image:
            large = image.convert("RGB").resize(
                (factor * image.width, factor * image.height), Image.Resampling.LANCZOS
            )
        noise = random.normal(0, NOISE, (large.height, large.width, 1))
        noisy = np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)
        target = out / path
        if not target.exists():  # pairs may share an image
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).save(target, "JPEG", quality=QUALITY)
        for field in ("fake_image_box", "mtcnn_boxes"):
            record[field] = (factor * np.array(record[field])).tolist()
    split_file(out, "test").parent.mkdir(parents=True)
    split_file(out, "test").write_text(json.dumps(records), encoding="utf-8")


def price(bundle: Bundle, data: Path, factor: int) -> Row:
    """A network's metrics with both ways of decoding, what changes, and the seconds of waiting for images."""
    runs = {
        decode: run_bundle(
            bundle, data, RunOptions(decode=decode, backend="ort", device="cpu", on_bad="raise")
        )
        for decode in ("exact", "fast")
    }
    exact, fast = (runs[decode].scored.outputs[BUNDLE] for decode in ("exact", "fast"))
    intervals = bootstrap_difference(fast, exact)
    metrics = {decode: summarise(*run.scored.outputs[BUNDLE]) for decode, run in runs.items()}
    changes = {
        name: {"value": metrics["fast"][name] - metrics["exact"][name], "interval": list(intervals[name])}
        for name in GATED
    }
    return {
        "network": bundle.manifest.model.name,
        "enlarged": factor,
        "pairs": len(exact.labels),
        **{decode: {name: found[name] for name in GATED} for decode, found in metrics.items()},
        "changes": changes,
        **moved(exact, fast),
    }


def moved(exact: LabelledOutputs, fast: LabelledOutputs) -> Row:
    """How far scores move, and the share of pairs whose verdict stays."""
    scores = [softmax(x.logits_real_fake) for x in (exact, fast)]
    distance = np.abs(scores[0] - scores[1])
    same = (scores[0] >= 0.5) == (scores[1] >= 0.5)
    return {
        "same_verdict": float(same.mean()),
        "score_moved": {"median": float(np.median(distance)), "largest": float(distance.max())},
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probability of the second class, [B]."""
    return np.asarray(1 / (1 + np.exp(logits[:, 0].astype(float) - logits[:, 1])))


def accuracy(
    data: Path, pairs: int, factors: Sequence[int], result: ResultFile, save: Callable[[Row], None]
) -> None:
    """Run the demo's three networks on the enlarged sets."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for factor in factors:
            enlarge(data, folder / str(factor), factor, pairs)
        for name in MODEL_NAMES:
            with result.case(name):
                export_bundle(
                    ExportOptions(
                        out=folder / name, checkpoint=demo_checkpoint(name), precision="fp32", engine=False
                    ),
                    lambda stage: None,
                )
                for factor in factors:
                    save(price(Bundle.open(folder / name), folder / str(factor), factor))
            shutil.rmtree(folder / name, ignore_errors=True)


def table(rows: list[Row]) -> str:
    """The documentation's table of decoders: CPU time, how many times faster than Pillow, and the pixels."""
    lines = ["| file | decoder | CPU time | beside Pillow | pixels |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        for name, found in row["decoders"].items():
            height, width = found["height_width"]
            pixels = "Pillow's" if found["equal"] else f"{width} x {height}"
            cells = [row["file"], name, f"{found['median_ms']:.1f} ms", f"{found['ratio']:.2f}x", pixels]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def price_table(rows: list[Row]) -> str:
    """The documentation's table of what "fast" costs, in points, with 95 % intervals."""
    head = ["network", "enlarged", *GATED, "same verdict", "score moved, median", "largest"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        cells = [row["network"].upper(), f"{row['enlarged']}x"]
        for name in GATED:
            change = row["changes"][name]
            value, low, high = (100 * x for x in (change["value"], *change["interval"]))
            cells.append(f"{100 * row['exact'][name]:.1f} {value:+.2f} [{low:+.2f}, {high:+.2f}]")
        cells.append(f"{100 * row['same_verdict']:.1f} %")
        cells += [f"{row['score_moved'][name]:.4f}" for name in ("median", "largest")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write and print; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the sample set, for the accuracy")
    parser.add_argument("--pairs", type=int, default=800, help="%(default)s")
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS, help="%(default)s")
    options = parser.parse_args()
    result = ResultFile(options.out)
    names = ("pillow", "simplejpeg", "PyTurboJPEG", "opencv-python-headless", "imagecodecs", "pyspng")
    versions = {
        x.metadata["Name"]: x.version
        for x in importlib.metadata.distributions()
        if x.metadata["Name"] in names
    }
    record: dict[str, Any] = {"versions": versions, "files": [], "accuracy": []}
    for name in FILES:
        with result.case(name):
            record["files"].append(one_file(name))
        result.save(record)

    def keep(row: Row) -> None:
        record["accuracy"].append(row)
        result.save(record)

    if options.data is not None:
        accuracy(options.data, options.pairs, options.factors, result, keep)
    result.save(record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
