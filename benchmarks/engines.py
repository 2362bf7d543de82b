"""What TensorRT engines cost and how fast they answer: `python -m benchmarks.engines --data DIR --out FILE`.

Exports the base networks with drawn weights at every precision, int8 and fp8 calibrated on a few pairs of
the sample set in DIR (`dgm4 data make --out DIR`), and measures the engine of each: seconds and peak memory
of its build, and its size against the graph's weights. Where the machine can run the engine, also the latency
of `Predictor`'s backend "tensorrt". Where the full TensorRT builds, every engine is made twice: with our
kernels as plugins, and with TensorRT's own. stdout gets a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from benchmarks.deployment import measure
from benchmarks.results import ResultFile
from dgm4.config import MODEL_NAMES, SIZES
from engine import Bundle
from engine.errors import BackendError
from export.bench.measure import BenchOptions, bench
from export.options import CALIBRATED, PRECISIONS
from export.trt import build as trt
from export.trt.engine_file import graph_of

BACKEND = "tensorrt"
CALIBRATION_PAIRS = 16  # which set scales; the cost does not depend on them
TOKENS = 50
LIMITS = {"build_s": 30.0, "build_peak_mb": 4000.0, "size_ratio": 1.05}  # asked for, on two cores

Row = dict[str, Any]
Key = tuple[str, str, bool]


def weights_bytes(graph: Path) -> int:
    """Bytes of all initializers of an ONNX file, its external data included but not read."""
    tensors = onnx.load_model(graph, load_external_data=False).graph.initializer
    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in tensors
    )


def cost(
    network: str, precision: str, plugins: str, data: Path | None, folder: Path, size: str = "base"
) -> tuple[Bundle, Row]:
    """Export one network with its engine; the bundle, and what the build took.

    `data` calibrates int8 and fp8, which have no engine without. Raises BackendError with the export's last
    words where it fails or leaves no engine.
    """
    out = folder / f"{network}-{precision}-{plugins}"
    command = [sys.executable, "-m", "export.cli", "export", "--model", network, "--size", size, "--drawn"]
    command += ["--precision", precision, "--plugins", plugins, "--out", str(out), "--json"]
    if precision in CALIBRATED and data is not None:
        command += ["--calibration", str(data), "--calibration-pairs", str(CALIBRATION_PAIRS)]
    report = json.loads(measure(command)["stdout"])
    stages = {stage["stage"]: stage for stage in report["stages"]}
    if not report["manifest"]["engines"]:
        raise BackendError(f"{network} {precision}: {stages['engine']['text']}")
    record = report["manifest"]["engines"][0]
    built, weights = (
        report["manifest"]["files"][record["file"]]["bytes"],
        weights_bytes(out / graph_of(report["manifest"]["files"])),
    )
    return Bundle.open(out), {
        "network": network,
        "precision": precision,
        "plugins": sum(record["plugins"].values()),
        "fused_attention": record["fused_attention"],
        "library": f"{record['library']} {record['version']}",
        "compute_capabilities": record["compute_capabilities"],
        "export_s": round(sum(s["seconds"] for name, s in stages.items() if name != "engine"), 1),
        "build_s": record["build"]["seconds"],
        "build_peak_mb": round(record["build"]["peak_memory_mb"] * 2**20 / 1e6),
        "engine_mb": round(built / 1e6, 1),
        "weights_mb": round(weights / 1e6, 1),
        "size_ratio": round(built / weights, 4),
    }


def speed(bundle: Bundle, seconds: float = 3.0) -> Row:
    """Latency of the backend at several batches, by `dgm4 bench`; or why there is none."""
    options = BenchOptions(backends=(BACKEND,), tokens=TOKENS, seconds=seconds)
    try:
        result = bench(bundle, options)
    except BackendError as error:
        return {"latency": {}, "not_run": str(error)}
    return {
        "latency": {
            str(row.batch): {**row.inference, "pairs_per_s": row.model_pairs_per_s} for row in result.rows
        }
    }


def cases(networks: Iterable[str], precisions: Iterable[str]) -> list[tuple[str, str, str]]:
    """Network, precision and plugins ("on" or "off") of every engine; with plugins where there can be any.

    Raises BackendError where nothing here builds engines.
    """
    builder = trt.find_builder()
    if builder is None:
        raise BackendError(f"nothing here builds engines ({_reasons()})")
    forms = ("on", "off") if builder.library == "tensorrt" else ("off",)
    return [(name, precision, form) for name in networks for precision in precisions for form in forms]


def measure_engine(
    network: str, precision: str, plugins: str, data: Path | None = None, size: str = "base"
) -> Row:
    """Export, build and time one engine; see `cost` and `speed`."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, row = cost(network, precision, plugins, data, Path(folder), size)
        return {**row, **speed(bundle), "load": round(os.getloadavg()[0], 2)}


def part(network: str, precision: str) -> Iterator[Row]:
    """A part of `python -m benchmarks.gpu`: full TensorRT's engine, with our kernels and with its own.

    Raises RuntimeError at the end if one failed.
    """
    if not any(info.usable and info.library == "tensorrt" for info in trt.describe_builders()):
        yield {"missing": _reasons()}
        return
    failed = []
    for case in cases([network], [precision]):
        try:
            yield measure_engine(*case)
        except BackendError as error:  # the other engines are still measured
            failed.append(f"{' '.join(case)}: {error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def _reasons() -> str:
    return "; ".join(f"{info.library}: {info.reason}" for info in trt.describe_builders())


def asked(rows: Sequence[Row]) -> str:
    """How many of the engines keep to `LIMITS`, in a line."""
    within = [row for row in rows if all(row[name] <= limit for name, limit in LIMITS.items())]
    limits = ", ".join(f"{name} {limit:g}" for name, limit in LIMITS.items())
    return f"{len(within)} of {len(rows)} within: {limits}\n"


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown: cost, and milliseconds a call by batch where any engine ran."""
    batches = sorted({int(b) for row in rows for b in row["latency"]})
    head = [
        "network",
        "precision",
        "plugins",
        "fused attentions",
        "build s",
        "peak MB",
        "engine MB",
        "weights MB",
        "ratio",
    ]
    head += [f"{b} pairs, p50 ms" for b in batches]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        cells = [row["network"].upper(), row["precision"], str(row["plugins"]), str(row["fused_attention"])]
        cells += [f"{row['build_s']:.1f}", f"{row['build_peak_mb']:,}", f"{row['engine_mb']:.0f}"]
        cells += [f"{row['weights_mb']:.0f}", f"{row['size_ratio']:.3f}"]
        cells += [f"{row['latency'][str(b)]['p50']:.2f}" if row["latency"] else "-" for b in batches]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the data after every engine, print the table; 1 if an engine failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the sample set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file")
    parser.add_argument("--network", nargs="+", default=MODEL_NAMES, choices=MODEL_NAMES)
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--size", default="base", choices=SIZES, help="%(default)s")
    parser.epilog = "What is not chosen stays as FILE has it."
    options = parser.parse_args()
    result = ResultFile(options.out)
    measured = {key_of(row): row for row in result.load("rows")}
    ordered = list(measured.values())
    for network, precision, plugins in cases(options.network, options.precision):
        measured.pop((network, precision, plugins == "on"), None)
        with result.case(network, precision, f"plugins {plugins}"):
            row = measure_engine(network, precision, plugins, options.data, options.size)
            measured[key_of(row)] = row
            sys.stderr.write(json.dumps(row) + "\n")
        ordered = [measured[key] for key in sorted(measured, key=_place)]
        result.save({"rows": ordered})
    sys.stdout.write(table(ordered) + asked(ordered))
    return result.exit_code


def key_of(row: Row) -> Key:
    """What a row is of: network, precision, and whether our kernels are inside."""
    return row["network"], row["precision"], row["plugins"] > 0


def _place(key: Key) -> tuple[int, int, bool]:
    network, precision, plugins = key
    return MODEL_NAMES.index(network), PRECISIONS.index(precision), not plugins


if __name__ == "__main__":
    sys.exit(main())
