"""Optimisation profiles: which shapes an engine is built for, checked before a builder sees them.

A profile is the range of every input and the shape in it that kernels are chosen for. It goes by its extent,
the most pairs and tokens that it takes, as 8x64; each begins at one pair of the fewest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.errors import BuildError, InputError

Shape = Sequence[int]
Profile = Mapping[str, Sequence[Shape]]  # input -> (min, opt, max)
Extent = tuple[int, int]  # pairs, tokens

TYPICAL_BATCH = 8
MOST_PROFILES = 8


class Shapes(NamedTuple):
    """Limits of a bundle: pairs, tokens (least, of a usual caption, most) and pixels of an image's side.

    others: further inputs, by name, and the sizes of one pair's.
    """

    max_batch: int
    min_tokens: int
    typical_tokens: int
    max_tokens: int
    image_size: int
    others: Mapping[str, Sequence[int | str]] = {}


def auto_extents(library: str, max_batch: int, max_tokens: int) -> tuple[Extent, ...]:
    """The default: one profile with `tensorrt_rtx`, one more for single pairs with `tensorrt`.

    TensorRT times its kernels at one shape of each profile, and what is fastest for 8 pairs is not for one,
    so the latency of a single pair has a profile of its own. TensorRT-RTX times nothing and compiles kernels
    for the shape at hand when it runs, while each further profile is compiled anew: base ASAP in fp16 took
    9 s of CPU time with one profile, and 8 s and 19 MB of engine (4 %) more with each further one.
    """
    whole = (max_batch, max_tokens)
    return (whole,) if library == "tensorrt_rtx" or max_batch == 1 else ((1, max_tokens), whole)


def check_extents(extents: Sequence[Extent], max_batch: int, max_tokens: int) -> None:
    """Raise InputError unless they are different, within the bundle's limits, and one covers these."""
    if not 1 <= len(extents) <= MOST_PROFILES:
        raise InputError(f"profiles: expected 1 to {MOST_PROFILES}, got {len(extents)}")
    if len(set(extents)) != len(extents):
        raise InputError(f"profiles: expected each once, got {extents_text(extents)}")
    for number, (batch, tokens) in enumerate(extents, 1):
        where = f"profiles: profile {number} ({batch}x{tokens})"
        if not 1 <= batch <= max_batch:
            raise InputError(f"{where}: expected 1..{max_batch} pairs, the bundle's limit, got {batch}")
        if not 2 <= tokens <= max_tokens:
            raise InputError(f"{where}: expected 2..{max_tokens} tokens, the bundle's limit, got {tokens}")
    if (max_batch, max_tokens) not in extents:
        raise InputError(
            f"profiles: expected one for the bundle's limits, {max_batch}x{max_tokens}, among "
            f"{extents_text(extents)}; add it, or lower --max-batch and --max-tokens"
        )


def extents_text(extents: Sequence[Extent]) -> str:
    """As the command line takes them: 1x32,8x64."""
    return ",".join(f"{batch}x{tokens}" for batch, tokens in extents)


def profiles_of(extents: Sequence[Extent], shapes: Shapes) -> tuple[Profile, ...]:
    """Shapes (smallest, best, largest) of every input for each extent, the largest extent last."""
    ordered = sorted(extents)
    return tuple(_profile(extent, _best(extent, ordered, shapes), shapes) for extent in ordered)


def _best(extent: Extent, extents: Sequence[Extent], shapes: Shapes) -> Extent:
    """The pairs and tokens to choose kernels for: usual ones, but none that a smaller profile takes."""
    batch, tokens = extent
    fewer = max((b for b, _ in extents if b < batch), default=0)
    shorter = max((t for b, t in extents if b == batch and t < tokens), default=0)
    return min(batch, max(TYPICAL_BATCH, 2 * fewer)), min(tokens, max(shapes.typical_tokens, shorter + 1))


def _profile(extent: Extent, best: Extent, shapes: Shapes) -> Profile:
    text = [(1, shapes.min_tokens), best, extent]
    image = [(batch, 3, shapes.image_size, shapes.image_size) for batch, _ in text]
    others = {name: [(batch, *map(int, sizes)) for batch, _ in text] for name, sizes in shapes.others.items()}
    return {"image": image, "input_ids": text, "attention_mask": text, **others}


def check_profiles(declared: Mapping[str, Shape], profiles: Sequence[Profile]) -> None:
    """Raise BuildError unless every profile fits the inputs that the network declares.

    declared: input name -> shape, -1 where a dimension is dynamic. A profile has to name every input with
    a dynamic dimension. The message names the number of the profile, from 1, the input and the dimension.
    """
    dynamic = sorted(name for name, shape in declared.items() if -1 in shape)
    if dynamic and not profiles:
        raise BuildError(f"expected a profile for the dynamic inputs {dynamic}, got none")
    for number, profile in enumerate(profiles, 1):
        unknown = sorted(set(profile) - set(declared))
        if unknown:
            raise BuildError(f"profile {number} names inputs {unknown}; the network has {sorted(declared)}")
        missing = [name for name in dynamic if name not in profile]
        if missing:
            raise BuildError(f"profile {number} lacks the dynamic inputs {missing}")
        for name, ranges in profile.items():
            _check_ranges(f"profile {number}, input {name!r}", list(declared[name]), ranges)


def _check_ranges(where: str, shape: list[int], ranges: Sequence[Shape]) -> None:
    if len(ranges) != 3:
        raise BuildError(f"{where}: expected three shapes (min, opt, max), got {len(ranges)}")
    if any(len(limit) != len(shape) for limit in ranges):
        got = [list(limit) for limit in ranges]
        raise BuildError(f"{where}: expected {len(shape)} dimensions, as {shape}, got {got}")
    for axis, (fixed, low, best, high) in enumerate(zip(shape, *ranges, strict=True)):
        place = f"{where}, dimension {axis}: {low}..{best}..{high}"
        if not 1 <= low <= best <= high:
            raise BuildError(f"{place}; expected 1 <= min <= opt <= max")
        if fixed != -1 and (low, high) != (fixed, fixed):
            raise BuildError(f"{place}; the network fixes it to {fixed}")
