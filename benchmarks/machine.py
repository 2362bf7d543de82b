"""What a result was measured on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.backends import usable_cores

_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt-rtx", "numpy", "pytest-benchmark")
_ROOT = Path(__file__).resolve().parent.parent


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in GB, system, versions, commit and hash of the code, ready for JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "source": _source(),
    }


def _processor() -> dict[str, Any]:
    """Name of the model and the instruction sets that decide the speed of a matrix product."""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    keys = ("model name", "cpu family", "model", "cpu MHz")
    return {**{k: fields[k] for k in keys if k in fields}, "sets": [f for f in known if f in flags]}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the tree, with a plus sign where it has changes; outside a repository DGM4_COMMIT."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    return os.environ.get("DGM4_COMMIT", "unknown")


def _source() -> str:
    """Hash of all Python code, which tells the commit of a copy that has lost its repository."""
    total = hashlib.sha256()
    for path in sorted(_ROOT.glob("*/**/*.py")):
        total.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
