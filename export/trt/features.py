"""Special engines: without their weights, for later versions of the library, for other GPUs.

Sources: docs.nvidia.com/deeplearning/tensorrt, "Engine Compatibility" and "Refitting an Engine", and of
TensorRT-RTX "Engine Compatibility"; what RTX says of each was tried with 1.7.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import BuildError, InputError
from export.flags import check_values, flag

LEVELS = {"ampere": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
_STRIPPED = ("STRIP_PLAN", "REFIT_IDENTICAL")
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Features:
    """strip_weights: leave them out, to be refitted from the graph when the engine is loaded.

    version_compatible: run on later releases of the builder's major version too, somewhat slower.
    hardware: "ampere" for every GPU from compute capability 8.0, "same" for every model of the builder's
    own; None for the builder's GPU.
    """

    strip_weights: bool = flag(
        False,
        "leave the weights out of the engine: they enter from model.onnx when it is loaded; needs a GPU",
    )
    version_compatible: bool = flag(
        False, "for later releases of the same major version of TensorRT too, somewhat slower; not RTX"
    )
    hardware: str | None = flag(
        None,
        "ampere: for every GPU from compute capability 8.0, slower; same: for every model of this GPU's "
        "compute capability; not RTX, which has --target",
        name="hardware-compatible",
        choices=tuple(LEVELS),
    )


def check_features(features: Features) -> None:
    """Raise InputError for features that no library offers together."""
    check_values(features)
    if features.strip_weights and features.version_compatible:
        raise InputError(
            "strip-weights and version-compatible: the lean runtime, which a version-compatible engine is "
            "for, cannot refit; leave out one"
        )


def refusal(features: Features, library: str, capability: str | None) -> str | None:
    """Why `library` beside a GPU of `capability`, None for no GPU, builds no such engine; None if it does."""
    if library == "tensorrt_rtx":
        return _rtx_refusal(features, capability)
    if features.hardware == "ampere" and capability is not None and _number(capability) < _AMPERE:
        return (
            f"--hardware-compatible ampere: needs compute capability 8.0 or later, this GPU's is {capability}"
        )
    return None


def _rtx_refusal(features: Features, capability: str | None) -> str | None:
    if features.version_compatible:
        return "--version-compatible: each release of tensorrt_rtx runs its own engines alone"
    if features.hardware is not None:
        return "--hardware-compatible: tensorrt_rtx builds for the compute capabilities of --target instead"
    if features.strip_weights and capability is None:
        return "--strip-weights: tensorrt_rtx needs a GPU for it, and this machine shows none"
    return None


def no_plugins(features: Features) -> str | None:
    """Why our kernels cannot go into such an engine, or None."""
    if features.strip_weights:
        return "weights are refitted from the bundle's own graph, which has no plugins"
    if features.version_compatible:
        return "a version-compatible engine has no operators beyond the lean runtime's"
    if features.hardware == "ampere":
        return "they are compiled for one compute capability, not for ampere and later"
    return None


def set_features(trt: Any, config: Any, features: Features) -> None:
    """Set them in an IBuilderConfig; raises BuildError where the library is too old for one."""
    flags = _STRIPPED if features.strip_weights else ()
    for name in (*flags, *(("VERSION_COMPATIBLE",) if features.version_compatible else ())):
        config.set_flag(_member(trt, "BuilderFlag", name))
    if features.hardware is not None:
        level = _member(trt, "HardwareCompatibilityLevel", LEVELS[features.hardware])
        config.hardware_compatibility_level = level


def _member(trt: Any, kind: str, name: str) -> Any:
    member = getattr(getattr(trt, kind), name, None)
    if member is None:
        raise BuildError(f"{trt.__name__} {trt.__version__} has no {kind}.{name}; install a later version")
    return member


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
