"""From a checkpoint to a verified bundle: load, rewrite, cast, trace, quantise, build, write, try.

One straight line. Each stage is compared with the one before it; a stage that differs too much raises,
and then nothing is written.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import dgm4
from dgm4.config import ModelConfig
from dgm4.model import Detector
from dgm4.shipped import demo_of, demo_record
from dgm4.tokenizer import DEMO_VOCABULARY, build_tokenizer, vocabulary_of
from engine.errors import BuildError, InputError, VerificationError
from engine.files import sha256_of
from engine.layout import CARD, HALF_GRAPH, TOKENIZER, WEIGHTS
from engine.manifest import Accuracy, EngineEntry, Manifest, Weights
from export.bundle.card import model_card
from export.bundle.writer import BundleWriter
from export.engine_stage import no_engine, write_engine
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import GATED, check_gate
from export.graph.parity import EXACT, check, compare, torch_answers
from export.graph.rewrite import rewrite
from export.lowering import keep_more, write_graph
from export.manifest_fields import describe_export
from export.options import ExportOptions, check_options
from export.stages import Run, Stage
from export.trt import build as trt

SEED = 1


def export_bundle(options: ExportOptions, report: Callable[[Stage], None]) -> dict[str, Any]:
    """Export and return the manifest that was written; `report` hears of every finished stage.

    Raises InputError for options that do not fit, CheckpointError, VerificationError (then no bundle is
    written), BuildError, BundleError where the bundle cannot be written.
    """
    check_options(options)
    for folder in (options.calibration, options.data):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder}: expected the data folder (with origin, manipulation and metadata)")
    run = Run(options, report)
    with BundleWriter(options.out) as writer:
        known, accuracy = _write_networks(run, writer)
        known["engines"] = _write_engine(run, writer, known["config"])
        with run.stage("bundle") as stage:
            draft = describe_export(run, **known, accuracy=accuracy)
            writer.add_text(CARD, model_card(draft))
            manifest = writer.commit(draft.to_dict())
            total = sum(entry["bytes"] for entry in manifest["files"].values())
            stage.text = (
                f"{options.out}: {len(manifest['files'])} files, {total / 1e6:.0f} MB, hashed and synced"
            )
    return manifest


def _judge(run: Run, writer: BundleWriter, manifest: Manifest) -> list[Accuracy]:
    """Measure the task's metrics of the unpublished bundle; raise VerificationError outside the gate."""
    options = run.options
    if options.data is None:
        own = run.vocabulary is not None and run.vocabulary.read_bytes() == DEMO_VOCABULARY.read_bytes()
        return _shipped_accuracy(manifest.weights.sha256) if own else []
    preview = writer.preview(manifest.to_dict())
    graphs = [None, HALF_GRAPH] if writer.path(HALF_GRAPH).exists() else [None]
    return [_measure(run, preview, options.data, graph) for graph in graphs]


def _measure(run: Run, bundle: Path, data: Path, graph: str | None) -> Accuracy:
    """The record of a graph's metrics, None for that of the backends; VerificationError outside the gate."""
    options = run.options
    with run.stage("accuracy") as stage:
        settings = EvaluateOptions(split=options.split, graph=graph, checkpoint=options.checkpoint, repeats=1)
        found = evaluate(bundle, data, settings)
        metrics = found.scores.metrics
        reference = {} if found.comparison is None else found.comparison.scores.metrics
        failures = check_gate(options.precision, metrics, reference)
        if failures:
            raise VerificationError(f"the accuracy gate failed{_of(graph)}: {'; '.join(map(str, failures))}")
        named = ", ".join(f"{name} {100 * metrics[name]:.2f}" for name in GATED)
        stage.text = (
            f"{found.pairs} pairs of {options.split}{_of(graph)}: {named}; within the gate of float32"
        )
    source = f"{data.name}, split {options.split}{_of(graph)}"
    return Accuracy(source, found.pairs, metrics, reference)


def _of(graph: str | None) -> str:
    return f", {graph}" if graph else ""


def _shipped_accuracy(weights: str | None) -> list[Accuracy]:
    """What the demo's own record says of its weights (by SHA-256); nothing of any others."""
    name = demo_of(weights)
    if name is None:
        return []
    record = demo_record()
    source = f"the demo's {record['data']}, measured before this export"
    return [Accuracy(source, record["pairs"], {}, record["networks"][name]["metrics"])]


def _write_networks(run: Run, writer: BundleWriter) -> tuple[dict[str, Any], list[Accuracy]]:
    """Load, rewrite, lower, trace and judge; leave the graph and the weights in the bundle.

    Returns the network's configuration and the record of its weights, and that of its accuracy.
    """
    model, weights = _load(run)
    config = model.config
    _write_tokenizer(run, writer, config)
    _write_weights(run, writer, model)
    with run.stage("rewrite") as stage:
        reference = torch_answers(model, config)
        inference = rewrite(model)
        answers = torch_answers(inference, config)
        stage.differences.append(check(compare("rewrite", "trained network", reference, answers, EXACT)))
        stage.text = "exact rewrites composed"
    del model
    known: dict[str, Any] = {"config": config, "weights": weights}
    checked = len(run.verification)
    while True:
        try:
            write_graph(run, writer, inference, answers)
            accuracy = _judge(run, writer, describe_export(run, **known))
            break
        except VerificationError:
            if not keep_more(run, writer, inference):
                raise
            del run.verification[checked:]
    _release(inference)
    return known, accuracy


def _release(model: torch.nn.Module) -> None:
    """Give the weights' memory back to the system: the builder, another process, needs the room.

    torch's tracer keeps the parameters of its last trace, so they are emptied rather than dropped; and
    the C library keeps freed blocks of this size until it is asked for them.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def _load(run: Run) -> tuple[Detector, Weights]:
    options = run.options
    with run.stage("load") as stage:
        if options.checkpoint is None:
            model = dgm4.seeded_model(options.model or "asap", options.size or "tiny", SEED)
            weights = Weights(trained=False, source=f"drawn from seed {SEED}", sha256=None)
        else:
            model, weights = _load_checkpoint(options, options.checkpoint)
        count = sum(p.numel() for p in model.parameters())
        stage.text = (
            f"{model.config.name} {model.config.size}, {count / 1e6:.1f} M parameters, {weights.source}"
        )
    return model, weights


def _load_checkpoint(options: ExportOptions, path: Path) -> tuple[Detector, Weights]:
    checkpoint = dgm4.read_checkpoint(path)
    trained = checkpoint.layout != "albef"
    name = options.model or (checkpoint.layout if trained else None)
    config = dgm4.model_config(name, options.size) if name and options.size else None
    source = path.name if trained else f"{path.name} (ALBEF initialisation, heads untrained)"
    weights = Weights(trained, source, sha256_of(path))
    return dgm4.load_state(checkpoint, options.model, config), weights


def _write_weights(run: Run, writer: BundleWriter, model: Detector) -> None:
    """Keep the live tensors under their released names, for the backends that run torch."""
    half = run.options.precision != "fp32"
    with run.stage("weights") as stage:
        state = {
            name: value.half() if half and value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        path = writer.path(WEIGHTS)
        safetensors.torch.save_file(state, path, metadata={"config": json.dumps(model.config.to_dict())})
        stage.text = (
            f"{len(state)} tensors, {path.stat().st_size / 1e6:.0f} MB, {'float16' if half else 'float32'}"
        )


def _write_tokenizer(run: Run, writer: BundleWriter, config: ModelConfig) -> None:
    with run.stage("tokenizer") as stage:
        path = run.options.vocabulary or vocabulary_of(run.options.checkpoint, config.vocabulary)
        run.vocabulary = path
        tokenizer = build_tokenizer(path, config.vocabulary)
        writer.add_text(TOKENIZER, tokenizer.to_str())
        stage.text = f"WordPiece, {tokenizer.get_vocab_size()} pieces of {path.name}"


def _write_engine(run: Run, writer: BundleWriter, config: ModelConfig) -> list[EngineEntry]:
    """Build the engine where this machine can; say in one line why not where it cannot."""
    options = run.options
    with run.stage("engine") as stage:
        builder = trt.find_builder()
        reason = no_engine(options, builder)
        if reason is not None or builder is None:
            stage.text = f"none: {reason}"
            return []
        try:
            entry, stage.text = write_engine(options, config, builder, writer)
        except BuildError as error:
            raise BuildError(
                f"{error}\nwithout an engine (--target none) the bundle would be whole"
            ) from error
    return [entry]
