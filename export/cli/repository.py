"""`dgm4 repository`: bundles as a model repository for NVIDIA Triton Inference Server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from export.cli.arguments import Verbs, counts
from export.cli.parser import usage_errors
from export.flags import POSITIVE, WHOLE, read_options
from export.inference_server.config import FORMS


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "repository",
        help="write a model repository for NVIDIA Triton Inference Server",
        description="Write a directory that tritonserver --model-repository takes: what serves each bundle, "
        "its configuration, and a client.",
        epilog="examples:\n"
        "  dgm4 repository my-bundle --out models --with python\n"
        "  dgm4 repository fp16 int8 --out models --kind gpu --preferred 8,32",
    )
    parser.add_argument("bundle", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the repository")
    parser.add_argument("--name", metavar="NAME", help="of a single model; <model>-<size>-<precision>")
    parser.add_argument(
        "--with",
        dest="form",
        choices=FORMS,
        default=FORMS[0],
        help="network: the graph or the plan, tensors in and out. python: a Predictor, pictures and captions "
        "in, answers out. ensemble: the network between two Python models that do the rest (%(default)s)",
    )
    parser.add_argument("--plan", action="store_true", help="serve the TensorRT engine, not the ONNX graph")
    parser.add_argument(
        "--kind", choices=("auto", "cpu", "gpu"), default="auto", help="where instances run (%(default)s)"
    )
    parser.add_argument(
        "--instances", type=POSITIVE, default=1, metavar="N", help="copies on each device (%(default)s)"
    )
    parser.add_argument(
        "--queue-delay",
        type=WHOLE,
        default=500,
        metavar="US",
        help="microseconds to wait for a batch (%(default)s)",
    )
    parser.add_argument(
        "--queue-size",
        type=POSITIVE,
        default=256,
        metavar="N",
        help="requests that may wait; the next is refused (%(default)s)",
    )
    parser.add_argument(
        "--preferred",
        type=counts,
        default=(),
        metavar="N[,N]",
        help="batches sent at once; 8 and the largest",
    )
    parser.add_argument(
        "--threads", type=POSITIVE, metavar="N", help="CPU threads of an instance; all of the server's cores"
    )
    parser.add_argument(
        "--accelerate", action="store_true", help="let ONNX Runtime build TensorRT engines on the server"
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Write the repository and print what it serves."""
    if options.name is not None and len(options.bundle) > 1:
        options.parser.error("--name is for a single bundle")
    from engine import Bundle
    from export.inference_server.config import ServerOptions
    from export.inference_server.repository import check_models, name_models, write_repository

    settings = read_options(ServerOptions, options, queue_delay_us=options.queue_delay)
    bundles = [Bundle.open(path) for path in options.bundle]
    with usage_errors(options.parser):
        named = name_models(bundles) if options.name is None else {options.name: bundles[0]}
        check_models(named, settings)
    manifest = write_repository(named, options.out, settings)
    sys.stdout.write(summary(options.out, manifest))
    return 0


def summary(out: Path, manifest: dict[str, Any]) -> str:
    """What was written, a line a model, and how a server is started on it."""
    lines = []
    for name, model in manifest["models"].items():
        parts = {place: entry["bytes"] for place, entry in manifest["files"].items()}
        size = sum(count for place, count in parts.items() if place.partition("/")[0] in model["parts"])
        lines.append(f"{name}: {model['serves']} of {model['of']}, {size / 1e6:.0f} MB")
    lines.append(f"ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository={out.resolve()}")
    return "\n".join(lines) + "\n"
