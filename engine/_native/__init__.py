"""Resize and normalisation in compiled code, where setup.py could build it; elsewhere `resample` is None.

The bits are those of Pillow and NumPy; see engine/inputs/network_input.py, which has both forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

MAX_SIDE = 1 << 16  # pixels of a side: bounds the tables of weights
MAX_SIZE = 1 << 11  # pixels of a side of the output

# Bands of rows, uint8 [rows, W, 3] or Arrow's capsules; W; H; levels, [3, 256]; out, [3, S, S].
Resample = Callable[[Iterable[Any], int, int, Any, Any], None]

resample: Resample | None = None
absent = ""
passes: tuple[str, ...] = ()
try:
    import engine._native._resample as _resample
except ImportError as error:
    absent = str(error)
else:
    resample, passes = _resample.resample, tuple(_resample.passes())


def describe() -> str:
    """What resizes images here: "compiled, avx2", or why Pillow and NumPy do."""
    return f"compiled, {passes[0]}" if passes else f"Pillow and NumPy ({absent})"
