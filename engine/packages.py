"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata


def version_of(*packages: str) -> str | None:
    """Version of the first of these distributions that is installed; None if none is."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
