"""The options of an export: what is exported, in which precision, for which shapes and engines.

Their flags are the options of `dgm4 export`. Imports no torch.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dgm4.config import model_config
from engine.errors import BackendError, InputError, quoted
from engine.manifest import LARGEST_BATCH, PRECISIONS
from engine.registry import DEFAULT, NETWORKS, SIZES
from export.flags import POSITIVE, WHOLE, Number, check_values, flag, group
from export.trt import build
from export.trt.options import EngineOptions

CALIBRATED = ("int8", "fp8")  # precisions whose activations may have calibrated scales
SPLITS = ("train", "val", "test")
_BATCH = Number(f"1 to {LARGEST_BATCH} pairs", int, 1, LARGEST_BATCH)
FEWEST_TOKENS = 16  # about a dozen words: with fewer, what most captions say is cut off
TOKENS = Number(f"{FEWEST_TOKENS} to 512 tokens", int, FEWEST_TOKENS, 512)  # BERT's positions


def _parse_targets(text: str) -> tuple[str, ...] | None:
    """Compute capabilities, or None for no engine."""
    targets = tuple(part.strip() for part in text.split(","))
    if targets == ("none",):
        return None
    if not all(re.fullmatch(r"\d+\.\d", target) for target in targets):
        raise argparse.ArgumentTypeError(
            f"expected compute capabilities as 8.6,8.9 or none, got {quoted(text)}"
        )
    return targets


def _parse_sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 hexadecimal digits, got {quoted(text)}")
    return text.lower()


def _parse_keep_layers(text: str) -> int | str:
    return text if text == "auto" else int(WHOLE(text))


@dataclass(frozen=True)
class ExportOptions:
    """What to export. `size` and `model` are read off a checkpoint; without one the weights are drawn.

    With `sha256` no checkpoint of another hash is read: little damage to weights can be told otherwise.
    `targets` are compute capabilities as "8.6"; empty for all that the builder knows without a GPU.
    `engine` False leaves the engine out; `building` is how it is built.
    `vocabulary` is a file with one word piece a line, or where `dgm4.byte_pairs` finds byte pairs. `licence`
    is that of the weights. `data` is a folder in DGM4's layout: the bundle is evaluated on its `split`, and
    refused outside the accuracy gate.
    `calibration` is such a folder too: int8 and fp8 are static then, with scales of activations calibrated on
    `calibration_pairs` pairs of its training split. `keep_layers` of the Linear layers, the worst by their
    own error, stay a step above the precision; "auto": as few as the checks and the gate on `data` ask for.
    """

    out: Path
    model: str | None = flag(None, "network; read off a checkpoint", choices=NETWORKS)
    checkpoint: Path | None = flag(
        None, ".pth or .safetensors; else the trained demo", metavar="FILE", type=Path
    )
    sha256: str | None = flag(
        None,
        "expected SHA-256 of the checkpoint; the export of another file is refused",
        metavar="HEX",
        type=_parse_sha256,
    )
    size: str | None = flag(None, "read off a checkpoint; tiny without one", choices=SIZES)
    precision: str = flag(
        "fp32",
        "of the products (%(default)s); bf16 and fp8 are for GPUs: on a CPU torch alone serves them",
        choices=PRECISIONS,
    )
    max_batch: int = flag(32, "largest batch (%(default)s)", metavar="N", type=_BATCH)
    max_tokens: int = flag(128, "longest caption (%(default)s)", metavar="N", type=TOKENS)
    targets: tuple[str, ...] = flag(
        (),
        "compute capabilities of the engine, as 8.6,8.9; 'none' for no engine; all by default",
        name="target",
        metavar="CC[,CC]",
        type=_parse_targets,
    )
    engine: bool = True
    building: EngineOptions = group(EngineOptions(), "how the engine is built")
    vocabulary: Path | None = flag(
        None,
        "vocabulary: word pieces, one a line, or the folder or file of byte pairs",
        name="vocab",
        metavar="PATH",
        type=Path,
    )
    licence: str | None = flag(None, "of the checkpoint's weights, for manifest and card", metavar="TEXT")
    data: Path | None = flag(None, "evaluate it on this data: the accuracy gate", metavar="DIR", type=Path)
    split: str = flag("test", "of --data (%(default)s)", choices=SPLITS)
    calibration: Path | None = flag(
        None, "data whose training split calibrates int8 or fp8", metavar="DIR", type=Path
    )
    calibration_pairs: int = flag(512, "drawn from it (%(default)s)", metavar="N", type=POSITIVE)
    keep_layers: int | Literal["auto"] = flag(
        0,
        "Linear layers, the worst first, that stay a step above the precision; auto: until the gate on "
        "--data passes",
        metavar="N|auto",
        type=_parse_keep_layers,
    )


def check_options(options: ExportOptions) -> None:
    """Raise InputError for options that do not fit.

    Raises BackendError where the builder of this machine lacks what is asked for.
    """
    check_values(options)
    if options.checkpoint is None:
        model_config(options.model or DEFAULT, options.size or "tiny")
    if options.sha256 is not None and options.checkpoint is None:
        raise InputError("sha256: is that of a checkpoint; give one")
    if options.calibration is not None and options.precision not in CALIBRATED:
        raise InputError(
            f"calibration: expected precision {' or '.join(CALIBRATED)} with it, got {options.precision}"
        )
    _check_keep(options)
    if options.engine:
        _check_engine(options)
    elif _describes_engine(options.building):
        raise InputError(
            "options say how the engine is built, and --target none builds none: leave out one of them"
        )


def asks_for_engine(options: ExportOptions) -> bool:
    """Whether an engine is more than welcome: its targets or how it is built were chosen."""
    return options.engine and (bool(options.targets) or options.building != EngineOptions())


def _describes_engine(building: EngineOptions) -> bool:
    """Whether the options are about the engine itself, not only about how and when it is made."""
    neutral = EngineOptions()
    made = replace(
        building, plugins=neutral.plugins, timing_cache=neutral.timing_cache, limit_s=neutral.limit_s
    )
    return made != neutral


def _check_engine(options: ExportOptions) -> None:
    options.building.check(options.max_batch, options.max_tokens)
    if not asks_for_engine(options):
        return
    if options.precision in CALIBRATED and options.calibration is None:
        raise InputError(
            "calibration: an engine in int8 or fp8 needs it (a folder of pairs); or leave the engine out"
        )
    builder = build.find_builder()
    if builder is None:
        raise BackendError(f"an engine was asked for, and nothing here builds one ({build.reasons()})")
    options.building.check_builder(builder)
    options.building.takes_plugins(builder)
    unknown = [target for target in options.targets if target not in build.RTX_KNOWN]
    if unknown and builder.library == "tensorrt_rtx":
        raise InputError(
            f"targets: tensorrt_rtx builds for compute capability {', '.join(build.RTX_KNOWN)}, got "
            f"{', '.join(unknown)}"
        )


def _check_keep(options: ExportOptions) -> None:
    if not options.keep_layers:
        return
    if options.keep_layers != "auto" and options.keep_layers < 0:
        raise InputError(f"keep_layers: expected {WHOLE.text} or auto, got {options.keep_layers}")
    if options.precision == "fp32":
        raise InputError("keep_layers: needs a precision below fp32 (fp16, bf16, int8 or fp8)")
    if options.data is None and (options.calibration is None or options.keep_layers == "auto"):
        raise InputError(
            "keep_layers: needs data, or for a number of layers calibration: pairs to compare layers on"
        )
