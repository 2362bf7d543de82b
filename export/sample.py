"""The picture and caption that a finished export is tried on."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

_SAMPLE_PACKAGE, _SAMPLE = "scikit-image", "astronaut.png"
SAMPLE_CAPTION = "Astronaut Eileen Collins smiles in front of the flag and a model of the shuttle"


def sample_picture() -> Path | None:
    """A photograph that ships in a package, or None where that is not installed."""
    try:
        files = importlib.metadata.files(_SAMPLE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())) for f in files if f.name == _SAMPLE]
    return found[0] if found and found[0].is_file() else None
