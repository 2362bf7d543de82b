"""Calibrate a bundle's scores on annotated pairs: a temperature and a threshold for each decision.

Half of the split's news items fit them, the other half measures what they reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dgm4.data.annotations import Sample, read_split, split_file
from engine.bundle import Bundle
from engine.errors import BundleError, InputError
from engine.files import sha256_of
from engine.layout import CARD
from engine.manifest import Manifest
from engine.scores import ScoreCalibration, Temperatures, Thresholds
from export.bundle.card import model_card
from export.bundle.copying import carry, stored_fields
from export.bundle.writer import BundleWriter
from export.evaluation.curves import AtThreshold, Reliability, at_threshold, reliability
from export.evaluation.decisions import Decisions, read_decisions
from export.evaluation.fitting import draw_half, fit_temperature, fit_threshold, log_loss, needed
from export.evaluation.running import BUNDLE, RunOptions, check_network, run_bundle

_VERDICT = "manipulated"
_FEW_FOUND = 0.1  # of what is manipulated: hardly a detector


@dataclass(frozen=True)
class CalibrateOptions(RunOptions):
    """Which pairs to calibrate on and how; `false_alarms` is the wanted rate, in (0, 1)."""

    split: str = "val"
    false_alarms: float = 0.01


@dataclass(frozen=True)
class Outcome:
    """A decision's temperature and threshold, and what they reach on the pairs held out.

    `fitted` is false where both stay as they were. `before` is the bundle's threshold up to now, `raw` and
    `calibrated` the reliability at temperature 1 and at this one, None where nothing was held out.
    """

    temperature: float
    threshold: float
    fitted: bool
    before: float
    reached: AtThreshold
    raw: Reliability | None
    calibrated: Reliability | None


@dataclass(frozen=True)
class Calibrated:
    """The result of `calibrate`; `notes` tell what stays as it was, and what to know of the rest."""

    bundle: str
    out: str
    model: dict[str, str]
    calibration: ScoreCalibration
    outcomes: dict[str, Outcome]
    notes: tuple[str, ...]
    problems: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe data."""
        return asdict(self)


def calibrate(
    bundle: str | Path, data: str | Path, out: Path, options: CalibrateOptions, progress: bool = False
) -> Calibrated:
    """Calibrate the bundle's scores on the data folder `data` and write the bundle with them at `out`.

    The bundle itself stays as it is. Raises InputError for data that cannot be used and for too few pairs for
    the wanted rate, BundleError and BackendError for what does not load or cannot be written, NumericalError
    where the network outputs NaN or infinity. `progress` shows a bar on stderr.
    """
    if not 0 < options.false_alarms < 1:
        raise InputError(f"false_alarms: expected a rate between 0 and 1, got {options.false_alarms}")
    opened = Bundle.open(bundle)
    check_network(opened, "calibrate")
    if out.resolve() == opened.path.resolve():
        raise BundleError(f"--out {out}: is the bundle itself, which stays as it is; choose another place")
    BundleWriter.check_replaceable(out, overwrite=True)
    _check_enough(read_split(data, options.split, options.on_bad, check_pictures=False).samples, options)
    opened.verify_all()
    run = run_bundle(opened, data, options, progress=progress)
    scored = run.scored
    _check_enough(scored.samples, options)
    decisions = read_decisions(scored.samples, scored.tokens, scored.outputs[BUNDLE])
    outcomes, reasons = _fit_all(decisions, opened.manifest, options)
    calibration = _record(outcomes, len(scored.samples), Path(data), options)
    _write(opened, out, outcomes, calibration)
    return Calibrated(
        bundle=str(opened.path),
        out=str(out),
        model=run.model,
        calibration=calibration,
        outcomes=outcomes,
        notes=(*reasons, *_notes(opened.manifest, outcomes, options.false_alarms)),
        problems=run.problems,
    )


def _check_enough(samples: Sequence[Sample], options: CalibrateOptions) -> None:
    """Raise InputError unless each half has what a threshold for the wanted rate takes."""
    got = len({sample.id for sample in samples if not sample.manipulated})
    wanted = 2 * needed(options.false_alarms)
    if got >= max(wanted, 2):
        return
    possible = math.ceil(1000 / (got // 2 + 1)) / 1000
    remedy = f"give more pairs or --false-alarms {possible:g}" if got >= 2 else "give more pairs"
    raise InputError(
        f"a rate of {options.false_alarms:g} false alarms takes {max(wanted, 2)} pairs that are not "
        f"manipulated, half of them to choose the thresholds and half to check them; the split "
        f"{options.split} has {got}: {remedy}"
    )


def _fit_all(
    decisions: Mapping[str, Decisions], manifest: Manifest, options: CalibrateOptions
) -> tuple[dict[str, Outcome], list[str]]:
    """Fit every decision on one half and measure it on the other; and notes on what was not fitted."""
    verdict = decisions[_VERDICT]
    genuine = np.bincount(verdict.item, weights=~verdict.truth) > 0
    fitting = draw_half(genuine, options.seed)
    outcomes, notes = {}, []
    for name, decision in decisions.items():
        chosen = fitting[decision.item]
        half, rest = decision.where(chosen), decision.where(~chosen)
        before, temperature = getattr(manifest.thresholds, name), fit_temperature(half)
        why = _why_no_temperature(name, half, rest, temperature)
        temperature = None if why else temperature
        threshold = fit_threshold(half, temperature or 1.0, options.false_alarms)
        if threshold is None:
            notes.append(_why_kept(name, half, before, options.false_alarms))
            used = getattr(manifest.temperatures, name), before
        else:
            used = temperature or 1.0, threshold
            notes += [why] if why else []
        outcomes[name] = _measure(rest, *used, threshold is not None, before, options.level)
    return outcomes, notes


def _why_kept(name: str, half: Decisions, before: float, rate: float) -> str:
    """Why there is no threshold; raises InputError for the verdict, which is what the rate is for."""
    count = int((~half.truth).sum())
    if count >= needed(rate):
        why = f"more than {rate:g} of those that are not manipulated have a score of 1"
    else:
        why = f"a rate of {rate:g} takes {needed(rate)} that are not manipulated, got {count}"
    if name == _VERDICT:
        raise InputError(f"no threshold of the verdict: {why}; these weights do not fit these pairs")
    return f"{name} keeps its threshold {before:g}: {why}"


def _why_no_temperature(name: str, half: Decisions, rest: Decisions, fitted: float | None) -> str:
    """Why a decision keeps the temperature 1; empty where the one fitted helps on what was held out."""
    if fitted is not None:
        if not rest.truth.size or log_loss(rest, fitted) < log_loss(rest, 1.0):
            return ""
        why = f"the {fitted:.3f} fitted does not lower the log loss on the pairs held out; use more pairs"
    elif half.truth.all() or not half.truth.any():
        why = f"{'all' if half.truth.any() else 'none'} of {len(half.truth)} are manipulated"
    else:
        why = "the logits separate the two classes without an error, or tell nothing about them"
    return f"{name} has the temperature 1: {why}"


def _measure(
    rest: Decisions, temperature: float, threshold: float, fitted: bool, before: float, level: float
) -> Outcome:
    """Measure a decision on what was held out."""
    raw, calibrated = (
        reliability(rest.truth, rest.scores(x)) if rest.truth.size else None for x in (1.0, temperature)
    )
    reached = at_threshold(rest, temperature, threshold, level)
    return Outcome(temperature, threshold, fitted, before, reached, raw, calibrated)


def _record(
    outcomes: Mapping[str, Outcome], pairs: int, data: Path, options: CalibrateOptions
) -> ScoreCalibration:
    reached = outcomes[_VERDICT].reached
    checked = reached.found + reached.missed + reached.false_alarms + reached.passed
    rates = {name: x.reached.false_alarm_rate for name, x in outcomes.items() if x.fitted}
    return ScoreCalibration(
        temperatures=Temperatures(**{name: x.temperature for name, x in outcomes.items()}),
        source=data.resolve().name,
        split=options.split,
        annotations=sha256_of(split_file(data, options.split)),
        seed=options.seed,
        fitted=pairs - checked,
        checked=checked,
        false_alarms=options.false_alarms,
        level=options.level,
        reached={name: rate for name, rate in rates.items() if rate is not None},
    )


def _write(bundle: Bundle, out: Path, outcomes: Mapping[str, Outcome], calibration: ScoreCalibration) -> None:
    """Write the bundle with its new manifest and model card; all other files are those of the bundle."""
    thresholds = Thresholds(**{name: x.threshold for name, x in outcomes.items()})
    manifest = replace(bundle.manifest, thresholds=thresholds, score_calibration=calibration)
    with BundleWriter(out) as writer:
        for name in bundle.manifest.files:
            if name != CARD:
                carry(bundle.path / name, writer.path(name))
        writer.add_text(CARD, model_card(manifest))
        writer.commit({**stored_fields(bundle), **manifest.to_dict()})


def _notes(manifest: Manifest, outcomes: Mapping[str, Outcome], wanted: float) -> Iterator[str]:
    """What to know of the outcome."""
    if manifest.weights.kind != "trained":
        yield f"the weights are {manifest.weights.kind}: calibrated or not, they say nothing of real images"
    for name, outcome in outcomes.items():
        found = outcome.reached.found_rate
        if found is not None and found.value < _FEW_FOUND:
            yield (
                f"{name} finds only {100 * found.value:.2f} % of what is manipulated on the pairs held out; "
                "allow more false alarms, or train on more such pairs"
            )
        rate = outcome.reached.false_alarm_rate
        if outcome.fitted and rate is not None and rate.low > wanted:
            yield (
                f"{name} has more false alarms on the pairs held out than wanted: {100 * rate.value:.2f} % "
                f"({100 * rate.low:.2f} to {100 * rate.high:.2f}); use more pairs"
            )
