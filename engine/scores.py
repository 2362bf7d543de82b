"""How logits become scores and decisions: temperatures, thresholds, and the record of their calibration.

A detector decides on a pair ("manipulated"), on each type of manipulation, and on each word of the caption
("words").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Annotated, Any

from engine.errors import InputError, did_you_mean, quoted
from engine.registry.config import TYPES
from engine.schema import Check, Record, at_least, matching, within

DECISIONS = ("manipulated", *TYPES, "words")
GROUP = "types"  # names the thresholds of all four types at once
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0

_Score = Annotated[float, within(0, 1)]
_Threshold = Annotated[float, Check("a number above 0 and at most 1", lambda value: 0 < value <= 1)]
_Count = Annotated[int, at_least(0)]
_Temperature = Annotated[float, within(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)]


@dataclass(frozen=True)
class Thresholds(Record):
    """Scores in (0, 1] from which a pair counts as manipulated, a type as detected, a word as manipulated."""

    manipulated: _Threshold
    face_swap: _Threshold
    face_attribute: _Threshold
    text_swap: _Threshold
    text_attribute: _Threshold
    words: _Threshold

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Give each type the one threshold of bundles that had a single one for all of them."""
        raw = dict(raw)
        group = raw.pop(GROUP, None)
        return raw if group is None else dict.fromkeys(TYPES, group) | raw

    def replaced(self, given: Mapping[str, float]) -> Thresholds:
        """Return these with some replaced by name, "types" those of all four; raises InputError."""
        names = (*DECISIONS, GROUP)
        if not isinstance(given, Mapping) or not set(given) <= set(names):
            unknown = [str(name) for name in given if name not in names] if isinstance(given, Mapping) else []
            hint = did_you_mean(unknown[0], names) if unknown else ""
            raise InputError(
                f"thresholds: expected a mapping with some of {', '.join(names)}, got {quoted(given)}{hint}"
            )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
                raise InputError(f"thresholds[{name!r}]: expected a number from 0 to 1, got {quoted(value)}")
        group = dict.fromkeys(TYPES, float(given[GROUP])) if GROUP in given else {}
        return replace(self, **group | {name: float(x) for name, x in given.items() if name != GROUP})


@dataclass(frozen=True)
class Temperatures(Record):
    """What logits are divided by before softmax or sigmoid makes a score of them; 1 leaves them alone.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """

    manipulated: _Temperature = 1.0
    face_swap: _Temperature = 1.0
    face_attribute: _Temperature = 1.0
    text_swap: _Temperature = 1.0
    text_attribute: _Temperature = 1.0
    words: _Temperature = 1.0


@dataclass(frozen=True)
class Rate(Record):
    """A share in [0, 1] of `count` things, and the interval from `low` to `high` that it lies in."""

    value: _Score
    low: _Score
    high: _Score
    count: _Count


@dataclass(frozen=True, kw_only=True)
class ScoreCalibration(Record):
    """The temperatures of a bundle, and how they and its thresholds were chosen (`dgm4 calibrate`).

    They were fitted on `fitted` pairs of the `split` of `source`, whose annotation file has the SHA-256
    `annotations`, for the wanted rate of `false_alarms`. `reached` holds the rate by decision on `checked`
    other pairs of that split, with intervals of `level`; decisions that kept their threshold are not in it.
    """

    temperatures: Temperatures
    source: str
    split: str
    annotations: Annotated[str, matching("[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
    seed: _Count
    fitted: _Count
    checked: _Count
    false_alarms: _Score
    level: _Score
    reached: dict[str, Rate]

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        if DECISIONS[0] not in self.reached or not set(self.reached) <= set(DECISIONS):
            yield "reached", f"{DECISIONS[0]} and others of {', '.join(DECISIONS)}", sorted(self.reached)
