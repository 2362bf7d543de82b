"""What to export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import dgm4
from engine.errors import BackendError, InputError
from engine.manifest import PRECISIONS
from export.quantization.ranges import METHODS
from export.quantization.smoothquant import Smooth
from export.trt import build as trt
from export.trt.options import EngineOptions

CALIBRATED = ("int8", "fp8")  # precisions whose scales of activations may be
FEWEST_TOKENS = 2  # [CLS] and a word


@dataclass(frozen=True)
class ExportOptions:
    """What to export. `size` and `model` are read off a checkpoint; without one the weights are drawn.

    `targets` are compute capabilities as "8.6"; empty for all that the builder knows without a GPU.
    `engine` False leaves the engine out; `building` is how it is built.
    `vocabulary` is a file with one word piece a line. `data` is a folder in DGM4's layout: the bundle is
    judged on its `split`, and refused outside the accuracy gate. `calibration` is such a folder too: int8
    and fp8 are static then, with scales of activations calibrated on `calibration_pairs` pairs of its
    training split by `calibration_method` (entropy: int8 alone). `smooth`, with calibration, rescales
    channels between layers as `export.quantization.smoothquant` tells: by its alpha, 0 to 1, or "auto", where
    that lessens the error on the pairs. `keep_layers` of the Linear layers, the worst by their own error,
    stay a step above the precision; "auto": as few as the checks and the gate on `data` ask for.
    """

    out: Path
    model: str | None = None
    checkpoint: Path | None = None
    size: str | None = None
    precision: str = "fp32"
    max_batch: int = 32
    max_tokens: int = 128
    targets: tuple[str, ...] = ()
    engine: bool = True
    building: EngineOptions = EngineOptions()
    vocabulary: Path | None = None
    data: Path | None = None
    split: str = "test"
    calibration: Path | None = None
    calibration_pairs: int = 512
    calibration_method: str = METHODS[0]
    keep_layers: int | Literal["auto"] = 0
    smooth: Smooth = "off"


def check_options(options: ExportOptions) -> None:
    """Raise InputError for options that do not fit."""
    if options.precision not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {options.precision!r}")
    if options.max_batch < 1:
        raise InputError(f"max_batch: expected at least 1, got {options.max_batch}")
    if not FEWEST_TOKENS <= options.max_tokens <= 512:
        raise InputError(f"max_tokens: expected {FEWEST_TOKENS} to 512, got {options.max_tokens}")
    _check_calibration(options)
    _check_kept(options)
    if options.size is not None and options.size not in dgm4.SIZES:
        raise InputError(f"size: expected one of {', '.join(dgm4.SIZES)}, got {options.size!r}")
    if options.engine:
        _check_engine(options)
    if options.model is not None and options.model not in dgm4.MODEL_NAMES:
        raise InputError(f"model: expected one of {', '.join(dgm4.MODEL_NAMES)}, got {options.model!r}")


def asks_for_engine(options: ExportOptions) -> bool:
    """Whether an engine is more than welcome: its targets or how it is built were chosen."""
    return options.engine and (bool(options.targets) or options.building != EngineOptions())


def _check_engine(options: ExportOptions) -> None:
    """Also raises BackendError where the builder of this machine lacks what is asked for."""
    options.building.check(options.max_batch, options.max_tokens)
    if not asks_for_engine(options):
        return
    if options.precision in CALIBRATED and options.calibration is None:
        raise InputError(
            "calibration: expected with an engine in int8 or fp8, whose Q/DQ nodes have its scales"
        )
    builder = trt.find_builder()
    if builder is None:
        reasons = "; ".join(f"{info.library}: {info.reason}" for info in trt.describe_builders())
        raise BackendError(f"an engine was asked for, and nothing here builds one ({reasons})")
    options.building.check_builder(builder)
    options.building.takes_plugins(builder)
    unknown = [target for target in options.targets if target not in trt.RTX_KNOWN]
    if unknown and builder.library == "tensorrt_rtx":
        raise InputError(
            f"target: tensorrt_rtx builds for compute capability {', '.join(trt.RTX_KNOWN)}, got "
            f"{', '.join(unknown)}"
        )


def _check_calibration(options: ExportOptions) -> None:
    if options.calibration is not None and options.precision not in CALIBRATED:
        raise InputError(
            f"calibration: expected precision {' or '.join(CALIBRATED)} with it, got {options.precision}"
        )
    if options.calibration_pairs < 1:
        raise InputError(f"calibration_pairs: expected at least 1, got {options.calibration_pairs}")
    if options.calibration_method not in METHODS:
        expected = ", ".join(METHODS)
        raise InputError(
            f"calibration_method: expected one of {expected}, got {options.calibration_method!r}"
        )
    _check_smooth(options.smooth, options.calibration is not None)
    if options.calibration_method == "entropy" and options.precision != "int8":
        raise InputError("calibration_method: entropy counts the levels of int8; use minmax or percentile")


def _check_smooth(smooth: Smooth, calibrated: bool) -> None:
    if smooth not in ("off", "auto") and (isinstance(smooth, str) or not 0 <= smooth <= 1):
        raise InputError(f"smooth: expected off, auto or a number from 0 to 1, got {smooth!r}")
    if smooth != "off" and not calibrated:
        raise InputError("smooth: expected calibration with it, on whose pairs channels are seen")


def _check_kept(options: ExportOptions) -> None:
    if not options.keep_layers:
        return
    if options.precision == "fp32":
        raise InputError("keep_layers: expected a precision below fp32 with it")
    if options.data is None and (options.calibration is None or options.keep_layers == "auto"):
        raise InputError("keep_layers: expected data with it, on whose pairs layers are compared and judged")
