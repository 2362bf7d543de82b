"""The options of how an engine is built, which `dgm4 export` and `dgm4 rebuild` share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export.cli.arguments import positive, seconds, verb

if TYPE_CHECKING:
    from export.trt.options import EngineOptions

_LIMIT_S = 3600.0
_EXTENT = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


def add_rebuild(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dgm4 rebuild`."""
    parser = verbs.add_parser(
        "rebuild",
        help="put an engine for this machine into a bundle",
        description="Build the bundle's engine for this machine's GPU and TensorRT. Engines for others stay.",
    )
    parser.add_argument("bundle", type=Path)
    add_arguments(parser)
    parser.set_defaults(run=verb("export.rebuild", "run"), parser=parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `engine_options` reads."""
    group = parser.add_argument_group("how the engine is built")
    group.add_argument(
        "--plugins",
        choices=("auto", "on", "off"),
        default="auto",
        help="our kernels inside the engine (full TensorRT alone); auto: where they can be (%(default)s)",
    )
    group.add_argument(
        "--profiles",
        type=_extents,
        metavar="auto|BxT[,BxT]",
        help="most pairs and tokens of each, as 1x32,8x64,32x128, the last for the bundle's limits; auto: "
        "that one, and with tensorrt one more for single pairs (auto)",
    )
    group.add_argument(
        "--timing-cache",
        type=_cache,
        default="auto",
        metavar="FILE|none",
        help="what TensorRT timed, kept for the next build; by default in the user's cache folder",
    )
    group.add_argument(
        "--build-limit", type=seconds, default=_LIMIT_S, metavar="SECONDS", help="give up then (%(default)g)"
    )
    group.add_argument("--workspace", type=positive, metavar="MIB", help="scratch memory of a layer at most")
    group.add_argument(
        "--strip-weights",
        action="store_true",
        help="leave the weights out of the engine: they enter from model.onnx when it is loaded; needs a GPU",
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="for later releases of the same major version of TensorRT too, somewhat slower; not RTX",
    )
    group.add_argument(
        "--hardware-compatible",
        choices=("ampere", "same"),
        help="ampere: for every GPU from compute capability 8.0, slower; same: for every model of this GPU's "
        "compute capability; not RTX, which has --target",
    )


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The options of the command line as the builder takes them."""
    from export.trt.features import Features
    from export.trt.options import EngineOptions

    features = Features(options.strip_weights, options.version_compatible, options.hardware_compatible)
    return EngineOptions(
        plugins=options.plugins,
        profiles=options.profiles,
        timing_cache=options.timing_cache,
        limit_s=options.build_limit,
        workspace_mb=options.workspace,
        features=features,
    )


def _extents(text: str) -> tuple[tuple[int, int], ...] | None:
    """Pairs x tokens with commas between them, or None for auto, for argparse."""
    if text == "auto":
        return None
    found = [_EXTENT.fullmatch(part.strip()) for part in text.split(",")]
    if None in found:
        raise argparse.ArgumentTypeError(f"expected auto or pairs x tokens as 1x32,32x128, got {text!r}")
    return tuple((int(match[1]), int(match[2])) for match in found if match is not None)


def _cache(text: str) -> Path | Literal["auto"] | None:
    """A file, or None for none, for argparse."""
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    return Path(text)
