"""The `dgm4` command."""

from export.cli.app import main

__all__ = ["main"]
