"""Float32 products in float32, whatever the host program has asked torch for.

torch keeps the precision of float32 products per process. A host that allows TF32 or bfloat16 for its
training would have it in a bundle's network too, and a captured graph would keep it for good.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import backends

_CUDNN: Any = backends.cudnn  # torch declares neither "conv" nor "rnn" of its modules
_MKLDNN: Any = backends.mkldnn
_EXACT = ("ieee", "none")  # "none" is unset, and means IEEE for all operators below


class _Setting:
    """The precision of some operators: exact while at least one thread is inside, then the host's again.

    `operators` have torch's `fp32_precision`; `read` and `write` are the older interface to the same setting,
    `exact` its value for IEEE.
    """

    def __init__(
        self,
        operators: Sequence[Any],
        read: Callable[[], Any] | None = None,
        write: Callable[[Any], None] | None = None,
        exact: Any = None,
    ) -> None:
        self._operators, self._read, self._write, self._exact = operators, read, write, exact
        self._lock, self._inside, self._host = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1 and self._reduced():
                self._set_exact()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._host.close()

    def _reduced(self) -> list[Any]:
        return [operator for operator in self._operators if operator.fp32_precision not in _EXACT]

    def _set_exact(self) -> None:
        for operator in self._operators:
            self._host.callback(_restore, operator, operator.fp32_precision)
        # The older interface first, where the host uses it: while the two disagree, torch raises RuntimeError
        # for whoever reads the older one, and another thread of the host may do so meanwhile.
        if self._read is not None and self._write is not None:
            try:
                before = self._read()
            except RuntimeError:
                pass  # they disagree already, since the host uses the newer one
            else:
                self._host.callback(self._write, before)
                self._write(self._exact)
        for operator in self._reduced():
            operator.fp32_precision = "ieee"


def _restore(operator: Any, precision: str) -> None:
    """Set the precision back; one that came from the parent setting is left to come from there."""
    operator.fp32_precision = "none"
    if operator.fp32_precision != precision:
        operator.fp32_precision = precision


def _read_cudnn() -> Any:
    return _CUDNN.allow_tf32


def _write_cudnn(allowed: bool) -> None:
    _CUDNN.allow_tf32 = allowed


_MATMUL = _Setting(
    (backends.cuda.matmul, _MKLDNN.matmul),
    torch.get_float32_matmul_precision,
    torch.set_float32_matmul_precision,
    "highest",
)
_SETTINGS = {
    "cpu": (_MATMUL, _Setting((_MKLDNN.conv,))),
    "cuda": (_MATMUL, _Setting((_CUDNN.conv, _CUDNN.rnn), _read_cudnn, _write_cudnn, False)),
}


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Multiply float32 tensors on "cpu" or "cuda" as float32 in the block: no TF32, no bfloat16, no autocast.

    Autocast is the calling thread's setting, the others are the process's: they are restored when the last of
    several blocks at once ends. A host whose settings are exact is left alone.
    """
    with ExitStack() as stack:
        for setting in _SETTINGS[device_type]:
            stack.enter_context(setting)
        stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
