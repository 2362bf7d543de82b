"""One comparator for every stage of an export: how far its outputs are from those of the stage before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.backends import usable_cores
from engine.backends.float32 import full_float32
from engine.backends.ort import load_session
from engine.errors import VerificationError
from engine.registry import TENSORS, network_of
from engine.registry.config import NetworkConfig
from export.graph.trace import example_inputs, outputs_of

Arrays = Mapping[str, np.ndarray]
Feeds = Iterable[Mapping[str, np.ndarray | torch.Tensor]]  # the inputs of each case by name

# (batch, tokens) of the inputs of every stage: the shortest caption, and two captions, one of them padded.
CASES = ((1, 2), (2, 50))
# Largest difference allowed to the stage before. Float32 stages differ by rounding alone, and their bound
# is absolute. A lower precision is held to the RMS of the difference over the RMS of the reference.
ABSOLUTE, RELATIVE = "max", "rms / rms of the reference"

_JUMPING = frozenset(name for name, tensor in TENSORS.items() if tensor.jumps)


@dataclass(frozen=True)
class Tolerance:
    """A bound and what it bounds: `ABSOLUTE`, the largest difference, or `RELATIVE`, a ratio of RMS."""

    kind: str
    value: float


EXACT = Tolerance(ABSOLUTE, 1e-4)
FP16 = Tolerance(RELATIVE, 2e-2)
# Guards against a broken network, which differs by about 1; accuracy is measured on the task, and
# tests/export/test_demo_errors.py pins the trained demo's errors. Drawn weights are hard on rounding: where a
# last product cancels, as that of CALS's tokens, an error of 1.5 % grows to 6.
INT8 = Tolerance(RELATIVE, 1.5e-1)
BF16, FP8 = Tolerance(RELATIVE, 1e-1), Tolerance(RELATIVE, 5e-1)


@dataclass(frozen=True)
class Difference:
    """Distance of a stage from its reference over all outputs and cases.

    `max` and `rms` are absolute; `relative` is the worst output's RMS of the difference over the RMS of
    the reference; `worst` names that output.
    """

    stage: str
    against: str
    max: float
    rms: float
    relative: float
    worst: str
    tolerance: float
    kind: str

    @property
    def passed(self) -> bool:
        """Whether the bound holds; a NaN never passes."""
        return (self.max if self.kind == ABSOLUTE else self.relative) <= self.tolerance

    @property
    def failure(self) -> str:
        """The message of a difference that does not pass."""
        return (
            f"stage {self.stage!r} differs from {self.against!r}: expected {self.kind} at most "
            f"{self.tolerance:g}, got max {self.max:.3g}, RMS {self.rms:.3g}, {RELATIVE} {self.relative:.3g} "
            f"(worst in {self.worst}); no bundle was written"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as the manifest holds it."""
        return asdict(self)


def case_inputs(
    config: NetworkConfig, cases: Sequence[tuple[int, int]] = CASES, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Draw the inputs of every case, the same at each call; as many tokens as the network takes at least."""
    least = network_of(config).tokenizer.min_tokens
    return [example_inputs(config, batch, max(n, least), seed + i) for i, (batch, n) in enumerate(cases)]


def torch_outputs(
    model: torch.nn.Module,
    config: NetworkConfig,
    feeds: Iterable[Mapping[str, torch.Tensor]] | None = None,
) -> list[Arrays]:
    """Run a torch network on the cases, or on `feeds` instead; the outputs by name."""
    with full_float32("cpu"), torch.inference_mode():
        return [
            {name: y.numpy() for name, y in model(**inputs)._asdict().items() if y is not None}
            for inputs in (case_inputs(config) if feeds is None else feeds)
        ]


def onnx_outputs(path: Path, config: NetworkConfig, feeds: Feeds | None = None) -> list[Arrays]:
    """Run the graph at `path` in ONNX Runtime on the CPU, on every case or on `feeds` instead."""
    session = load_session(path, usable_cores())
    names = outputs_of(config)
    outputs: list[Arrays] = []
    for inputs in case_inputs(config) if feeds is None else feeds:
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        outputs.append(dict(zip(names, session.run(list(names), arrays), strict=True)))
    return outputs


def _pairs(
    reference: Sequence[Arrays], candidate: Sequence[Arrays]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name in reference[0]:
        want = np.concatenate([x[name].ravel() for x in reference]).astype(np.float64)
        got = np.concatenate([x[name].ravel() for x in candidate]).astype(np.float64)
        yield name, want, got


def relative_errors(reference: Sequence[Arrays], candidate: Sequence[Arrays]) -> dict[str, float]:
    """RMS of the difference over the RMS of the reference, of each output, over the same cases.

    Of an output that is zero throughout, as a box may be, it is 0 where nothing differs, else infinite.
    """
    return {name: _relative(want, got) for name, want, got in _pairs(reference, candidate)}


def _relative(want: np.ndarray, got: np.ndarray) -> float:
    error, size = (float(np.sqrt(np.mean(x**2))) for x in (got - want, want))
    return error / size if size else 0.0 if error == 0 else math.inf


def compare(
    stage: str, against: str, reference: Sequence[Arrays], candidate: Sequence[Arrays], tolerance: Tolerance
) -> Difference:
    """Measure the distance of `candidate` from `reference`, outputs for the same cases."""
    apart = {name: np.abs(got - want) for name, want, got in _pairs(reference, candidate)}
    relative = relative_errors(reference, candidate)
    worst = max(relative, key=lambda name: np.nan_to_num(relative[name], nan=np.inf))
    return Difference(
        stage=stage,
        against=against,
        max=float(np.max([_largest(name, x) for name, x in apart.items()])),
        rms=float(np.sqrt(np.mean(np.concatenate([*apart.values()]) ** 2))),
        relative=relative[worst],
        worst=worst,
        tolerance=tolerance.value,
        kind=tolerance.kind,
    )


def _largest(name: str, apart: np.ndarray) -> float:
    """The largest difference; the RMS of an output whose single values may jump."""
    return float(np.sqrt(np.mean(apart**2)) if name in _JUMPING else apart.max())


def check(difference: Difference) -> Difference:
    """Return the difference if it passes; raise VerificationError otherwise."""
    if not difference.passed:
        raise VerificationError(difference.failure)
    return difference
