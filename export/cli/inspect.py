"""`dgm4 inspect` and `dgm4 doctor`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.backends import describe, serving, usable_cores
from engine.bundle import Bundle
from engine.packages import version_of
from export.bundle.card import grouped, largest_text

_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "triton",
    "safetensors",
    "onnx",
    "tokenizers",
    "pillow",
    "numpy",
)


def inspect(options: argparse.Namespace) -> int:
    """Verify every file of a bundle and print what it is."""
    bundle = Bundle.open(options.bundle)
    bundle.verify_all()
    record = bundle.describe() | {"backends": serving(bundle)}
    if options.layers:
        from export.quantization.sensitivity import bundle_errors

        record["layers"] = [asdict(x) for x in bundle_errors(bundle, options.data, options.split)]
    sys.stdout.write(json.dumps(record, indent=2) + "\n" if options.json else _describe(record))
    return 0


def _describe(record: dict[str, Any]) -> str:
    model, weights = record["model"], record["weights"]
    lines = [
        f"{record['path']}: {model['name']} {model['size']}, {record['precision']}, every hash agrees",
        f"weights    {weights['source']}{'' if weights['trained'] else ' (not trained)'}",
        f"limits     batch {record['limits']['max_batch']}, tokens {record['limits']['max_tokens']}",
    ]
    lines += _precision_lines(record)
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
        if smoothing := calibration.get("smoothing"):
            text = "rescaled   channels in {seams} places (alpha {alpha}): outputs off by {smoothed:.2%}, "
            lines.append((text + "{plain:.2%} without").format(**smoothing))
    if floating := record["float32_layers"]:
        lines.append(f"float32    {len(floating)} modules: {', '.join(grouped(floating))}")
    if kept := record["kept_layers"]:
        lines.append(f"kept       a step above {record['precision']}: {', '.join(kept)}")
    return lines


def _layer_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    """A table of errors in percent of float32's answer (RMS), the worst layer first."""
    if not layers:
        return []
    width = max(len(layer["name"]) for layer in layers)
    head = f"{'layer':<{width}}  {'own %':>7}  {'accumulated %':>13}"
    return [head] + [
        f"{x['name']:<{width}}  {100 * x['own']:7.2f}  {100 * x['accumulated']:13.2f}"
        f"{'  kept' if x['kept'] else ''}"
        for x in layers
    ]


def doctor(options: argparse.Namespace) -> int:
    """Print what this machine has for exporting and serving."""
    from export.trt.build import describe_builders

    lacking = describe()
    record = {
        "python": platform.python_version(),
        "cores": usable_cores(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "backends": [name for name, lack in lacking.items() if lack is None],
        "absent_backends": {name: lack for name, lack in lacking.items() if lack is not None},
        "builders": {
            info.library: {"version": info.version, "usable": info.usable, "reason": info.reason}
            for info in describe_builders()
        },
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n" if options.json else _checkup(record))
    return 0


def _checkup(record: dict[str, Any]) -> str:
    lines = [f"python     {record['python']}, {record['cores']} cores"]
    lines += [f"package    {name} {version or 'absent'}" for name, version in record["packages"].items()]
    lines.append(f"backends   {', '.join(record['backends']) or 'none'}")
    lines += [f"absent     {name} needs {lack}" for name, lack in record["absent_backends"].items()]
    for name, builder in record["builders"].items():
        state = "can build" if builder["usable"] else "cannot build"
        lines.append(f"builder    {name} {builder['version'] or 'absent'}: {state}: {builder['reason']}")
    return "\n".join(lines) + "\n"
