"""PTX on the GPU through the CUDA driver alone, which is how TensorRT launches a plugin's code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

LIBRARY = "libcuda.so.1"


class Driver:
    """The driver's calls that load and launch a kernel, in the context that torch has made current.

    `library` is what the driver's functions are looked up in. Raises OSError where there is no driver.
    """

    def __init__(self, library: Any = None) -> None:
        self._cuda = library or ctypes.CDLL(LIBRARY)

    def version(self) -> int:
        """The newest CUDA that the driver serves, 13000 for 13.0."""
        found = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(found))
        return found.value

    def load(self, ptx: str, entry: str) -> ctypes.c_void_p:
        """Compile PTX for this GPU; the function `entry`. Its module stays loaded.

        Raises RuntimeError with the driver's reason where it refuses the code or knows no such function.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(entry.encode()))
        return function

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

        Raises RuntimeError with the driver's reason.
        """
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (*map(ctypes.c_uint, (*grid, threads, 1, 1, shared)),)
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), pointers, None)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} (status {status})")


def _argument(value: Any) -> ctypes.c_void_p | ctypes.c_int32:
    return ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_void_p(value.data_ptr())
