"""Make a bundle of another: its files without copying their bytes, and its manifest as it is stored."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from engine.errors import BundleError
from engine.layout import MANIFEST
from export.writing import FULL


def carry(source: Path, target: Path) -> None:
    """Hard-link a file into the new bundle, or copy it where that fails; raises BundleError.

    Also copied is a file of another mode than the new bundle's files get, which is shared by all its links.
    """
    try:
        given, wanted = source.stat().st_mode, target.parent.stat().st_mode & 0o666
        with contextlib.suppress(OSError):
            if stat.S_IMODE(given) == wanted:
                os.link(source.resolve(), target)
        if not target.exists():
            shutil.copyfile(source, target)
    except OSError as error:
        if error.errno in FULL:
            raise  # of the new bundle, whose writer tells it
        raise BundleError(f"{source}: cannot be copied into the new bundle: {error.strerror}") from error


def stored_fields(bundle: Bundle) -> dict[str, Any]:
    """Return the manifest's fields but its SHA-256, those that only a newer release reads among them."""
    fields = json.loads((bundle.path / MANIFEST).read_bytes())
    return {name: value for name, value in fields.items() if name != "sha256"}
