"""Loads PTX and launches it through the CUDA driver alone, which is how TensorRT launches a plugin's code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from engine.backends import cuda


class Driver:
    """Loads and launches kernels in the context that torch has made current.

    `library` is the driver's, by default this machine's. Raises OSError where there is none.
    """

    def __init__(self, library: Any = None) -> None:
        self._driver = cuda.Driver(library or cuda.load_library(), cuda.LAUNCHING)

    def version(self) -> int:
        """The newest CUDA that the driver serves, 13000 for 13.0."""
        return self._driver.version()

    def load(self, ptx: str, entry: str) -> ctypes.c_void_p:
        """Compile PTX for this GPU and return its function `entry`; the module stays loaded.

        Raises BackendError with the driver's reason where it refuses the code or lacks the function.
        """
        module = self._driver.handle("cuModuleLoadData", ctypes.c_char_p(ptx.encode()))
        return self._driver.handle("cuModuleGetFunction", module, entry.encode())

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        """Launch on `stream`; arguments are tensors, passed as pointers, and int32 numbers.

        Raises BackendError with the driver's reason.
        """
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (*grid, threads, 1, 1, shared)
        self._driver.call("cuLaunchKernel", function, *sizes, stream, pointers, None)


def _argument(value: Any) -> ctypes.c_void_p | ctypes.c_int32:
    return ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_void_p(value.data_ptr())
