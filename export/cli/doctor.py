"""`dgm4 doctor`: show what this machine has for exporting and serving."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

from engine import __version__, _native
from engine.backends import choice, describe, remedy, usable_cores
from engine.files import cache_folder
from engine.packages import find_conflict, version_of
from engine.shipped import shipped_bundles
from export.cli.arguments import Verbs
from export.output import open_output, printable

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
    "scikit-learn",
    "cryptography",
    "opentelemetry-api",
    "fastapi",
    "ray",
)
# What of the environment changes what dgm4 does; of secrets only whether they are there.
_VARIABLES = (
    "DGM4_LOG",
    "DGM4_PUBLIC_KEY",
    "ORT_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_TELEMETRY",
    "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
_SECRETS = ("DGM4_SERVE_TOKEN",)


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "doctor",
        help="show what this machine can do",
        description="Show the packages, backends and engine builders of this machine, which backends "
        "were measured to be the fastest, and how to install what is absent.",
        epilog="examples:\n  dgm4 doctor\n  dgm4 doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Print packages, backends and engine builders, and what is missing for the others."""
    from export.trt.build import describe_builders

    missing = describe()
    record = {
        "dgm4": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": usable_cores(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "backends": [name for name, need in missing.items() if need is None],
        "absent_backends": {name: need for name, need in missing.items() if need is not None},
        "remedies": {name: command for name in missing if (command := remedy(name)) is not None},
        "conflict": find_conflict(),
        "chosen": [_describe_choice(one) for one in choice.recorded()],
        "preprocessing": _native.describe(),
        "builders": {
            info.library: {"version": info.version, "usable": info.usable, "reason": info.reason}
            for info in describe_builders()
        },
        "ready_bundles": shipped_bundles(),
        "cache": str(cache_folder()),
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
        "secrets": {name: bool(os.environ.get(name)) for name in _SECRETS},
    }
    with open_output(None) as out:
        out.write(json.dumps(record, indent=2) + "\n" if options.json else _lines(record))
    return 0


def _lines(record: dict[str, Any]) -> str:
    lines = [f"dgm4       {record['dgm4']}, {record['system']}"]
    lines.append(f"python     {record['python']}, {record['cores']} cores")
    lines += [f"package    {name} {version or 'absent'}" for name, version in record["packages"].items()]
    lines.append(f"backends   {', '.join(record['backends']) or 'none'}")
    for name, need in record["absent_backends"].items():
        command = f": {record['remedies'][name]}" if name in record["remedies"] else ""
        lines.append(f"absent     {name} needs {need}{command}")
    lines += [f"conflict   {record['conflict']}"] if record["conflict"] else []
    lines += [_chosen_line(one) for one in record["chosen"]]
    lines.append(f"images     {record['preprocessing']}")
    for name, builder in record["builders"].items():
        state = "can build" if builder["usable"] else "cannot build"
        lines.append(f"builder    {name} {builder['version'] or 'absent'}: {state}: {builder['reason']}")
    lines += [f"variable   {name}={value}" for name, value in record["environment"].items() if value]
    lines += [f"variable   {name} is set" for name, is_set in record["secrets"].items() if is_set]
    return "\n".join(map(printable, lines)) + "\n"


def _describe_choice(one: choice.Choice) -> dict[str, Any]:
    return {**one.to_dict(), "reason": one.reason, "applies": choice.applies(one)}


def _chosen_line(one: dict[str, Any]) -> str:
    """What auto takes for a bundle because it was measured, or why the record does not count here."""
    situation = one["situation"]
    threads = "" if situation["threads"] is None else f", threads {situation['threads']}"
    why = one["reason"] if one["applies"] else "not followed: of another machine or other versions"
    return (
        f"chosen     {one['backend']} for {one['model']} (bundle {situation['bundle'][:12]}{threads}): {why}"
    )
