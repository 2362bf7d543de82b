"""What importing `engine` sets in a process, before any library that it concerns is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, cast

_ROOT = Path(__file__).resolve().parents[1]
_SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class _KernelsFinder:
    """Finds our modules of `kernels` where Hugging Face's package of that name hides them.

    Two wheels share one folder, and need no help. A clone or an editable install lies elsewhere, and Python
    looks no further than the folder with an `__init__.py`, which is theirs.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`; asked last, for names that no other finder knows."""
        if fullname.rpartition(".")[0] != "kernels":
            return None
        return PathFinder.find_spec(fullname, [str(_ROOT / "kernels")], target)


def prepare() -> None:
    """Keep libraries from sending usage data, unless the user's environment says otherwise; find `kernels`.

    ONNX Runtime opens its store of events when it is imported, and children inherit the switch. OpenVINO has
    no switch: without the package `openvino_telemetry` its import sends nothing and needs no home folder.
    """
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)  # importing it now fails
    sys.meta_path.append(_KernelsFinder())
