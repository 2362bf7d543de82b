"""How an engine is built, whatever its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import BackendError, InputError
from export import trt
from export.features import Features, check_features, no_plugins, refusal
from export.profiles import Extent, Profile, Shapes, auto_extents, check_extents, profiles_of
from export.timing import default_cache


@dataclass(frozen=True)
class EngineOptions:
    """profiles: most pairs and tokens of each; None for `export.profiles.auto_extents`.

    timing_cache: file of TensorRT's timings, read and rewritten; "auto": the user's own for this GPU and
    version; None: none. limit_s: seconds that the builder may take. workspace_mb: scratch memory of a
    layer in MiB; None for the library's own limit. features: what the engine may be besides.
    """

    profiles: tuple[Extent, ...] | None = None
    timing_cache: Path | Literal["auto"] | None = "auto"
    limit_s: float = 3600.0
    workspace_mb: int | None = None
    features: Features = Features()

    def check(self, max_batch: int, max_tokens: int) -> None:
        """Raise InputError where they fit neither each other nor a bundle of these limits."""
        if self.profiles is not None:
            check_extents(self.profiles, max_batch, max_tokens)
        if isinstance(self.timing_cache, Path) and self.timing_cache.is_dir():
            raise InputError(f"timing_cache: expected a file, got the directory {self.timing_cache}")
        if self.limit_s <= 0:
            raise InputError(f"build limit: expected seconds above 0, got {self.limit_s:g}")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise InputError(f"workspace: expected at least 1 MiB, got {self.workspace_mb}")
        check_features(self.features)

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

    def no_plugins(self) -> str | None:
        """Why our kernels cannot go into the engine, or None."""
        return no_plugins(self.features)
