"""`dgm4 inspect`: verify a bundle and show what it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgm4.places import check_data
from engine.backends import serving
from engine.bundle import Bundle
from engine.progress import progress_bar
from export.bundle.card import grouped, largest_text, score_calibration_text
from export.cli.arguments import Verbs
from export.output import open_output

_KINDS = {
    "trained": "trained",
    "demo": "demo: trained on made images, no detector of real manipulations",
    "drawn": "not trained",
}


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "inspect",
        help="verify a bundle and show what it is",
        description="Verify the hash of every file of a bundle, and show its network, weights, limits, "
        "thresholds, engines and the backends that serve it here.",
        epilog="examples:\n  dgm4 inspect my-bundle\n  dgm4 inspect my-bundle --layers --data DGM4",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--layers", action="store_true", help="each Linear layer's error against float32 too")
    parser.add_argument("--data", type=Path, metavar="DIR", help="its pairs for --layers; else drawn inputs")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="(%(default)s)")
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="its owner must have signed the bundle; Ed25519 in PEM",
    )
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Verify every file of a bundle and print what it is."""
    if not options.layers and (
        options.data is not None or options.split != options.parser.get_default("split")
    ):
        options.parser.error("--data and --split are for --layers: give that too")
    if options.data is not None:
        check_data(options.data)
    bundle = Bundle.open(options.bundle, public_key=options.public_key)
    bundle.verify_all()
    record = bundle.describe() | {"backends": serving(bundle)}
    if options.layers:
        record["layers"] = _layers(bundle, options)
    with open_output(None) as out:
        out.write(json.dumps(record, indent=2) + "\n" if options.json else _describe(record))
        if options.public_key is not None and not options.json:
            out.write(f"signed     by the owner of {options.public_key}\n")
    return 0


def _layers(bundle: Bundle, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the error of each layer, with a bar."""
    from export.quantization.sensitivity import PAIRS, bundle_errors

    with progress_bar("layers", PAIRS if options.data else None, "pairs", not options.quiet) as bar:
        errors = bundle_errors(bundle, options.data, options.split, progress=bar.update)
    return [asdict(error) for error in errors]


def _describe(record: dict[str, Any]) -> str:
    model, weights = record["model"], record["weights"]
    lines = [
        f"{record['path']}: {model['name']} {model['size']}, {record['precision']}, every hash agrees",
        f"weights    {weights['source']}; {_KINDS[weights['kind']]}",
        f"limits     batch {record['limits']['max_batch']}, tokens of a caption "
        f"{record['preprocess']['max_tokens']} (the graph takes {record['limits']['max_tokens']})",
    ]
    lines += _precision_lines(record) + _score_lines(record)
    for name, entry in record["files"].items():
        lines.append(f"file       {name}: {entry['bytes'] / 1e6:.1f} MB, SHA-256 {entry['sha256'][:16]}...")
    lines += [f"engine     {_engine_text(engine)}" for engine in record["engines"]]
    for stage in record["verification"]:
        lines.append(
            f"verified   {stage['stage']} against {stage['against']}: max {stage['max']:.2e}, "
            f"RMS {stage['rms']:.2e}"
        )
    lines += [
        f"served by  {name}{f': needs {why}' if why else ''}" for name, why in record["backends"].items()
    ]
    if "layers" in record:
        lines += _layer_lines(record["layers"]) or [f"layers     none is rounded in {record['precision']}"]
    return "\n".join(lines) + "\n"


def _engine_text(engine: dict[str, Any]) -> str:
    """File, builder, GPUs, the largest pairs x tokens of each profile, and what else it is."""
    largest = largest_text(engine["profiles"])
    capabilities = ", ".join(engine["compute_capabilities"])
    made_for = {"ampere": "8.0 and later", "same": f"every GPU of {capabilities}", None: capabilities}
    parts = [
        f"{engine['file']}: {engine['library']} {engine['version']}",
        f"for {made_for[engine['hardware']]}",
        *([f"up to {largest} pairs x tokens"] if largest else []),
        *([f"plugins {', '.join(engine['plugins'])}"] if engine["plugins"] else []),
        *([f"{engine['fused_attention']} fused attentions"] if engine["fused_attention"] else []),
        *(["weights stripped"] if engine["stripped"] else []),
        *(["version-compatible"] if engine["version_compatible"] else []),
    ]
    return ", ".join(parts)


def _precision_lines(record: dict[str, Any]) -> list[str]:
    """What was calibrated, and what is not in the bundle's precision."""
    lines = []
    if calibration := record.get("calibration"):
        lines.append("calibrated {method}, {pairs} pairs of {source}".format(**calibration))
    if floating := record["float32_layers"]:
        lines.append(f"float32    {len(floating)} modules: {', '.join(grouped(floating))}")
    if kept := record["kept_layers"]:
        lines.append(f"kept       a step above {record['precision']}: {', '.join(kept)}")
    return lines


def _score_lines(record: dict[str, Any]) -> list[str]:
    """Thresholds, and how the scores were calibrated."""
    lines = ["thresholds " + ", ".join(f"{name} {x:.4g}" for name, x in record["thresholds"].items())]
    if calibration := record.get("score_calibration"):
        lines.append(f"calibrated {score_calibration_text(calibration)}")
    return lines


def _layer_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    """A table of errors in percent of float32's output (RMS), the worst layer first."""
    if not layers:
        return []
    width = max(len(layer["name"]) for layer in layers)
    head = f"{'layer':<{width}}  {'own %':>7}  {'accumulated %':>13}"
    return [head] + [
        f"{x['name']:<{width}}  {100 * x['own']:7.2f}  {100 * x['accumulated']:13.2f}"
        f"{'  kept' if x['kept'] else ''}"
        for x in layers
    ]
