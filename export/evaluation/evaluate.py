"""The task's metrics of a bundle on annotated pairs, beside the float32 network on the same pairs.

Bundle and reference run on the same batches; differences of metrics come with paired bootstrap intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import dgm4
from dgm4.data.annotations import Sample, read_split
from dgm4.data.dataset import PairDataset
from dgm4.metrics import Interval, LabelledOutputs, bootstrap, bootstrap_difference, per_type, summarise
from dgm4.model import Detector
from engine.backends import Backend, create, ort
from engine.bundle import Bundle
from engine.errors import InputError, NumericalError
from engine.files import sha256_of, without_nan
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD
from engine.inputs.text import CaptionTokenizer
from engine.layout import DATA_SUFFIX, TOKENIZER, WEIGHTS
from engine.manifest import Manifest
from engine.network.config import NetworkConfig
from export.evaluation.agreement import Agreement, Case, measure_agreement, worst_cases
from export.evaluation.scoring import Network, Scored, TorchNetwork, score, torch_threads

_OURS, _REFERENCE = "bundle", "reference"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate and how.

    `graph` names an ONNX file of the bundle to run in ONNX Runtime, in place of a backend's choice.
    `limit` draws that many pairs of the split with `seed`; None takes all. `batch` None is the bundle's
    largest, 32 at most. `reference` "auto" compares with the float32 network of `checkpoint`, or of the
    bundle's own weights, "required" raises InputError where there is neither, "none" does not compare.
    `on_bad` "skip" leaves unusable records out, "raise" stops there. `repeats`, `level` and `seed` are the
    bootstrap's; `worst` is the number of disagreements to keep.
    """

    split: str = "test"
    graph: str | None = None
    limit: int | None = None
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    batch: int | None = None
    reference: Literal["auto", "required", "none"] = "auto"
    checkpoint: Path | None = None
    on_bad: Literal["skip", "raise"] = "skip"
    repeats: int = 1000
    level: float = 0.95
    seed: int = 0
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

    `model` is name, size, precision, backend and device; `pairs` how many were evaluated; `problems` counts
    what was left out, by kind; `seconds` by network and of waiting for images; `note` says why there is no
    comparison, or what to know about it.
    """

    bundle: str
    model: dict[str, str]
    trained: bool
    data: str
    split: str
    pairs: int
    level: float
    scores: Scores
    comparison: Comparison | None
    note: str
    problems: dict[str, int]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe data; NaN becomes None."""
        head = {
            name: getattr(self, name)
            for name in ("bundle", "model", "trained", "data", "split", "pairs", "level", "note")
        }
        tail = {"problems": self.problems, "seconds": self.seconds}
        compared = None if self.comparison is None else _comparison_dict(self.comparison)
        plain: dict[str, Any] = without_nan({**head, **asdict(self.scores), "reference": compared, **tail})
        return plain


# Long by its signature, docstring and the fields of its result; the steps are functions already.
def evaluate(
    bundle: str | Path | Bundle,
    data: str | Path,
    options: EvaluateOptions | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a bundle on a split of the data folder `data`, in the published layout.

    Raises BundleError, BackendError and CheckpointError for what does not load, InputError for data that
    cannot be used, NumericalError where a network outputs NaN or infinity. `progress` shows a bar on stderr.
    """
    options = options or EvaluateOptions()
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    tokenizer = CaptionTokenizer(
        opened.verified(TOKENIZER), manifest.preprocess.max_words, manifest.preprocess.max_tokens
    )
    annotations = read_split(data, options.split, options.on_bad)
    samples = _draw(annotations.usable(f"{data}, split {options.split}"), options)
    dataset = PairDataset(samples, tokenizer, _image_size(manifest))
    reference = _load_reference(opened, options)
    network = _load_network(opened, options)
    try:
        scored = _run_both(
            network, reference.model, dataset, _batch_size(manifest, options), options, progress
        )
    finally:
        network.close()
    scores = _scores(_OURS, scored.outputs[_OURS], options)
    comparison = None
    if reference.model is not None:
        comparison = _compare(scored, scores, reference.source, (manifest, tokenizer), options)
    info = manifest.model
    return Evaluation(
        bundle=str(opened.path),
        model={
            **{"name": info.name, "size": info.size, "precision": manifest.precision},
            **{"backend": network.name, "device": network.device},
        },
        trained=manifest.weights.trained,
        data=str(data),
        split=options.split,
        pairs=len(scored.samples),
        level=options.level,
        scores=scores,
        comparison=comparison,
        note=reference.note,
        problems=dict(Counter(p.kind for p in (*annotations.problems, *scored.problems)).most_common()),
        seconds=scored.seconds,
    )


def _run_both(
    network: Backend[Any],
    reference: Detector | None,
    dataset: PairDataset,
    batch: int,
    options: EvaluateOptions,
    progress: bool,
) -> Scored:
    networks: dict[str, Network] = {_OURS: network}
    if reference is not None:
        networks[_REFERENCE] = TorchNetwork(reference)
    with torch_threads(options.threads):
        return score(networks, dataset, batch, options.on_bad, progress)


def _load_network(bundle: Bundle, options: EvaluateOptions) -> Backend[Any]:
    if options.graph is None:
        return create(options.backend, bundle, options.device, options.threads)
    return ort.load(bundle, options.graph, options.graph + DATA_SUFFIX, options.threads)


@dataclass(frozen=True)
class _Reference:
    """The float32 network, or None, where it came from and what to know about it."""

    model: Detector | None
    source: str
    note: str


def _load_reference(bundle: Bundle, options: EvaluateOptions) -> _Reference:
    """Load the network of the checkpoint if one is given, else of the bundle's own weights."""
    manifest = bundle.manifest
    if options.reference == "none":
        return _Reference(None, "", "no reference was asked for")
    if options.checkpoint is not None:
        model = _load_checkpoint(options.checkpoint, NetworkConfig.from_fields(manifest.model.config))
        return _Reference(model, options.checkpoint.name, _origin_note(options.checkpoint, manifest))
    if WEIGHTS not in manifest.files:
        if options.reference == "required":
            raise InputError(f"the bundle does not contain {WEIGHTS} to compare with: give --checkpoint")
        return _Reference(None, "", f"no reference: the bundle does not contain {WEIGHTS}; give --checkpoint")
    config = NetworkConfig.from_fields(manifest.model.config)
    model = dgm4.load_checkpoint(bundle.verified(WEIGHTS), config.name, config)
    note = ""
    if manifest.precision != "fp32":
        note = "the reference's weights are the bundle's, rounded to float16; --checkpoint for the exact ones"
    return _Reference(model, f"{WEIGHTS} of the bundle", note)


def _load_checkpoint(path: Path, config: NetworkConfig) -> Detector:
    checkpoint = dgm4.read_checkpoint(path)
    if checkpoint.layout == "albef":
        raise InputError(
            f"{path}: is an ALBEF initialisation, whose heads are drawn at each load; leave --checkpoint out "
            "to compare with the bundle's own weights"
        )
    return dgm4.load_state(checkpoint, config.name, config)


def _origin_note(checkpoint: Path, manifest: Manifest) -> str:
    """What to know about a reference whose file is not the one that the bundle was made of."""
    if sha256_of(checkpoint) == manifest.weights.sha256:
        return ""
    return f"{checkpoint.name} is not the file that the bundle was made of ({manifest.weights.source})"


def _draw(samples: Sequence[Sample], options: EvaluateOptions) -> Sequence[Sample]:
    """Return all samples, or `limit` of them drawn with the seed, in their order."""
    if options.limit is None or options.limit >= len(samples):
        return samples
    if options.limit < 1:
        raise InputError(f"limit: expected at least 1, got {options.limit}")
    chosen = np.random.default_rng(options.seed).choice(len(samples), options.limit, replace=False)
    return [samples[i] for i in np.sort(chosen)]


def _image_size(manifest: Manifest) -> int:
    """The image's side in pixels; raises InputError for a normalisation that the data set does not do."""
    spec = manifest.preprocess
    if (spec.mean, spec.std) != (CLIP_MEAN, CLIP_STD):
        raise InputError(f"expected a bundle with mean {CLIP_MEAN} and std {CLIP_STD}, got {spec}")
    return spec.image_size


def _batch_size(manifest: Manifest, options: EvaluateOptions) -> int:
    if options.batch is not None and options.batch < 1:
        raise InputError(f"batch: expected at least 1, got {options.batch}")
    return min(options.batch or 32, manifest.limits.max_batch)


def _scores(name: str, outputs: LabelledOutputs, options: EvaluateOptions) -> Scores:
    try:
        metrics = summarise(*outputs)
    except NumericalError as error:
        raise NumericalError(f"the {name}'s {error}") from error
    intervals = bootstrap(outputs, repeats=options.repeats, level=options.level, seed=options.seed)
    return Scores(metrics, intervals, per_type(outputs.labels, outputs.logits_multicls))


def _compare(
    scored: Scored,
    bundle_scores: Scores,
    source: str,
    context: tuple[Manifest, CaptionTokenizer],
    options: EvaluateOptions,
) -> Comparison:
    """Compare the bundle's outputs, whose scores are `bundle_scores`, with the reference's."""
    ours, theirs = scored.outputs[_OURS], scored.outputs[_REFERENCE]
    scores = _scores(_REFERENCE, theirs, options)
    draws: Any = {"repeats": options.repeats, "level": options.level, "seed": options.seed}
    intervals = bootstrap_difference(ours, theirs, **draws)
    changes = {
        name: Change(value - scores.metrics[name], *intervals[name])
        for name, value in bundle_scores.metrics.items()
    }
    worst = worst_cases(scored.samples, ours, theirs, options.worst, *context)
    return Comparison(source, scores, changes, measure_agreement(ours, theirs), worst)


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return {
        "source": comparison.source,
        **asdict(comparison.scores),
        "changes": {name: asdict(change) for name, change in comparison.changes.items()},
        "agreement": comparison.agreement.to_dict(),
        "worst": [case.to_dict() for case in comparison.worst],
    }
