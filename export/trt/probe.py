"""What the CUDA driver of this machine says, by ctypes; for a process of its own, since drivers crash too."""

from __future__ import annotations

import ctypes
from typing import Any

_CC_MAJOR, _CC_MINOR = 75, 76  # CUdevice_attribute
_LONGEST_NAME = 256
_START_HINTS = {  # CUresult of cuInit
    100: "it shows no GPU",
    803: "its library and its kernel module are of different versions, so restart the machine",
    804: "the GPU does not take a forward-compatible driver, so update the machine's own",
}


def probe_driver() -> dict[str, Any]:
    """Of the first GPU its `compute_capability` ("9.0") and `gpu`, its name, None without one; a `reason`."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return no_gpu(f"no CUDA driver: {error}")
    newest = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(newest))  # which works before the driver is started
    driver = f"driver for CUDA up to {newest.value // 1000}.{newest.value % 1000 // 10}"
    status = cuda.cuInit(0)
    if status != 0:
        why = f"refuses to start (status {status}): {_START_HINTS.get(status, 'nvidia-smi may tell why')}"
        return no_gpu(f"the {driver} {why}")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_LONGEST_NAME)
    statuses = (
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device),
        cuda.cuDeviceGetName(name, _LONGEST_NAME, device),
    )
    if any(statuses):
        return no_gpu(f"the CUDA driver shows no GPU (status {statuses})")
    capability = f"{major.value}.{minor.value}"
    reason = f"GPU of compute capability {capability}, {driver}"
    return {"compute_capability": capability, "gpu": name.value.decode(), "reason": reason}


def no_gpu(reason: str) -> dict[str, Any]:
    """The answer of a machine without one."""
    return {"compute_capability": None, "gpu": None, "reason": reason}
