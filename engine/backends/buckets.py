"""Buckets of shapes: a captured graph runs one shape only, so inputs are padded to that of their bucket.

Batches go to the next power of two, tokens to the next multiple of 16, each up to the bundle's limit. 16 is
the smallest tile of queries of the attention kernel (kernels/jit.py), so that padding within it costs that
kernel nothing; elsewhere it is 8 tokens of some 300 a pair on average. At the usual limits (32 pairs, 128
tokens) there are 48 buckets at most; steps of 8 would double the number of graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import BackendError
from engine.manifest import Limits, TensorSpec
from engine.registry import TENSORS

TOKEN_STEP = 16
Arrays = Mapping[str, np.ndarray]


class Bucket(NamedTuple):
    """Pairs and tokens of one static shape."""

    batch: int
    tokens: int


def bucket_of(batch: int, tokens: int, limits: Limits) -> Bucket:
    """The smallest bucket for `batch` pairs of `tokens` tokens; raises BackendError above the limits."""
    most = (limits.max_batch, limits.max_tokens)
    if not (1 <= batch <= most[0] and 1 <= tokens <= most[1]):
        raise BackendError(
            f"expected 1 to {most[0]} pairs of 1 to {most[1]} tokens, the bundle's limits, "
            f"got {batch} of {tokens}; split the batch, or export with higher limits"
        )
    power, steps = 1 << (batch - 1).bit_length(), -(-tokens // TOKEN_STEP)
    return Bucket(min(power, most[0]), min(steps * TOKEN_STEP, most[1]))


def buckets(limits: Limits) -> list[Bucket]:
    """Every bucket within the limits."""
    batches = [1 << power for power in range((limits.max_batch - 1).bit_length() + 1)]
    tokens = range(TOKEN_STEP, limits.max_tokens + TOKEN_STEP, TOKEN_STEP)
    return [
        bucket_of(min(b, limits.max_batch), min(n, limits.max_tokens), limits)
        for b in batches
        for n in tokens
    ]


def measure(feeds: Arrays, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Sizes of the symbolic dimensions, "batch" and "tokens", that `feeds` agree on.

    Raises BackendError for names, types or shapes other than those of `specs`.
    """
    if set(feeds) != {spec.name for spec in specs}:
        raise BackendError(f"expected the inputs {[spec.name for spec in specs]}, got {list(feeds)}")
    sizes: dict[str, int] = {}
    for spec in specs:
        array = feeds[spec.name]
        if array.dtype != spec.dtype or not _bind(array.shape, spec.shape, sizes):
            bound = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(
                f"{spec.name}: expected {spec.dtype} of shape {list(spec.shape)}"
                f"{f' where {bound}' if bound else ''}, got {array.dtype} of shape {list(array.shape)}"
            )
    return sizes


def check_ids(ids: np.ndarray, vocabulary: int) -> None:
    """Raise BackendError for an id outside the vocabulary.

    Such an id makes a GPU unusable for the process, and OpenVINO compute something else without a word.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
        span = f"{ids.min()} to {ids.max()}"
        raise BackendError(f"input_ids: expected 0 to {vocabulary - 1}, the vocabulary, got {span}")


def _bind(shape: Sequence[int], dims: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether `shape` fits `dims`; the first size of a name is entered into `sizes`."""
    if len(shape) != len(dims):
        return False
    pairs = zip(shape, dims, strict=True)
    return all(size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) for size, dim in pairs)


def fill(buffer: np.ndarray, values: np.ndarray) -> None:
    """Put `values` [b, n] at the start of a buffer [B, N], with zeros after them."""
    batch, tokens = values.shape
    buffer[batch:] = 0
    buffer[:batch, tokens:] = 0
    buffer[:batch, :tokens] = values


def cut(outputs: Arrays, batch: int, tokens: int) -> dict[str, np.ndarray]:
    """Copy what belongs to the first `batch` pairs and `tokens` tokens out of a bucket's outputs."""
    return {name: array[:batch, : TENSORS[name].rows(tokens)].copy() for name, array in outputs.items()}
