"""Description of the machine that a measurement was made on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.backends import usable_cores
from engine.packages import version_of

_PACKAGES = (
    "torch",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)
_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
_GPU_LIMIT_S = 20.0


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load, memory in GB, GPUs, system and versions, ready for JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2),  # processes that ran or waited in the last minute
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpus(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in _PACKAGES},
    }


def _processor() -> dict[str, Any]:
    """Name of the model and the instruction sets that decide the speed of a matrix product."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    keys = ("model name", "cpu family", "model", "cpu MHz")
    return {**{k: fields[k] for k in keys if k in fields}, "sets": [f for f in _SETS if f in flags]}


def _gpus() -> list[str]:
    """Name and driver of every NVIDIA GPU; none where nvidia-smi is missing or does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, check=True, timeout=_GPU_LIMIT_S)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return []
