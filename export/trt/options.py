"""How an engine is built, whatever its network."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import BackendError, InputError
from export.trt import build as trt
from export.trt.features import Features, check_features, no_plugins, refusal
from export.trt.profiles import Extent, Profile, Shapes, auto_extents, check_extents, profiles_of
from export.trt.timing_cache import default_cache

PLUGINS = ("auto", "on", "off")
_MOST_WORKSPACE_MB = 1 << 20  # a TiB
_FIRST_E4M3 = 8.9  # kernels.rows.E4M3_CAPABILITY, which needs torch
_COMPILERS = ("triton", "torch", "onnx")
_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # kernels.jit.TARGETS, which needs torch


@dataclass(frozen=True)
class EngineOptions:
    """plugins: our own kernels inside, "on", "off", or "auto" for where they can be.

    profiles: most pairs and tokens of each; None for `export.trt.profiles.auto_extents`.
    timing_cache: file of TensorRT's timings, read and rewritten; "auto": the user's own for this GPU and
    version; None: none. limit_s: seconds that the builder may take. workspace_mb: scratch memory of a
    layer in MiB; None for the library's own limit. features: what the engine may be besides.
    """

    plugins: str = PLUGINS[0]
    profiles: tuple[Extent, ...] | None = None
    timing_cache: Path | Literal["auto"] | None = "auto"
    limit_s: float = 3600.0
    workspace_mb: int | None = None
    features: Features = Features()

    def check(self, max_batch: int, max_tokens: int) -> None:
        """Raise InputError where they fit neither each other nor a bundle of these limits."""
        self.check_alone()
        if self.profiles is not None:
            check_extents(self.profiles, max_batch, max_tokens)

    def check_alone(self) -> None:
        """Raise InputError where they do not fit each other, whatever the bundle."""
        if self.plugins not in PLUGINS:
            raise InputError(f"plugins: expected one of {', '.join(PLUGINS)}, got {self.plugins!r}")
        cache = self.timing_cache
        if isinstance(cache, Path) and (cache.is_dir() or not cache.absolute().parent.is_dir()):
            raise InputError(f"timing_cache: expected a file in a folder that exists, got {cache}")
        if self.limit_s <= 0:
            raise InputError(f"build limit: expected seconds above 0, got {self.limit_s:g}")
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= _MOST_WORKSPACE_MB:
            most = f"1 to {_MOST_WORKSPACE_MB} MiB"
            raise InputError(f"workspace: expected {most}, got {self.workspace_mb}")
        check_features(self.features)
        if self.plugins == "on" and (excluded := no_plugins(self.features)) is not None:
            raise InputError(f"plugins: 'on' does not go with such an engine: {excluded}")

    def check_builder(self, builder: trt.BuilderInfo) -> None:
        """Raise BackendError where this library on this machine has no such features."""
        if self.features != Features():
            capability = builder.compute_capability or trt.gpu_capability()
            reason = refusal(self.features, builder.library, capability)
            if reason is not None:
                raise BackendError(reason)

    def spec(
        self, graph: Path, builder: trt.BuilderInfo, targets: Sequence[str], shapes: Shapes, plugins: bool
    ) -> trt.EngineSpec:
        """What `builder` is to build of `graph`."""
        cache = self.timing_cache
        if cache == "auto":
            cache = default_cache(builder.library, builder.version, builder.gpu)
        return trt.EngineSpec(
            graph,
            self.profiles_for(builder.library, shapes),
            compute_capabilities=tuple(targets),
            timing_cache=cache,
            time_limit_s=self.limit_s,
            workspace_mb=self.workspace_mb,
            library=builder.library,
            plugins=plugins,
            features=self.features,
        )

    def profiles_for(self, library: str, shapes: Shapes) -> tuple[Profile, ...]:
        """The profiles, chosen for the library where they were not given."""
        extents = self.profiles or auto_extents(library, shapes.max_batch, shapes.max_tokens)
        return profiles_of(extents, shapes)

    def takes_plugins(self, builder: trt.BuilderInfo) -> bool:
        """Whether our kernels go into the engine; BackendError where they were asked for and cannot."""
        reasons = [*_lacks(builder), *filter(None, [self.no_plugins()])]
        if self.plugins == "on" and reasons:
            raise BackendError(f"--plugins on: {'; '.join(reasons)}")
        return self.plugins != "off" and not reasons

    def no_plugins(self) -> str | None:
        """Why our kernels cannot go into such an engine on any machine, or None."""
        return no_plugins(self.features)


def default_targets(library: str, precision: str) -> tuple[str, ...]:
    """All that the library knows without a GPU, less those without E4M3 for fp8; none with `tensorrt`."""
    if library != "tensorrt_rtx":
        return ()
    return tuple(c for c in trt.RTX_CAPABILITIES if precision != "fp8" or float(c) >= _FIRST_E4M3)


def _lacks(builder: trt.BuilderInfo) -> Iterator[str]:
    """What keeps our kernels out of an engine of this builder."""
    missing = [name for name in _COMPILERS if importlib.util.find_spec(name) is None]
    if builder.library != "tensorrt":
        yield f"{builder.library} has no plugins; pip install tensorrt on a machine with a GPU"
    elif builder.compute_capability not in _CAPABILITIES:
        gpu, known = builder.compute_capability, ", ".join(_CAPABILITIES)
        yield f"the kernels are for compute capability {known}, and this GPU's is {gpu}"
    if missing:
        yield f"what compiles them is not installed: pip install {' '.join(missing)}"
