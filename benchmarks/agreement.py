"""How far the networks' forms are from each other: `python -m benchmarks.agreement --out FILE`.

Base networks, with weights drawn from the formula of the golden numbers. ONNX Runtime and torch run the
float32 network at every batch and caption length of SHAPES: the largest difference of each output. Then torch
runs it at each lower precision on two pairs of 50 tokens: the RMS of the difference over the RMS of the
float32 output. For a network that chooses neighbours also what the choices do: how far their scores are from
float64's, how near the last taken is to the first not taken, and how many of them each precision changes.
Rows of other networks stay in FILE. No time is measured, so the machine need not be quiet.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import dgm4
from benchmarks.results import ResultFile
from engine.network.model import InferenceModel
from engine.network.precision import set_precision
from engine.registry import NAMES, NETWORKS, SIZES, TENSORS
from export.graph.choices import changed_choices, choice_scores, chosen, margins
from export.graph.parity import Arrays, case_inputs, onnx_outputs, relative_errors, torch_outputs
from export.graph.rewrite import rewrite, sharing
from export.graph.trace import export_onnx
from export.quantization.qdq import to_int8

BATCHES, TOKENS = (1, 3, 8), (9, 12, 50, 128)
SHAPES = [(batch, tokens) for batch in BATCHES for tokens in TOKENS]
ROUNDED_CASE = (2, 50)
ASKED = 1e-4  # of float32, in any output
PRECISIONS = ("fp16", "bf16", "int8", "fp8")

Row = dict[str, Any]
Feeds = Sequence[Mapping[str, Tensor]]


def compared(want: Arrays, got: Arrays) -> Row:
    """The largest difference of each output; of one that may jump also how many values did, by over ASKED."""
    apart = {name: np.abs(got[name] - want[name]) for name in want}
    row: Row = {"largest": {name: float(x.max()) for name, x in apart.items()}}
    jumps = {name: x for name, x in apart.items() if TENSORS[name].jumps}
    if jumps:
        row["jumped"] = {name: int((x > ASKED).sum()) for name, x in jumps.items()}
        row["values"] = {name: x.size for name, x in jumps.items()}
    return row


def float32_rows(network: InferenceModel, folder: Path) -> list[Row]:
    """ONNX Runtime against torch, one row a shape."""
    graph = folder / "model.onnx"
    export_onnx(network, graph)
    rows: list[Row] = []
    for shape, inputs in zip(SHAPES, case_inputs(network.config, SHAPES, seed=5), strict=True):
        want = torch_outputs(network, network.config, [inputs])[0]
        got = onnx_outputs(graph, network.config, [inputs])[0]
        rows.append({"batch": shape[0], "tokens": shape[1], **compared(want, got)})
        print(network.config.name, rows[-1], flush=True)
    return rows


def lowered(network: InferenceModel, precision: str) -> InferenceModel:
    """A copy in that precision; int8 with activations rounded as they come."""
    if precision == "int8":
        return to_int8(sharing(network), None)
    return set_precision(sharing(network), precision)


def precision_rows(network: InferenceModel, feeds: Feeds) -> list[Row]:
    """Each lower precision against float32: the errors, and what it chooses otherwise."""
    want, rows = torch_outputs(network, network.config, feeds), []
    for precision in PRECISIONS:
        rounded = lowered(network, precision)
        errors = relative_errors(want, torch_outputs(rounded, network.config, feeds))
        changed, total = changed_choices(network, rounded, feeds)
        rows.append({"precision": precision, "relative": errors, "changed": changed, "choices": total})
        print(network.config.name, rows[-1], flush=True)
    return rows


def choice_row(network: InferenceModel, feeds: Feeds) -> Row | None:
    """What float32 leaves open of the choices, against float64; None for a network that makes none."""
    if not choice_scores(network, feeds[0]):
        return None
    double = copy.deepcopy(network).double()
    noise, changed, total = 0.0, 0, 0
    for inputs in feeds:
        wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        for (_, ours), (_, exact) in zip(
            choice_scores(network, inputs), choice_scores(double, wide), strict=True
        ):
            noise = max(noise, float((ours - exact).nan_to_num().abs().max()))
        for ours, exact in zip(chosen(network, inputs), chosen(double, wide), strict=True):
            changed, total = changed + int((exact & ~ours).sum()), total + int(exact.sum())
    least = min(float(margins(network, inputs).min()) for inputs in feeds)
    return {"noise": noise, "least_margin": least, "changed": changed, "choices": total}


def measure(name: str, size: str) -> Row:
    """The rows of one network."""
    network = rewrite(dgm4.seeded_model(name, size))
    feeds = case_inputs(network.config, [ROUNDED_CASE])
    row: Row = {"network": name, "choice": choice_row(network, feeds)}
    print(name, row["choice"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        row["float32"] = float32_rows(network, Path(folder))
    return {**row, "precisions": precision_rows(network, feeds)}


def table(rows: Iterable[Row]) -> str:
    """The documentation's: float32's largest difference, and each precision's error in its worst output.

    The former of the outputs that do not jump.
    """
    lines = [_line("network", "fp32, largest", *PRECISIONS), _line(*["---"] * (2 + len(PRECISIONS)))]
    for row in rows:
        apart = max(
            x for shape in row["float32"] for name, x in shape["largest"].items() if not TENSORS[name].jumps
        )
        errors = [f"{100 * max(x['relative'].values()):.1f} %" for x in row["precisions"]]
        lines.append(_line(NETWORKS[row["network"]].title, f"{apart:.0e}", *errors))
    return "".join(lines)


def choice_table(rows: Iterable[Row]) -> str:
    """The documentation's: of a network's choices, how many each precision changes."""
    lines = [_line("network", "choices", "fp32", *PRECISIONS), _line(*["---"] * (3 + len(PRECISIONS)))]
    for row in rows:
        if row["choice"] is not None:
            changed = [str(x["changed"]) for x in (row["choice"], *row["precisions"])]
            lines.append(_line(NETWORKS[row["network"]].title, str(row["choice"]["choices"]), *changed))
    return "".join(lines)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def main() -> int:
    """Measure, write and print; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--size", default="base", choices=SIZES, help="%(default)s")
    parser.add_argument("--network", nargs="+", default=NAMES, choices=NAMES, help="all by default")
    options = parser.parse_args()
    result = ResultFile(options.out)
    rows = [row for row in result.load("rows") if row["network"] not in options.network]
    for name in options.network:
        with result.case(name):
            rows.append(measure(name, options.size))
        result.save({"weights": "drawn", "size": options.size, "rounded_case": ROUNDED_CASE, "rows": rows})
    print(table(rows), choice_table(rows), sep="\n", end="")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
