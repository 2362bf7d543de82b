"""The task's metrics of a bundle that is not published yet, and the gate between them and float32's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgm4.shipped import demo_of, demo_record
from dgm4.tokenizer import DEMO_VOCABULARY, vocabulary_digest
from engine.layout import HALF_GRAPH
from engine.manifest import Accuracy, Manifest
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import GATED, check_gate
from export.stages import Job, Source


@dataclass(frozen=True)
class Measured:
    """Records of accuracy for the manifest; `failure` says why the gate refused the last graph, or None."""

    records: tuple[Accuracy, ...] = ()
    failure: str | None = None


def measure_accuracy(job: Job, source: Source, manifest: Manifest) -> Measured:
    """Run the stage "accuracy" for each graph of the bundle, up to the first that the gate refuses.

    `manifest` is the bundle's without accuracy and engines. Where no data was given, the demo's weights with
    its vocabulary get the metrics that they ship with.
    """
    if job.options.data is None:
        return Measured(_shipped_accuracy(source))
    bundle = job.writer.preview(manifest.to_dict())
    graphs = [None, HALF_GRAPH] if job.writer.path(HALF_GRAPH).exists() else [None]
    records: list[Accuracy] = []
    for graph in graphs:
        record, failure = _measure_graph(job, bundle, job.options.data, graph)
        if failure is not None:
            return Measured(failure=failure)
        records.append(record)
    return Measured(tuple(records))


def _measure_graph(job: Job, bundle: Path, data: Path, graph: str | None) -> tuple[Accuracy, str | None]:
    """The record of a graph's metrics, None for the graph of the backends, and why the gate refuses it."""
    options, name = job.options, f", {graph}" if graph else ""
    settings = EvaluateOptions(split=options.split, graph=graph, checkpoint=options.checkpoint, repeats=1)
    with job.stage("accuracy") as stage:
        result = evaluate(bundle, data, settings)
        metrics = result.scores.metrics
        reference = {} if result.comparison is None else result.comparison.scores.metrics
        failures = check_gate(options.precision, metrics, reference)
        shown = ", ".join(f"{metric} {100 * metrics[metric]:.2f}" for metric in GATED)
        stage.failed = bool(failures)
        stage.text = f"{result.pairs} pairs of {options.split}{name}: {shown}; within the gate of float32"
    source = f"{data.name}, split {options.split}{name}"
    record = Accuracy(source, result.pairs, metrics, reference)
    return record, f"the accuracy gate failed{name}: {'; '.join(map(str, failures))}" if failures else None


def _shipped_accuracy(source: Source) -> tuple[Accuracy, ...]:
    """What the demo's record says of its weights (by SHA-256); nothing of any others."""
    if source.vocabulary.sha256 != vocabulary_digest(DEMO_VOCABULARY):
        return ()
    name = demo_of(source.weights.sha256)
    if name is None:
        return ()
    record = demo_record()
    network = record["networks"][name]
    genuine = network["genuine"]
    before = "measured before this export"
    alarms = {"false_alarms": genuine["rate"]}
    return (
        Accuracy(f"the demo's {record['data']}, {before}", record["pairs"], {}, network["metrics"]),
        Accuracy(f"genuine photographs that training never saw, {before}", genuine["pairs"], {}, alarms),
    )
