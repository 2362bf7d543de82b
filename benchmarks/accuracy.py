"""The demo's accuracy by precision: `python -m benchmarks.accuracy --data DIR --out FILE`.

Exports the three trained tiny networks that ship with the package at every precision (int8 and fp8 with
scales as they come and calibrated on the training split), lets each bundle and the float32 network answer
the test split of the sample set in DIR (`dgm4 data make --out DIR`), and writes metrics, differences with
paired bootstrap intervals, and agreement. stdout gets the README's table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from dgm4.config import MODEL_NAMES
from dgm4.shipped import demo_checkpoint
from export.evaluate import EvaluateOptions, evaluate
from export.gate import GATED, check_gate
from export.options import ExportOptions
from export.pipeline import export_bundle

# As the table names it: precision, and whether activations are calibrated.
VARIANTS = {
    "fp32": ("fp32", False),
    "fp16": ("fp16", False),
    "bf16": ("bf16", False),
    "int8 dynamic": ("int8", False),
    "int8 static": ("int8", True),
    "fp8": ("fp8", False),
    "fp8 static": ("fp8", True),
}


def measure(network: str, variant: str, data: Path, folder: Path) -> dict[str, Any]:
    """Export one bundle and evaluate it; the record of `dgm4 evaluate`, with the gate's failures."""
    checkpoint = demo_checkpoint(network)
    precision, calibrated = VARIANTS[variant]
    out = folder / f"{network}-{variant.replace(' ', '-')}"
    options = ExportOptions(
        out=out,
        checkpoint=checkpoint,
        precision=precision,
        engine=False,
        calibration=data if calibrated else None,
    )
    export_bundle(options, lambda stage: None)
    found = evaluate(out, data, EvaluateOptions(checkpoint=checkpoint, worst=0), progress=True)
    if found.comparison is None:
        raise RuntimeError(f"{out}: no float32 network to compare with: {found.note}")
    failures = check_gate(precision, found.scores.metrics, found.comparison.scores.metrics)
    return {
        **found.to_dict(),
        "bundle": out.name,
        "data": data.name,
        "variant": variant,
        "gate": [str(f) for f in failures],
    }


def table(records: list[dict[str, Any]]) -> str:
    """The README's table: metrics in percent, decisions that agree with float32, and the gate."""
    head = ["network", "precision", *GATED, "same verdict", "gate"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for record in records:
        cells = [record["model"]["name"].upper(), record["variant"]]
        cells += [f"{100 * record['metrics'][name]:.1f}" for name in GATED]
        cells += [f"{100 * record['reference']['agreement']['verdict']:.1f}"]
        lines.append("| " + " | ".join([*cells, "failed" if record["gate"] else "passed"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every network at every precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the sample set")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=tuple(VARIANTS),
        help="others stay as FILE has them",
    )
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["bundles"] if options.out.exists() else []
    found = {(x["model"]["name"], x["variant"]): x for x in kept}
    with tempfile.TemporaryDirectory() as folder:
        for network in MODEL_NAMES:
            for variant in options.variants:
                found[network, variant] = measure(network, variant, options.data, Path(folder))
    order = [(network, variant) for network in MODEL_NAMES for variant in VARIANTS]
    records = [found[key] for key in order if key in found]
    result = {"machine": describe_machine(), "bundles": records}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(records))


if __name__ == "__main__":
    main()
