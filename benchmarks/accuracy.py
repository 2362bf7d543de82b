"""Accuracy by precision: `python -m benchmarks.accuracy --data DIR --out FILE`.

Exports the three networks at every precision (int8 and fp8 with scales as they come and calibrated on the
training split), lets each bundle and the float32 network answer the same pairs of the sample set in DIR
(`dgm4 data make --out DIR`), and writes metrics, differences with paired bootstrap intervals, and agreement.
The networks are the trained tiny ones that ship with the package, on the whole test split, and the base ones
with weights drawn from the formula of the golden numbers, on a few pairs: what those answer means nothing,
but rounding must not change it. stdout gets the documentation's table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch

import dgm4
from benchmarks.results import ResultFile
from dgm4.config import MODEL_NAMES
from dgm4.shipped import demo_checkpoint
from engine.errors import VerificationError
from engine.layout import HALF_GRAPH
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import GATED, check_gate
from export.options import ExportOptions
from export.pipeline import export_bundle

# As the table names it: precision, whether activations are calibrated, the graph where it is no backend's.
VARIANTS = {
    "fp32": ("fp32", False, None),
    "fp16": ("fp16", False, None),
    "bf16": ("bf16", False, None),
    "int8 dynamic": ("int8", False, None),
    "int8 static": ("int8", True, None),
    "int8 in fp16": ("int8", True, HALF_GRAPH),
    "fp8": ("fp8", False, None),
    "fp8 static": ("fp8", True, None),
}


DEMO, DRAWN = "demo", "drawn"
CALIBRATION_PAIRS = {DEMO: 512, DRAWN: 32}  # of a base network a pair takes half a second
DRAWN_PAIRS, DRAWN_BATCH = 32, 8  # CALS as published holds some GB for 8 base pictures

Record = dict[str, Any]
Key = tuple[str, str, str]  # weights, network, variant


def checkpoint_of(weights: str, network: str, folder: Path) -> Path:
    """The demo's checkpoint, or one of the base network with drawn weights, written once into `folder`."""
    if weights == DEMO:
        return demo_checkpoint(network)
    path = folder / f"{network}-base-drawn.safetensors"
    if not path.exists():
        model = dgm4.seeded_model(network, "base")
        metadata = {"config": json.dumps(model.config.to_dict())}
        safetensors.torch.save_file(model.state_dict(), path, metadata=metadata)
    return path


def measure(key: Key, data: Path, folder: Path, pairs: int | None) -> Record:
    """Export one bundle and evaluate it; the record of `dgm4 evaluate`, with the gate's failures.

    Of drawn weights that lose more than an export allows, why it was refused.
    """
    weights, network, variant = key
    checkpoint = checkpoint_of(weights, network, folder)
    precision, calibrated, graph = VARIANTS[variant]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / f"{network}-{variant.replace(' ', '-')}"
        options = ExportOptions(
            out=out,
            checkpoint=checkpoint,
            precision=precision,
            engine=graph is not None,  # of which it is
            calibration=data if calibrated else None,
            calibration_pairs=CALIBRATION_PAIRS[weights],
        )
        try:
            export_bundle(options, lambda stage: None)
        except VerificationError as error:
            if weights == DEMO:
                raise
            refused = {"model": {"name": network}, "weights": weights, "variant": variant}
            return {**refused, "refused": str(error)}
        batch = DRAWN_BATCH if weights == DRAWN else None
        settings = EvaluateOptions(checkpoint=checkpoint, worst=0, limit=pairs, batch=batch, graph=graph)
        result = evaluate(out, data, settings, progress=True)
    if result.comparison is None:
        raise RuntimeError(f"{out}: no float32 network to compare with: {result.notes}")
    failures = check_gate(precision, result.scores.metrics, result.comparison.scores.metrics)
    record = result.to_dict()
    del record["decisions"]  # curves, which no table here shows
    return {
        **record,
        "bundle": out.name,
        "data": data.name,
        "weights": weights,
        "variant": variant,
        "gate": [str(f) for f in failures],
    }


def key_of(record: Record) -> Key:
    """What a record is of."""
    return record["weights"], record["model"]["name"], record["variant"]


def table(records: Iterable[Record]) -> str:
    """The demo's metrics in percent, its gate, and what agrees with float32."""
    result = {key_of(record): record for record in records}
    head = ["network", "precision", *GATED, "gate", "same verdict", "same types"]
    head += ["drawn base: moved", "same verdict", "same types"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for (weights, network, variant), record in result.items():
        if weights == DEMO:
            cells = [network.upper(), variant, *(f"{100 * record['metrics'][name]:.1f}" for name in GATED)]
            cells += ["failed" if record["gate"] else "passed", *_agreement(record)]
            drawn = result.get((DRAWN, network, variant))
            cells += _drawn_cells(drawn)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _drawn_cells(drawn: Record | None) -> list[str]:
    if drawn is None or "refused" in drawn:
        return ["-" if drawn is None else "refused"] * 3
    return [f"{_moved(drawn):.2f}", *_agreement(drawn)]


def _agreement(record: Record) -> list[str]:
    """Percent of pairs with float32's verdict, and of types (four a pair) with float32's decision."""
    agreement = record["reference"]["agreement"]
    return [f"{100 * agreement[name]:.1f}" for name in ("verdict", "types")]


def _moved(record: Record) -> float:
    """The largest distance of a gated metric from float32's, in percent points."""
    return max(abs(100 * record["reference"]["changes"][name]["value"]) for name in GATED)


def main() -> int:
    """Measure every network at every precision; 1 if a variant failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the sample set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    parser.add_argument("--weights", nargs="+", choices=(DEMO, DRAWN), default=(DEMO, DRAWN))
    parser.add_argument("--network", nargs="+", choices=MODEL_NAMES, default=MODEL_NAMES)
    parser.epilog = "What is not chosen stays as FILE has it."
    options = parser.parse_args()
    result = ResultFile(options.out)
    measured = {key_of(record): record for record in result.load("bundles")}
    order = [(w, n, v) for w in (DEMO, DRAWN) for n in MODEL_NAMES for v in VARIANTS]
    for weights in options.weights:
        pairs = DRAWN_PAIRS if weights == DRAWN else None
        for network in options.network:
            with tempfile.TemporaryDirectory() as folder:
                for variant in options.variants:
                    key = weights, network, variant
                    measured.pop(key, None)
                    with result.case(*key):
                        measured[key] = measure(key, options.data, Path(folder), pairs)
                    result.save({"bundles": [measured[key] for key in order if key in measured]})
    sys.stdout.write(table([measured[key] for key in order if key in measured]))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
