"""The timing cache: TensorRT's kernel timings, kept for the next build on the same model of GPU.

A cache belongs to one version of the library and one model of GPU. TensorRT-RTX times nothing and has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.files import cache_folder, replacing

Complain = Callable[[str], None]


def default_cache(library: str, version: str | None, gpu: str | None) -> Path | None:
    """The user's file for this library and GPU, in the folder XDG_CACHE_HOME; None where none is used."""
    if library == "tensorrt_rtx" or version is None or gpu is None:
        return None
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{library} {version} {gpu}")
    return cache_folder() / "timing" / f"{name}.cache"


def load_timing_cache(config: Any, path: Path, complain: Complain) -> Any:
    """Attach the cache of an earlier build to an IBuilderConfig, or an empty one; return it."""
    try:
        stored = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        complain(f"the timing cache {path} was not read: {error.strerror}")
        stored = b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another GPU or version: start anew
        config.set_timing_cache(cache, False)
    return cache


def save_timing_cache(path: Path, cache: Any, complain: Complain) -> None:
    """Replace the file by the cache as it is now; a file that cannot be written is only a warning."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(cache.serialize())
    except OSError as error:
        complain(f"the timing cache {path} was not saved: {error.strerror or error}")
