"""Tensors to files; a refused write is an OSError, which the libraries tell in words of their own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_NUMBER = re.compile(r"\(os error (\d+)\)")


def save_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, no two of which may share memory, as safetensors; raises OSError."""
    try:
        safetensors.torch.save_file(state, path, metadata=metadata)
    except SafetensorError as error:
        if (number := _NUMBER.search(str(error))) is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def save_pickle(content: Any, path: Path) -> None:
    """Write what `torch.load` reads; raises OSError."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # that its file has the wrong length, after a write that failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
