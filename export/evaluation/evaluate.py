"""The task's metrics of a bundle on annotated pairs, beside the float32 network on the same pairs.

Bundle and reference run on the same batches; differences of metrics come with paired bootstrap intervals.
torch is needed only for the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dgm4.data.annotations import split_file
from dgm4.metrics import Interval, LabelledOutputs, bootstrap, bootstrap_difference, per_type, summarise
from dgm4.shipped import demo_checkpoint, demo_of
from engine.bundle import Bundle
from engine.errors import InputError, NumericalError
from engine.files import sha256_of, without_nan
from engine.inputs.text import CaptionTokenizer
from engine.layout import WEIGHTS
from engine.manifest import Manifest
from engine.scores import ScoreCalibration
from export.evaluation.agreement import Agreement, Case, measure_agreement, worst_cases
from export.evaluation.curves import Judgement, judge
from export.evaluation.decisions import read_decisions
from export.evaluation.running import BUNDLE, REFERENCE, Run, RunOptions, check_network, run_bundle


@dataclass(frozen=True)
class EvaluateOptions(RunOptions):
    """What to evaluate and how.

    `reference` "auto" compares with the float32 network of `checkpoint`, or of the bundle's own weights,
    "required" raises InputError where there is neither, "none" does not compare. `thresholds` replace the
    bundle's, as those of a Predictor do. `repeats`, `level` and `seed` are the bootstrap's; `worst` is the
    number of disagreements to keep.
    """

    reference: Literal["auto", "required", "none"] = "auto"
    checkpoint: Path | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    repeats: int = 1000
    worst: int = 8


@dataclass(frozen=True)
class Scores:
    """One model's metrics with their intervals, and its metrics by type; see `dgm4.metrics`."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    types: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Change:
    """A metric of the bundle minus that of the reference, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The reference on the same pairs: its source and scores, and how the bundle differs from it."""

    source: str
    scores: Scores
    changes: dict[str, Change]
    agreement: Agreement
    worst: tuple[Case, ...]


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    `model` is name, size, precision, backend and device; `weights_warning` says why the metrics mean little,
    None for a user's own checkpoint; `pairs` how many were evaluated; `decisions` judges the scores of the
    verdict, of each type and of the words at the thresholds in use, where there are any;
    `calibration` is the bundle's, None where it has none or other thresholds were given; `problems` counts
    what was left out, by kind; `seconds` by network and of waiting for images; `notes` say why there is no
    comparison, or what to know about it.
    """

    bundle: str
    model: dict[str, str]
    weights_warning: str | None
    data: str
    split: str
    pairs: int
    level: float
    scores: Scores
    decisions: dict[str, Judgement]
    calibration: ScoreCalibration | None
    comparison: Comparison | None
    notes: tuple[str, ...]
    problems: dict[str, int]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe data; NaN becomes None."""
        head = {
            name: getattr(self, name)
            for name in ("bundle", "model", "weights_warning", "data", "split", "pairs", "level", "notes")
        }
        tail = {
            "decisions": {name: asdict(judgement) for name, judgement in self.decisions.items()},
            "problems": self.problems,
            "seconds": self.seconds,
        }
        compared = None if self.comparison is None else _comparison_dict(self.comparison)
        plain: dict[str, Any] = without_nan({**head, **asdict(self.scores), "reference": compared, **tail})
        return plain


def evaluate(
    bundle: str | Path | Bundle,
    data: str | Path,
    options: EvaluateOptions | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a bundle on a split of the data folder `data`, in the published layout.

    Raises BundleError, BackendError and CheckpointError for what does not load, InputError for data that
    cannot be used and for a threshold that cannot be, NumericalError where a network outputs NaN or infinity.
    `progress` shows a bar on stderr.
    """
    options = options or EvaluateOptions()
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_network(opened, "evaluate")  # before a reference is loaded
    manifest = opened.manifest
    manifest = replace(manifest, thresholds=manifest.thresholds.replaced(options.thresholds))
    run, source, notes = _run(opened, data, options, progress)
    scores = _scores(BUNDLE, run.scored.outputs[BUNDLE], options)
    comparison = None
    if REFERENCE in run.scored.outputs:
        comparison = _compare(run, scores, source, opened, manifest, options)
    return Evaluation(
        bundle=str(opened.path),
        model=run.model,
        weights_warning=manifest.weights.warning,
        data=str(data),
        split=options.split,
        pairs=len(run.scored.samples),
        level=options.level,
        scores=scores,
        decisions=_judge(run, manifest, options.level),
        calibration=None if options.thresholds else manifest.score_calibration,
        comparison=comparison,
        notes=(*notes, *_calibration_notes(manifest, Path(data), options.split)),
        problems=run.problems,
        seconds=run.scored.seconds,
    )


def _run(
    bundle: Bundle, data: str | Path, options: EvaluateOptions, progress: bool
) -> tuple[Run, str, tuple[str, ...]]:
    """Run the bundle and, where one is wanted and there, the reference: its source, and notes on it."""
    options = replace(options, checkpoint=options.checkpoint or _shipped_checkpoint(bundle))
    why = _why_no_reference(bundle, options)
    if why:
        return run_bundle(bundle, data, options, None, progress), "", (why,)
    from export.evaluation.reference import load_reference, torch_threads

    reference, source, note = load_reference(bundle, options.checkpoint)
    with torch_threads(options.threads):
        run = run_bundle(bundle, data, options, reference, progress)
    return run, source, (note,) if note else ()


def _shipped_checkpoint(bundle: Bundle) -> Path | None:
    """The demo weights that a bundle without its weights was made of; None for any other bundle."""
    demo = None if WEIGHTS in bundle.manifest.files else demo_of(bundle.manifest.weights.sha256)
    return None if demo is None else demo_checkpoint(demo)


def _why_no_reference(bundle: Bundle, options: EvaluateOptions) -> str:
    if options.reference == "none":
        return "no reference was asked for"
    if options.checkpoint is not None or WEIGHTS in bundle.manifest.files:
        return ""
    remedy = f"give --checkpoint with what it was made of: {bundle.manifest.weights.source}"
    if options.reference == "required":
        raise InputError(f"the bundle does not contain {WEIGHTS} to compare with: {remedy}")
    return f"no reference: the bundle does not contain {WEIGHTS}; {remedy}"


def _judge(run: Run, manifest: Manifest, level: float) -> dict[str, Judgement]:
    scored = run.scored
    decisions = read_decisions(scored.samples, scored.tokens, scored.outputs[BUNDLE])
    temperatures, thresholds = vars(manifest.temperatures), vars(manifest.thresholds)
    judged = {name: judge(x, temperatures[name], thresholds[name], level) for name, x in decisions.items()}
    return {name: judgement for name, judgement in judged.items() if judgement is not None}


def _calibration_notes(manifest: Manifest, data: Path, split: str) -> tuple[str, ...]:
    """Tell where the scores were calibrated on the very pairs that are evaluated."""
    calibration = manifest.score_calibration
    if calibration is None or sha256_of(split_file(data, split)) != calibration.annotations:
        return ()
    return (
        f"the scores were calibrated on half of these pairs ({calibration.source}, split {split}), so the "
        "rates and calibration errors here are too good; evaluate on another split",
    )


def _scores(name: str, outputs: LabelledOutputs, options: EvaluateOptions) -> Scores:
    try:
        metrics = summarise(*outputs)
    except NumericalError as error:
        raise NumericalError(f"the {name}'s {error}") from error
    intervals = bootstrap(outputs, repeats=options.repeats, level=options.level, seed=options.seed)
    return Scores(metrics, intervals, per_type(outputs.labels, outputs.logits_multicls))


def _compare(
    run: Run,
    bundle_scores: Scores,
    source: str,
    bundle: Bundle,
    manifest: Manifest,
    options: EvaluateOptions,
) -> Comparison:
    """Compare the bundle's outputs, whose scores are `bundle_scores`, with the reference's."""
    ours, theirs = run.scored.outputs[BUNDLE], run.scored.outputs[REFERENCE]
    scores = _scores(REFERENCE, theirs, options)
    draws: Any = {"repeats": options.repeats, "level": options.level, "seed": options.seed}
    intervals = bootstrap_difference(ours, theirs, **draws)
    changes = {
        name: Change(value - scores.metrics[name], *intervals[name])
        for name, value in bundle_scores.metrics.items()
    }
    tokenizer = CaptionTokenizer.of(bundle)
    worst = worst_cases(run.scored.samples, ours, theirs, options.worst, manifest, tokenizer)
    return Comparison(source, scores, changes, measure_agreement(ours, theirs, manifest), worst)


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return {
        "source": comparison.source,
        **asdict(comparison.scores),
        "changes": {name: asdict(change) for name, change in comparison.changes.items()},
        "agreement": comparison.agreement.to_dict(),
        "worst": [case.to_dict() for case in comparison.worst],
    }
