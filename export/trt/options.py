"""The options of how an engine is built, whatever its network.

Their flags are options of `dgm4 export` and `dgm4 rebuild`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import BackendError, InputError, quoted
from engine.packages import EXTRAS, install_command
from export.flags import SECONDS, Number, check_values, flag
from export.trt import build
from export.trt.features import Features, check_features, no_plugins, refusal
from export.trt.profiles import Extent, Profile, Shapes, auto_extents, check_extents, profiles_of
from export.trt.timing_cache import default_cache

PLUGINS = ("auto", "on", "off")
WORKSPACE = Number("1 to 1048576 MiB", int, 1, 1 << 20)  # at most a TiB
_EXTENT = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_FIRST_E4M3 = 8.9  # kernels.rows.E4M3_CAPABILITY, which needs torch
_COMPILERS = ("triton", "torch", "onnx")
_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # kernels.jit.TARGETS, which needs torch


def _parse_extents(text: str) -> tuple[Extent, ...] | None:
    """Pairs x tokens with commas between them, or None for auto."""
    if text == "auto":
        return None
    matches = [_EXTENT.fullmatch(part.strip()) for part in text.split(",")]
    if None in matches:
        raise argparse.ArgumentTypeError(
            f"expected auto or pairs x tokens as 1x32,32x128, got {quoted(text)}"
        )
    return tuple((int(match[1]), int(match[2])) for match in matches if match is not None)


def _parse_cache(text: str) -> Path | Literal["auto"] | None:
    """A file; None for none."""
    if text == "auto":
        return "auto"
    return None if text == "none" else Path(text)


@dataclass(frozen=True)
class EngineOptions:
    """plugins: our own kernels inside, "on", "off", or "auto" for where they can be.

    profiles: most pairs and tokens of each; None for `export.trt.profiles.auto_extents`.
    timing_cache: file of TensorRT's timings, read and rewritten; "auto": the user's own for this GPU and
    version; None: none. limit_s: seconds that the builder may take. workspace_mb: scratch memory of a
    layer in MiB; None for the library's own limit. features: what the engine may be besides.
    """

    plugins: str = flag(
        PLUGINS[0],
        "our kernels inside the engine (full TensorRT alone); auto: where they can be (%(default)s)",
        choices=PLUGINS,
    )
    profiles: tuple[Extent, ...] | None = flag(
        None,
        "most pairs and tokens of each, as 1x32,8x64,32x128, the last for the bundle's limits; auto: that "
        "one, and with tensorrt one more for single pairs (auto)",
        metavar="auto|BxT[,BxT]",
        type=_parse_extents,
    )
    timing_cache: Path | Literal["auto"] | None = flag(
        "auto",
        "what TensorRT timed, kept for the next build; by default in the user's cache folder",
        metavar="FILE|none",
        type=_parse_cache,
    )
    limit_s: float = flag(
        3600.0, "give up then (%(default)g)", name="build-limit", metavar="SECONDS", type=SECONDS
    )
    workspace_mb: int | None = flag(
        None, "scratch memory of a layer at most", name="workspace", metavar="MIB", type=WORKSPACE
    )
    features: Features = Features()

    def check(self, max_batch: int, max_tokens: int) -> None:
        """Raise InputError where they fit neither each other nor a bundle of these limits."""
        self.check_alone()
        if self.profiles is not None:
            check_extents(self.profiles, max_batch, max_tokens)

    def check_alone(self) -> None:
        """Raise InputError where they do not fit each other, whatever the bundle."""
        check_values(self)
        cache = self.timing_cache
        if isinstance(cache, Path) and (cache.is_dir() or not cache.absolute().parent.is_dir()):
            raise InputError(f"timing_cache: expected a file in a folder that exists, got {cache}")
        check_features(self.features)
        if self.plugins == "on" and (excluded := no_plugins(self.features)) is not None:
            raise InputError(f"plugins: 'on' does not go with such an engine: {excluded}")

    def check_builder(self, builder: build.BuilderInfo) -> None:
        """Raise BackendError where this library on this machine has no such features."""
        if self.features != Features():
            capability = builder.compute_capability or build.gpu_capability()
            reason = refusal(self.features, builder.library, capability)
            if reason is not None:
                raise BackendError(reason)

    def spec(
        self, graph: Path, builder: build.BuilderInfo, targets: Sequence[str], shapes: Shapes, plugins: bool
    ) -> build.EngineSpec:
        """The specification of an engine that `builder` builds from `graph`."""
        cache = self.timing_cache
        if cache == "auto":
            cache = default_cache(builder.library, builder.version, builder.gpu)
        return build.EngineSpec(
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

    def takes_plugins(self, builder: build.BuilderInfo) -> bool:
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
    return tuple(c for c in build.RTX_CAPABILITIES if precision != "fp8" or float(c) >= _FIRST_E4M3)


def _lacks(builder: build.BuilderInfo) -> Iterator[str]:
    """Reasons why our kernels cannot go into an engine of this builder."""
    missing = [name for name in _COMPILERS if importlib.util.find_spec(name) is None]
    if builder.library != "tensorrt":
        command = install_command(EXTRAS["tensorrt"])
        yield f"{builder.library} has no plugins; {command} on a machine with a GPU"
    elif builder.compute_capability not in _CAPABILITIES:
        gpu, supported = builder.compute_capability, ", ".join(_CAPABILITIES)
        yield f"the kernels are for compute capability {supported}, and this GPU's is {gpu}"
    if missing:
        yield f"their compiler is not installed: pip install {' '.join(missing)}"
