"""The CUDA driver of this machine and its first GPU. For a child process: drivers can crash too."""

from __future__ import annotations

from typing import Any

from engine.backends.cuda import PROTOTYPES, Driver, load_library
from engine.errors import BackendError

_ASKED = (
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetName",
    "cuGetErrorString",
)
_START_HINTS = {  # CUresult of cuInit
    100: "it shows no GPU",
    803: "its library and its kernel module are of different versions, so restart the machine",
    804: "the GPU does not take a forward-compatible driver, so update the machine's own",
}


def open_driver() -> Driver:
    """Bind what is asked here, which drivers of any age have; raises OSError where there is no driver."""
    return Driver(load_library(), {name: PROTOTYPES[name] for name in _ASKED})


def probe_driver() -> dict[str, Any]:
    """Return `compute_capability` ("9.0") and name, `gpu`, of the first GPU or None, and a `reason`."""
    try:
        driver = open_driver()
    except OSError as error:
        return no_gpu(f"no CUDA driver: {error}")
    newest = driver.version()
    version = f"driver for CUDA up to {newest // 1000}.{newest % 1000 // 10}"
    status = driver.attempt("cuInit", 0)
    if status != 0:
        why = f"refuses to start (status {status}): {_START_HINTS.get(status, 'nvidia-smi may tell why')}"
        return no_gpu(f"the {version} {why}")
    try:
        device = driver.number("cuDeviceGet", 0)
        capability, name = driver.capability(device), driver.device_name(device)
    except BackendError as error:
        return no_gpu(f"the CUDA driver shows no GPU: {error}")
    reason = f"GPU of compute capability {capability}, {version}"
    return {"compute_capability": capability, "gpu": name, "reason": reason}


def no_gpu(reason: str) -> dict[str, Any]:
    """The result on a machine without a GPU."""
    return {"compute_capability": None, "gpu": None, "reason": reason}
